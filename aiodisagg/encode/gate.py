"""When the tower's thread may begin a sub-batch: at once, or as the engine beside it leaves slack."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from aiodisagg.engine.steps import StepWatcher
from aiodisagg.scheduler.slack import Slack


def endless() -> float:
    return threading.TIMEOUT_MAX


class Gate(Protocol):
    """Asked by the tower's thread before each sub-batch, told after it."""

    @property
    def open(self) -> bool:
        """Whether ``wait`` would return at once."""

    @property
    def waited_s(self) -> float:
        """How long sub-batches have waited, in all and up to now."""

    def wait(self, patience_s: Callable[[], float] = endless, *, block: bool = True) -> bool:
        """Blocks until a sub-batch may begin. False: the gate was closed, or, without ``block``, none may begin now.

        ``patience_s``: how much longer it can be kept waiting for prompts; asked again at each step, with a lock held.
        """

    def spent(self, tower_s: float) -> None:
        """A sub-batch kept the tower busy for so long."""

    def gave_up(self) -> None:
        """What ``wait`` let begin does not: there was nothing left to do."""

    def close(self) -> None:
        """Ends every wait."""


class OpenGate:
    """A tower that shares nothing with anybody."""

    open = True
    waited_s = 0.0

    def wait(self, patience_s: Callable[[], float] = endless, *, block: bool = True) -> bool:
        return True

    def spent(self, tower_s: float) -> None: ...

    def gave_up(self) -> None: ...

    def close(self) -> None: ...


class SlackGate(StepWatcher):
    """Between an engine's step thread and a tower's thread: a :class:`Slack` account under a lock.

    The engine is never held up: ``step_began`` and ``step_ended`` take the lock for microseconds.
    """

    def __init__(self, slack: Slack, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._slack, self._clock = slack, clock
        self._changed = threading.Condition()
        self._began = 0.0
        self._wants = self._closed = False
        self._working = 0  # sub-batches that have begun and not been paid for
        self._batch_s = 0.0  # what the last one took
        self.waits = 0
        """How often a sub-batch had to wait for slack."""
        self.waited_s = 0.0

    # -- the engine's thread -------------------------------------------------------------------------------------

    def step_began(self) -> None:
        with self._changed:
            self._began = self._clock()

    def step_ended(self, decodes: int) -> None:
        with self._changed:
            self.stepped(self._clock() - self._began, decodes)

    def stepped(self, step_s: float, decodes: int) -> None:
        """A step took ``step_s``; on any thread."""
        with self._changed:
            self._slack.stepped(step_s, decodes)
            if self.open:
                self._changed.notify_all()

    # -- the tower's thread --------------------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        """A batch that has begun and is not paid for counts as much as the one before."""
        slack = self._slack
        return self._closed or not slack.decodes or slack.earned_s > self._working * self._batch_s

    def wait(self, patience_s: Callable[[], float] = endless, *, block: bool = True) -> bool:
        with self._changed:
            if not self.open:
                if not block:
                    return False
                began = self._clock()
                self.waits += 1
                self._wants = True
                self._changed.wait_for(lambda: self.open)
                self._wants = False
                self.waited_s += self._clock() - began
            self._working += not self._closed
            return not self._closed

    def spent(self, tower_s: float) -> None:
        with self._changed:
            self._working = max(0, self._working - 1)  # a batch that failed is paid for piece by piece
            self._batch_s = tower_s
            self._slack.spent(tower_s)
            self._changed.notify_all()

    def gave_up(self) -> None:
        with self._changed:
            self._working -= 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class InlineGate(StepWatcher):
    """Tower and engine take turns, as in a server whose vision tower is part of its engine's loop.

    While both have work, a step follows each batch and a batch each step.

    What such a server is compared with is told in docs/measuring.md; nobody is served better by it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stepping, self._batches, self._closed = False, 0, False
        self._step_waits = self._batch_waits = False
        self._step_next = self._batch_next = False
        """Whose turn it is, of those that wait: who was here last may be quicker to come again."""
        self.waits = 0
        """How often a batch had to wait for a step."""
        self.waited_s = 0.0

    # -- the engine's thread -------------------------------------------------------------------------------------

    def step_began(self) -> None:
        """Blocks while a batch is at work, or has its turn."""
        with self._changed:
            self._step_waits = True
            self._changed.wait_for(lambda: self._closed or not (self._batches or self._batch_next))
            self._step_waits = self._step_next = False
            self._stepping = True

    def step_ended(self, decodes: int) -> None:
        with self._changed:
            self._stepping, self._batch_next = False, self._batch_waits
            self._changed.notify_all()

    # -- the tower's thread --------------------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        return self._closed or not (self._stepping or self._batches or self._step_next)

    def wait(self, patience_s: Callable[[], float] = endless, *, block: bool = True) -> bool:
        with self._changed:
            if not (block or self.open):
                return False
            self._batch_waits = True
            if not self.open:
                began = time.monotonic()
                self.waits += 1
                self._changed.wait_for(lambda: self.open)
                self.waited_s += time.monotonic() - began
            self._batch_waits = self._batch_next = False
            self._batches += not self._closed
            return not self._closed

    def spent(self, tower_s: float) -> None:
        with self._changed:
            self._batches = max(0, self._batches - 1)  # a batch that failed is paid for piece by piece
            self._step_next = self._step_waits and not self._batches
            self._changed.notify_all()

    def gave_up(self) -> None:
        self.spent(0.0)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
