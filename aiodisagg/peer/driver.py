"""Runs a pure machine on an event loop: events in, actions out, one timer. The only place that reads the clock."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)

E_in = TypeVar("E_in", contravariant=True)
A_out = TypeVar("A_out", covariant=True)
E = TypeVar("E")
A = TypeVar("A")


class Machine(Protocol[E_in, A_out]):
    """A pure core: ``Receiver`` or ``Sender``."""

    def handle(self, event: E_in, now: float) -> Sequence[A_out]: ...

    def next_timer(self) -> float | None: ...


class Driver(Generic[E, A]):
    """Feeds events one at a time, carries out their actions in order, and keeps one timer for ``next_timer``.

    ``feed`` may be called from within an action; the event waits its turn. Everything happens on the loop's thread.

    Args:
        act: carries out one action; must not block and must not raise.
        timer_event: made when the machine's timer is due.
    """

    def __init__(self, machine: Machine[E, A], act: Callable[[A], None], timer_event: Callable[[], E]) -> None:
        self._machine, self._act, self._timer_event = machine, act, timer_event
        self._loop = asyncio.get_running_loop()
        self._events: deque[E] = deque()
        self._busy = False
        self._timer: asyncio.Handle | None = None
        self._due = 0.0
        self._closed = False

    def feed(self, event: E) -> None:
        """Raises what the machine raises for this event (RemoteProtocolError, InvalidTransition), nothing of others."""
        if self._closed:
            return
        if self._busy:
            self._events.append(event)
            return
        self._busy = True
        try:
            self._handle(event)
        finally:
            while self._events:
                try:
                    self._handle(self._events.popleft())
                except Exception:
                    logger.exception("an event that followed from an action was refused")
            self._busy = False
            self._arm()

    def _handle(self, event: E) -> None:
        for action in self._machine.handle(event, self._loop.time()):
            try:
                self._act(action)
            except Exception:
                logger.exception("action %r failed", action)

    def _arm(self) -> None:
        due = self._machine.next_timer()
        if self._timer is not None:
            if due is not None and self._due <= due:  # it looks again when it fires
                return
            self._timer.cancel()
            self._timer = None
        if due is not None and not self._closed:
            # uvloop's handle of a time that has passed has no ``when``: the time is kept here.
            self._timer, self._due = self._loop.call_at(due, self._fire), due

    def _fire(self) -> None:
        self._timer = None
        due = self._machine.next_timer()
        if due is not None and due <= self._loop.time():
            self.feed(self._timer_event())
        else:
            self._arm()

    def close(self) -> None:
        """No event is taken any more. Idempotent."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Tasks:
    """Background tasks of a service: kept alive, logged if they fail, cancelled together."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """Runs a coroutine as a task; an error of it is logged, since nobody awaits it."""
        task = asyncio.get_running_loop().create_task(work, name=f"{self._owner}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)

    async def join(self) -> None:
        """Waits until all of them ended by themselves."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    async def aclose(self) -> None:
        """Cancels and awaits all of them."""
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
