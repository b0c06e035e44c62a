"""One write on its way through an engine, and the peer's lane that it goes by.

A write is cut into pieces, and a piece belongs to the engine from its submit until its end, whatever became of its
write. So a job ends three times:

* its **outcome** is what the caller is told: done, failed, cancelled, the peer is gone;
* its sources are **free** when no piece is read from them any more. Between the two their memory is *leased*;
* its **end** is when no byte of it can land any more.

For a piece that *failed* over TCP the last two lie apart. The engine has closed that connection and reads the source no
more; but what it had handed to the kernel, megabytes on either side if the receiver is stopped or cut off, is still on
its way to the destination. No engine and no kernel tells when that is over, so the end waits for the quarantine, and
the job counts as *late*: the receiver must wait, too, by its own clock. A receiver that was stopped meanwhile reads our
word first and the bytes after it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from aiodisagg.errors import TransportError
from aiodisagg.transport.base import Slice


class Lane:
    """One peer: where its pool is, and the writes that have pieces to submit. Owned by the pump's thread."""

    def __init__(self, peer: str, segment: str, address: int) -> None:
        self.peer, self.segment, self.address = peer, segment, address
        self.jobs: deque[Job] = deque()
        self.under_way = self.large = self.staged = 0
        """Pieces that occupy it; of them, large ones; of them, ones that hold a staging slot."""


class Job:
    """``outcome``, ``free`` and ``end`` are futures of the loop; see the module's text.

    Args:
        lands_for_s: so long may bytes of a failed piece still land; None: they cannot.
    """

    def __init__(self, lane: Lane, slices: Sequence[Slice], chunk_bytes: int, lands_for_s: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.lane = lane
        self.leases = frozenset(one.lease for one in slices)
        self.outcome: asyncio.Future[None] = loop.create_future()
        self.outcome.add_done_callback(lambda done: done.exception())  # a cancelled writer asks for no result
        self.free: asyncio.Future[None] = loop.create_future()
        self.end: asyncio.Future[None] = loop.create_future()
        self.error: TransportError | None = None
        self.failed = False
        """A piece did. Set by the pump's thread before it says that the job is over."""
        self.under_way = self.large = 0
        self.in_place = 0
        """Pieces under way that the engine reads from the caller's memory."""
        self.pieces: deque[tuple[int, int, int]] = deque()
        self._loop, self._lands_for_s = loop, lands_for_s
        self._quarantine: asyncio.TimerHandle | None = None
        self._sources: list[np.ndarray[Any, Any]] = []  # they only hold the buffers in place
        for one in slices:
            if one.source.nbytes:
                array = np.frombuffer(one.source, np.uint8)
                self._sources.append(array)
                base = array.ctypes.data
                for start in range(0, array.nbytes, chunk_bytes):
                    size = min(chunk_bytes, array.nbytes - start)
                    self.pieces.append((base + start, lane.address + one.offset + start, size))

    def fail(self, error: TransportError) -> None:
        """On the loop's thread: tells the caller now; the pieces under way go on to their end."""
        if not self.outcome.done():
            self.outcome.set_exception(error)

    def tell(self, what: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed under us: nobody waits any more
            self._loop.call_soon_threadsafe(what)

    def freed(self) -> None:
        self._sources.clear()
        if not self.free.done():
            self.free.set_result(None)

    @property
    def late(self) -> bool:
        """What it has sent may still land; see the module's text. True for good."""
        return self.failed and self._lands_for_s is not None

    def over(self) -> None:
        """The engine holds no piece of it any more. Idempotent."""
        self.freed()
        if not self.outcome.done():
            if self.error is None:
                self.outcome.set_result(None)
            else:
                self.outcome.set_exception(self.error)
        if not self.failed or self._lands_for_s is None:
            self.ended()
        elif self._quarantine is None:
            self._quarantine = self._loop.call_later(self._lands_for_s, self.ended)

    def ended(self) -> None:
        """Idempotent."""
        if self._quarantine is not None:
            self._quarantine.cancel()
        if not self.end.done():
            self.end.set_result(None)
