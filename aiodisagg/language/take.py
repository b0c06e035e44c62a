"""Carries out Take: checks a chunk's bytes where they landed and copies them to the request, off the loop if large."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import xxhash

from aiodisagg.protocol.events import RowsRefused, RowsTaken, Take
from aiodisagg.transport.arena import Arena

logger = logging.getLogger(__name__)

INLINE_BYTES = 64 * 1024
"""Less than this is checked and copied in tens of microseconds and stays on the loop."""


class Taker:
    """An async context manager; leaving it waits for the copies in progress.

    Args:
        deliver: ``deliver(take, data)`` copies the chunk's bytes to where they belong; called on any thread.
        tell: gets RowsTaken or RowsRefused, on the loop.
        checksum: compare xxh3-64; if off, chunks are taken as they are.
    """

    def __init__(
        self,
        arena: Arena,
        deliver: Callable[[Take, memoryview], None],
        tell: Callable[[RowsTaken | RowsRefused], None],
        *,
        checksum: bool,
        threads: int = 2,
    ) -> None:
        self._arena, self._deliver, self._tell, self._checksum = arena, deliver, tell, checksum
        self._pool = ThreadPoolExecutor(threads, "aiodisagg-take")
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> Taker:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._pool.shutdown)

    def take(self, action: Take) -> None:
        """Ends in RowsTaken or RowsRefused."""
        if action.size_bytes <= INLINE_BYTES:
            self._tell(self._work(action))
            return
        future = self._loop.run_in_executor(self._pool, self._work, action)
        future.add_done_callback(lambda done: self._tell(done.result()))

    def _work(self, action: Take) -> RowsTaken | RowsRefused:
        """Never raises: whatever is wrong with the bytes, the block must be given back."""
        with self._arena.view[action.offset : action.offset + action.size_bytes] as data:
            if self._checksum and xxhash.xxh3_64_intdigest(data) != action.chunk.checksum:
                logger.error("item %s: wrong checksum of rows %d-%d", action.key, action.chunk.start, action.chunk.stop)
                return RowsRefused(action.key, action.chunk)
            try:
                self._deliver(action, data)
            except Exception:
                logger.exception("item %s: rows could not be delivered", action.key)
                return RowsRefused(action.key, action.chunk)
        return RowsTaken(action.key, action.chunk)
