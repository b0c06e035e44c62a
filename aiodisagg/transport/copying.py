"""Copies on threads: bounded in number, fair among each other, and stopped between two pieces.

A large copy is cut into pieces. All threads work on it while it is alone, which is faster than one memcpy; beside
others it takes turns, so a small write waits for one piece of each and never for all of a huge one. numpy's copy
releases the GIL. Nothing here starts a copy on the loop's thread; the transports do that themselves for writes that
take less time than a hand-over (:data:`INLINE_BYTES`).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np

from aiodisagg.transport.base import Slice

P = TypeVar("P")

INLINE_BYTES = 256 << 10
"""Up to here a write is copied on the loop's thread: 25 us at memory speed, less than waking a thread."""
PIECE_BYTES = 1 << 20
"""One piece of a large copy, about 0.2 ms: how long a stop, a revoke or a small neighbour waits at most. Four times as
much is no faster. Copying such a neighbour on the loop's thread was rejected: eight at once would hold it for 1 ms."""


def copy_into(target: memoryview, source: memoryview) -> None:
    """One copy without the GIL. Both are contiguous bytes of the same size."""
    if source.nbytes:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def pieces_of(slices: Iterable[Slice], piece_bytes: int = PIECE_BYTES) -> Iterator[Slice]:
    """The same bytes to the same places, no slice larger than ``piece_bytes``; empty slices vanish."""
    for one in slices:
        for start in range(0, one.source.nbytes, piece_bytes):
            yield Slice(one.source[start : start + piece_bytes], one.offset + start, one.lease)


class Copying(Generic[P]):
    """One copy under way. ``done`` ends once no thread will touch its memory again, and never before.

    Several threads may place pieces of it at the same time, in any order.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pieces: Iterator[P], place: Callable[[P], None], leases: frozenset[int]
    ) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.done.add_done_callback(lambda done: done.exception())  # a stopped copy may have nobody left to ask
        self.leases = leases
        self._loop = loop
        self._lock = threading.Lock()
        self._pieces, self._place = pieces, place
        self._ahead = next(pieces, None)
        self._busy = 0
        self._ended = False
        self._error: Exception | None = None

    def stop(self, error: Exception) -> None:
        """No further piece is started; ``done`` gets ``error``, once the pieces that threads work on are placed."""
        with self._lock:
            self._error = self._error or error

    def step(self) -> bool:
        """On a thread: one piece. True if there is more to do."""
        with self._lock:
            piece = None if self._error is not None else self._ahead
            if piece is None:
                return self._more()
            self._ahead = next(self._pieces, None)
            self._busy += 1
        failure: Exception | None = None
        try:
            self._place(piece)
        except Exception as error:
            failure = error
        del piece
        with self._lock:
            self._busy -= 1
            self._error = self._error or failure
            return self._more()

    def _more(self) -> bool:
        if self._error is None and self._ahead is not None:
            return True
        if not self._busy and not self._ended:
            self._ended = True
            self._pieces, self._ahead = iter(()), None  # what is ended refers to no source
            self._loop.call_soon_threadsafe(self._finish, self._error)
        return False

    def _finish(self, error: Exception | None) -> None:
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class CopyThreads:
    """``count`` threads that start with the first large copy and end with ``aclose``.

    The queue has no bound of its own: it holds at most ``count`` entries per unfinished write, and those are the
    callers'. The threads are daemons: a program that forgets ``aclose`` still exits.
    """

    def __init__(self, name: str, count: int = 2) -> None:
        self._name, self._count = name, count
        self._queue: SimpleQueue[Copying[Any] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._running: set[Copying[Any]] = set()

    def start(self, pieces: Iterator[P], place: Callable[[P], None], leases: Iterable[int] = ()) -> Copying[P]:
        """Places every piece, on all threads that are free. Called on the loop's thread."""
        if not self._threads:
            for index in range(self._count):
                thread = threading.Thread(target=self._work, name=f"aiodisagg-{self._name}-{index}", daemon=True)
                self._threads.append(thread)
                thread.start()
        copying = Copying(asyncio.get_running_loop(), pieces, place, frozenset(leases))
        self._running.add(copying)
        copying.done.add_done_callback(lambda _: self._running.discard(copying))
        for _ in range(self._count):
            self._queue.put(copying)  # a turn for each thread; turns that come after the end are nothing
        return copying

    def _work(self) -> None:
        while (copying := self._queue.get()) is not None:
            more = True
            while more:
                more = copying.step()
                os.sched_yield()  # else the loop, whom the end of a small one woke, waits for a time slice of 3 ms
                if more and not self._queue.empty():
                    self._queue.put(copying)
                    break
            del copying

    async def aclose(self, error: Exception) -> None:
        """Stops what runs, with ``error``, and ends the threads. Idempotent."""
        for copying in self._running:
            copying.stop(error)
        await settle(self._running)
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()  # idle by now: this takes one switch of threads
        self._threads.clear()


async def settle(copies: Iterable[Copying[Any]]) -> None:
    """Returns when all of them are done, however they end."""
    if waiting := {copying.done for copying in copies if not copying.done.done()}:
        await asyncio.wait(waiting)


async def result_of(copying: Copying[Any], stopped: Exception) -> None:
    """Waits for a copy; if this wait is cancelled, the copy is stopped and goes on for at most one piece."""
    try:
        await asyncio.shield(copying.done)
    except asyncio.CancelledError:
        copying.stop(stopped)
        raise
