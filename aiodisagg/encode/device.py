"""The gate of a tower and an engine that share an accelerator.

Theory. Who goes first on the device is said by the priorities of their streams (:mod:`aiodisagg.device.streams`): steps
with prompt tokens, then the tower, then steps that only decode. What is left to decide:

* **Streams keep their pace.** Batches begin while the :class:`~aiodisagg.scheduler.slack.Slack` account has something.
  In it a step or a batch takes what it would take alone: of time in which both were at work, a step with prompts pays
  for all, as the batch has got nothing then (or half, beside one too large to be a graph), and a step that only decodes
  for nothing, as it waited for the batch.
* **While the tower has work, prompts are computed in one piece.** A chunk brings no first token nearer, delays the
  tower that the rest of the prompt may be waiting for, and reads all weights once more. Rows from elsewhere for a peer
  whose tower is idle are computed as they come.
* **A prompt that waits for a step of decodes lends it its place.** Else it would wait for the tower, which goes before
  the step: so no batch begins until that has ended. Only a prompt that needs no rows does, so this ends soon.
* **Steps with prompts without end do not stop a batch.** One that they have kept for ``LONGEST_S`` is waited for: each
  of them begins after it, or a pace late.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aiodisagg.encode.gate import SlackGate, endless
from aiodisagg.scheduler.slack import Slack

LONGEST_S = 0.5
"""Of a batch's time beside steps with prompts."""


class DeviceGate(SlackGate):
    """Between an engine's step thread and a tower's thread of one process, on one accelerator."""

    def __init__(
        self, slack: Slack, *, longest_s: float = LONGEST_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(slack, clock=clock)
        self._longest_s = longest_s
        self._stepping = self._prefills = self._lent = False
        self._free: Callable[[], None] = lambda: None
        self._marked = 0.0
        self._step_waited_s = 0.0
        """Of the step that began last: beside batches, without prompts."""
        self._batch_waited_s = 0.0
        """Since a batch was over: of batches at work beside steps with prompts."""

    # -- the engine's thread -------------------------------------------------------------------------------------

    def prefill_waits(self, waits: bool) -> None:
        with self._changed:
            self._prefills = waits

    def prompt_came(self) -> None:
        with self._changed:
            self._lent = self._stepping and not self._prefills

    def step_began(self) -> None:
        with self._changed:
            if self._prefills and not self._may_begin():
                self._changed.wait_for(self._may_begin, self._slack.inter_token_s)
            self._mark()
            super().step_began()
            self._stepping, self._step_waited_s = True, 0.0

    def step_ended(self, decodes: int) -> None:
        with self._changed:
            self._mark()
            self._stepping = self._lent = False
            self.stepped(max(0.0, self._clock() - self._began - self._step_waited_s), decodes)

    def slowed(self) -> bool:
        with self._changed:
            self._mark()
            return self._step_waited_s > 0

    def whole_prompts(self) -> bool:
        with self._changed:
            return not self._closed and (self._wants or self._working > 0)

    def tell_when_free(self, free: Callable[[], None]) -> None:
        self._free = free

    # -- the tower's thread --------------------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        return self._closed or (not self._lent and super().open)

    def wait(self, patience_s: Callable[[], float] = endless, *, block: bool = True) -> bool:
        with self._changed:
            may = super().wait(patience_s, block=block)
            self._mark(working=self._working - may)
            return may

    def spent(self, tower_s: float) -> None:
        with self._changed:
            self._mark()
            super().spent(tower_s - min(self._batch_waited_s, tower_s))
            self._batch_waited_s = 0.0
        self._say_if_free()

    def gave_up(self) -> None:
        super().gave_up()
        self._say_if_free()

    def close(self) -> None:
        super().close()
        self._say_if_free()

    def _say_if_free(self) -> None:
        if not self.whole_prompts():
            self._free()

    def _may_begin(self) -> bool:
        return self._closed or not self._working or self._batch_waited_s <= self._longest_s

    def _mark(self, working: int | None = None) -> None:
        """Counts what has passed since the last mark, of which ``working`` batches were at work."""
        now = self._clock()
        if self._stepping and (self._working if working is None else working):
            if self._prefills:
                self._batch_waited_s += now - self._marked
            else:
                self._step_waited_s += now - self._marked
        self._marked = now
