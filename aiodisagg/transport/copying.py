"""Copies on threads: bounded in number, fair among each other, and stopped between two pieces.

A large copy is cut into pieces and every piece goes back to the end of the queue, so a small write beside a huge one
waits for one piece per thread and not for all of it. numpy's copy releases the GIL. Nothing here starts a copy on the
loop's thread; the transports do that themselves for writes that take less time than a hand-over (:data:`INLINE_BYTES`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator
from queue import SimpleQueue

import numpy as np

from aiodisagg.transport.base import Slice

INLINE_BYTES = 256 << 10
"""Up to here a write is copied on the loop's thread: 25 us at memory speed, less than waking a thread."""
PIECE_BYTES = 4 << 20
"""One piece of a large copy, about 0.4 ms: how long a stop, a revoke or a small neighbour waits at most."""


def copy_into(target: memoryview, source: memoryview) -> None:
    """One copy without the GIL. Both are contiguous bytes of the same size."""
    if source.nbytes:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def pieces_of(slices: Iterable[Slice], piece_bytes: int = PIECE_BYTES) -> Iterator[Slice]:
    """The same bytes to the same places, no slice larger than ``piece_bytes``; empty slices vanish."""
    for one in slices:
        for start in range(0, one.source.nbytes, piece_bytes):
            yield Slice(one.source[start : start + piece_bytes], one.offset + start, one.lease)


class Copying:
    """One copy under way. ``done`` ends once no thread will touch its memory again, and never before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, steps: Iterator[None], leases: frozenset[int]) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.done.add_done_callback(lambda done: done.exception())  # a stopped copy may have nobody left to ask
        self.leases = leases
        self._loop = loop
        self._steps = steps
        self._stopped_by: Exception | None = None

    def stop(self, error: Exception) -> None:
        """No further piece is started; ``done`` gets ``error`` unless the last piece is already being copied."""
        self._stopped_by = self._stopped_by or error

    def step(self) -> bool:
        """On a thread: one piece. True if there is more to do."""
        error = self._stopped_by
        if error is None:
            try:
                next(self._steps)
                return True
            except StopIteration:
                pass
            except Exception as failure:
                error = failure
        del self._steps
        self._loop.call_soon_threadsafe(self._finish, error)
        return False

    def _finish(self, error: Exception | None) -> None:
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class CopyThreads:
    """``count`` threads that start with the first large copy and end with ``aclose``.

    The queue has no bound of its own: it holds one entry per unfinished write, and those are the callers'.
    The threads are daemons: a program that forgets ``aclose`` still exits.
    """

    def __init__(self, name: str, count: int = 2) -> None:
        self._name, self._count = name, count
        self._queue: SimpleQueue[Copying | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._running: set[Copying] = set()

    def start(self, steps: Iterator[None], leases: Iterable[int] = ()) -> Copying:
        """Runs ``steps`` to its end on the threads, one step at a time. Called on the loop's thread."""
        if not self._threads:
            for index in range(self._count):
                thread = threading.Thread(target=self._work, name=f"aiodisagg-{self._name}-{index}", daemon=True)
                self._threads.append(thread)
                thread.start()
        copying = Copying(asyncio.get_running_loop(), steps, frozenset(leases))
        self._running.add(copying)
        copying.done.add_done_callback(lambda _: self._running.discard(copying))
        self._queue.put(copying)
        return copying

    def _work(self) -> None:
        while (copying := self._queue.get()) is not None:
            while copying.step():
                if not self._queue.empty():
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


async def settle(copies: Iterable[Copying]) -> None:
    """Returns when all of them are done, however they end."""
    if waiting := {copying.done for copying in copies if not copying.done.done()}:
        await asyncio.wait(waiting)


async def result_of(copying: Copying, stopped: Exception) -> None:
    """Waits for a copy; if this wait is cancelled, the copy is stopped and goes on for at most one piece."""
    try:
        await asyncio.shield(copying.done)
    except asyncio.CancelledError:
        copying.stop(stopped)
        raise
