"""Who wants to know when the engine steps: a tower that works in the slack between steps."""

from __future__ import annotations

from collections.abc import Callable


class StepWatcher:
    """Told on the step thread, around every step; must not block for long and must not raise. This one does nothing."""

    def step_began(self) -> None:
        pass

    def step_ended(self, decodes: int) -> None:
        """``decodes``: requests that got a token in it; 0 also when there was nothing to do, or will not be again."""

    def slowed(self) -> bool:
        """Whether others used the device of the step that began last before it did: its time says nothing then."""
        return False

    def prefill_waits(self, waits: bool) -> None:
        """Told before each step, and when there is none to do: whether there are prompt tokens to compute now."""

    def prompt_came(self) -> None:
        """Told, on any thread, of a prompt that needs no rows: it could be computed now, but for the step at work."""

    def whole_prompts(self) -> bool:
        """Whether prompts shall wait for all of their rows for now, since somebody else wants the device."""
        return False

    def tell_when_free(self, free: Callable[[], None]) -> None:
        """``free``: to be called, on any thread and with no lock held, once ``whole_prompts`` has turned false."""
