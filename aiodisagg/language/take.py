"""Carries out Take: checks a chunk's bytes where they landed and copies them to the request, off the loop if large."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import xxhash

from aiodisagg.device.copies import DeviceBytes
from aiodisagg.language.memory import RowMemory
from aiodisagg.protocol.events import RowsRefused, RowsTaken, Take

logger = logging.getLogger(__name__)

INLINE_BYTES = 64 * 1024
"""Less than this is checked and copied in tens of microseconds and stays on the loop."""


class Taker:
    """An async context manager; leaving it waits for the copies in progress.

    Args:
        memory: where the chunks landed.
        deliver: ``deliver(take, data)`` copies the chunk's bytes to where they belong; called on any thread.
        tell: gets RowsTaken or RowsRefused, on the loop.
        checksum: compare xxh3-64; if off, chunks are taken as they are.
    """

    def __init__(
        self,
        memory: RowMemory,
        deliver: Callable[[Take, memoryview | DeviceBytes], None],
        tell: Callable[[RowsTaken | RowsRefused], None],
        *,
        checksum: bool,
        threads: int = 2,
    ) -> None:
        self._memory, self._deliver, self._tell, self._checksum = memory, deliver, tell, checksum
        self._inline_bytes = INLINE_BYTES if memory.accelerator is None else 0  # a device is waited for, on a thread
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
        if action.size_bytes <= self._inline_bytes:
            self._tell(self._work(action))
            return
        future = self._loop.run_in_executor(self._pool, self._work, action)
        future.add_done_callback(lambda done: self._tell(done.result()))

    def _work(self, action: Take) -> RowsTaken | RowsRefused:
        """Never raises: whatever is wrong with the bytes, the block must be given back."""
        key, chunk = action.key, action.chunk
        try:
            if chunk.on_device:
                self._deliver(action, self._memory.on_device(action.offset, action.size_bytes))
                return RowsTaken(key, chunk)
            with self._memory.arena.view[action.offset : action.offset + action.size_bytes] as data:
                if self._checksum and xxhash.xxh3_64_intdigest(data) != chunk.checksum:
                    what = "wrong checksum" if chunk.checksum else "no checksum (switched off there, not here)"
                    logger.error("item %s: %s of rows %d-%d", key, what, chunk.start, chunk.stop)
                    return RowsRefused(key, chunk)
                self._deliver(action, data)
        except Exception as error:
            logger.exception("item %s: rows could not be delivered", key)
            return RowsRefused(key, chunk, repr(error))
        return RowsTaken(key, chunk)
