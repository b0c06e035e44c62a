"""The gate of a tower and an engine that share CPU cores.

Theory. On an accelerator a tower's batch cannot be interrupted, hence :class:`~aiodisagg.scheduler.slack.Slack`. A CPU
is shared out by its operating system in slices of milliseconds, better than any gate could. What is left to decide:

* **Prefill goes before the tower.** Two kinds of work that share a core both end late; one after the other, the first
  ends twice as early and the second no later. A prompt that can be computed is nearest to its first token.
* **No item gives way for ever.** A stream of prompts without images must not stop all images: the tower goes on when
  an item's patience is at its end, which is one for all its batches and those before it.
* **While the tower has work, prompts are computed in one piece.** A chunk takes the core from the tower that the rest
  of the prompt may be waiting for, and pays once more for reading the weights. Rows from elsewhere for a peer whose
  tower is idle are computed as they come.
* **Beside decodes the tower gets the larger share.** Decodes of several streams cost little more than those of one, so
  what holds up first tokens makes decoding dearer. The engine's thread steps back by ``NICE``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable

from aiodisagg.encode.gate import endless
from aiodisagg.engine.steps import StepWatcher

NICE = 4
"""Of the engine's thread: seven tenths of a core for the tower while both work."""


class CoreGate(StepWatcher):
    """Between an engine's step thread and a tower's thread of one process, on a CPU."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._prefills = self._wants = self._closed = self._stepped_back = False
        self._batches = 0
        self._free: Callable[[], None] = lambda: None
        self.waits = 0
        """How often a batch had to wait for a prefill."""
        self._waited_s = self._began = 0.0

    # -- the engine's thread -------------------------------------------------------------------------------------

    def step_began(self) -> None:
        if not self._stepped_back:
            self._stepped_back = True
            _step_back(NICE)

    def prefill_waits(self, waits: bool) -> None:
        with self._changed:
            self._prefills = waits
            self._changed.notify_all()  # also if they do: meanwhile somebody may have come who is due

    def whole_prompts(self) -> bool:
        with self._changed:
            return not self._closed and (self._wants or self._batches > 0)

    def tell_when_free(self, free: Callable[[], None]) -> None:
        self._free = free

    # -- the tower's thread --------------------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        return self._closed or not self._prefills

    @property
    def waited_s(self) -> float:
        with self._changed:
            return self._waited_s + (time.monotonic() - self._began if self._wants else 0.0)

    def wait(self, patience_s: Callable[[], float] = endless, *, block: bool = True) -> bool:
        with self._changed:
            if not (block or self.open):
                return False
            self._wants, self._began, waited = True, time.monotonic(), False
            while not self.open and (left_s := patience_s()) > 0:
                waited = True
                self._changed.wait(left_s)
            self.waits += waited
            self._waited_s = self.waited_s
            self._wants = False
            self._batches += not self._closed
            return not self._closed

    def spent(self, tower_s: float) -> None:
        with self._changed:
            self._batches = max(0, self._batches - 1)  # a batch that failed is paid for piece by piece
        if not self.whole_prompts():
            self._free()

    def gave_up(self) -> None:
        self.spent(0.0)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._free()


def _step_back(by: int) -> None:
    """Lowers the priority of this thread, where threads have one of their own."""
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + by)
