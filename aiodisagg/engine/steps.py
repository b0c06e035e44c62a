"""Who wants to know when the engine steps: a tower that works in the slack between steps."""

from __future__ import annotations

from typing import Protocol


class StepWatcher(Protocol):
    """Told on the step thread, around every step; must not block and must not raise."""

    def step_began(self) -> None: ...

    def step_ended(self, decodes: int) -> None:
        """``decodes``: requests that got a token in it; 0 also when there was nothing to do, or will not be again."""

    def patience_s(self) -> float:
        """How long a step that would only decode may be put off, for the good of others; 0: not at all."""

    def prefill_waits(self, waits: bool) -> None:
        """Told before each step, and when there is none to do: whether there are prompt tokens to compute now."""

    def whole_prompts(self) -> bool:
        """Whether prompts shall wait for all of their rows for now, since somebody else wants the device."""


class Unwatched:
    """Nobody does."""

    def step_began(self) -> None: ...

    def step_ended(self, decodes: int) -> None: ...

    def patience_s(self) -> float:
        return 0.0

    def prefill_waits(self, waits: bool) -> None: ...

    def whole_prompts(self) -> bool:
        return False
