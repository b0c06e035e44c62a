"""One receiver as the encode peer sees it: its link, its data plane, and the writes under way to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from functools import partial

import xxhash

from aiodisagg.device.copies import DeviceBytes
from aiodisagg.encode.handoff import HandOff
from aiodisagg.errors import AiodisaggError, TransportError, TransportUnavailable, WriteRefused
from aiodisagg.link.link import Link
from aiodisagg.peer.driver import Tasks
from aiodisagg.peer.planes import Plane, Planes
from aiodisagg.protocol.events import ChunkWritten, Write, WriteFailed, WritesFenced
from aiodisagg.protocol.messages import Chunk, ItemKey
from aiodisagg.transport.base import Slice

logger = logging.getLogger(__name__)

INLINE_BYTES = 256 * 1024
"""Hashing less than this takes tens of microseconds and stays on the loop."""

MOST_WARNINGS = 8
"""So many different errors of writes to one peer are warned of until one succeeds; the rest is for debugging."""

FORGET_S = 60.0
"""So long is a data plane avoided after it did not connect, or a write by it failed; then it is tried again."""

WriterEvent = ChunkWritten | WriteFailed | WritesFenced


async def checksum_of(data: memoryview) -> int:
    """xxh3-64 of many bytes, on a thread (the library lets go of the GIL)."""
    return await asyncio.to_thread(xxhash.xxh3_64_intdigest, data)


class Session:
    """Carries out Write and Fence for one link. Everything it started is over when ``aclose`` returned.

    The data plane is connected by the first write and replaced after a write failed while the link lived: the next
    write uses the best plane that has not failed in the last ``FORGET_S``. When that time has passed after the choice,
    a write has better ones tried again in the background, also those that did not connect, and later writes use the
    one that does. A plane that was replaced gets no new write; it is fenced and disconnected in the background.

    Args:
        checksum: hash what is sent, if the receiver does not say whether it checks.
        handoff: for rows that lie in an accelerator's memory; None: they all lie in the host's.
    """

    def __init__(
        self, link: Link, planes: Planes, tell: Callable[[WriterEvent], None], *, checksum: bool,
        handoff: HandOff | None = None,
    ) -> None:  # fmt: skip
        self._handoff = handoff
        self.link, self.peer = link, link.remote.incarnation
        self.plane_name = ""
        self._planes, self._tell, self._checksum = planes, tell, link.remote.checks(checksum)
        if self._checksum != checksum:
            said = "checks" if self._checksum else "does not check"
            logger.info("%s %s rows, and has its way: checksum=%s here", link.remote.name, said, checksum)
        self._plane: Plane | None = None
        self._failed: dict[str, float] = {}
        """When it did not connect or a write by it failed, by plane; one that was connected since then is not here."""
        self._chose_at = 0.0
        self._connecting: asyncio.Task[None] | None = None
        self._writes: dict[ItemKey, asyncio.Task[Chunk]] = {}
        self._used: dict[ItemKey, Plane] = {}
        self._tasks = Tasks(f"session {link.remote.name}")
        self._warned: set[str] = set()
        """Errors of writes that were logged since one succeeded: every item, and every attempt, meets the same ones."""

    async def connect(self) -> Plane:
        """The data plane in use, connected if there is none. Raises TransportUnavailable.

        An attempt outlives whoever waits for it: where packets vanish it takes longer than a receiver's patience, and
        one that ended with its write would never tell why.
        """
        while self._plane is None:  # again, if the new one failed before this write's turn
            await asyncio.shield(self._choose())
        if self._failed and asyncio.get_running_loop().time() - self._chose_at >= FORGET_S:
            self._choose()
        return self._plane

    def _choose(self) -> asyncio.Task[None]:
        """The attempt to connect that is under way; begins one if there is none."""
        if self._connecting is None or self._connecting.done():
            name = f"connect to {self.link.remote.name}"
            self._connecting = asyncio.get_running_loop().create_task(self._connect(), name=name)
            self._connecting.add_done_callback(lambda done: done.cancelled() or done.exception())  # or nobody does
        return self._connecting

    async def _connect(self) -> None:
        """Connects the best plane; if there is one already, only a better one, and none is no error then."""
        link, stand_in = self.link, self._plane
        self._chose_at = now = asyncio.get_running_loop().time()
        avoid = frozenset(name for name, failed_at in self._failed.items() if now - failed_at < FORGET_S)
        better_than = self.plane_name if stand_in is not None else ""
        try:
            name, plane, failed = await self._planes.connect(
                link.local, link.remote, avoid, better_than, far_host=link.far_host
            )  # fmt: skip
        except TransportUnavailable as error:
            if stand_in is None:
                raise
            logger.debug("%s stays the data plane to %s: %s", better_than, link.remote.name, error)
            return
        self._failed.pop(name, None)
        self._failed |= dict.fromkeys(failed, now)
        replaced, self._plane, self.plane_name = self._plane, plane, name
        if self._handoff is not None:
            self._handoff.attach(plane, link.remote)
        if replaced is not None:
            under_way = [task for key, task in self._writes.items() if self._used.get(key) is replaced]
            self._tasks.start(self._let_go(replaced, under_way), f"let go of {better_than}")

    async def _let_go(self, plane: Plane, writes: Collection[asyncio.Task[Chunk]] = ()) -> None:
        """Waits for these writes, fences the plane and disconnects it."""
        if writes:
            await asyncio.wait(writes)
        if self._handoff is not None:
            await self._handoff.detach(plane)
        await plane.transport.disconnect(plane.remote)

    def write(self, action: Write, data: memoryview | DeviceBytes) -> None:
        """Starts the write; ends in ChunkWritten or WriteFailed."""
        task = asyncio.get_running_loop().create_task(self._write(action, data), name=f"write {action.key}")
        self._writes[action.key] = task
        # A callback, not the task's own code, reports the end: a task cancelled before it began runs no code.
        task.add_done_callback(partial(self._written, action))

    async def _write(self, action: Write, data: memoryview | DeviceBytes) -> Chunk:
        plane = self._used[action.key] = await self.connect()
        try:
            checksum, on_device = await self._move(plane, action, data)
        except WriteRefused:  # a lease was taken back meanwhile; the plane is as good as before
            raise
        except TransportError:
            if plane is self._plane:
                self._failed[self.plane_name] = asyncio.get_running_loop().time()
                self._plane = None
                self._tasks.start(self._let_go(plane), f"let go of {self.plane_name}")
            raise
        return Chunk(action.lease, action.start, action.stop, checksum, on_device)

    async def _move(self, plane: Plane, action: Write, data: memoryview | DeviceBytes) -> tuple[int, bool]:
        if isinstance(data, DeviceBytes):
            assert self._handoff is not None
            return await self._handoff.write(plane, data, action.offset, action.lease)
        writing = plane.transport.write(plane.remote, [Slice(data, action.offset, action.lease)])
        if not self._checksum:
            await writing
            return 0, False
        if data.nbytes < INLINE_BYTES:  # two tasks cost more than hashing it
            await writing
            return xxhash.xxh3_64_intdigest(data), False
        checksum, _ = await asyncio.gather(checksum_of(data), writing)
        return checksum, False

    def _written(self, action: Write, task: asyncio.Task[Chunk]) -> None:
        del self._writes[action.key]
        if task.cancelled():
            self._tell(WriteFailed(self.peer, action.key, action.epoch, "stopped"))
        elif (error := task.exception()) is not None:
            self._log(action, error)
            self._tell(WriteFailed(self.peer, action.key, action.epoch, str(error)))
        else:
            self._used.pop(action.key, None)
            self._warned.clear()
            self._tell(ChunkWritten(self.peer, action.key, action.epoch, task.result()))

    def _log(self, action: Write, error: BaseException) -> None:
        said, level = str(error), logging.DEBUG
        if said not in self._warned and len(self._warned) < MOST_WARNINGS:
            self._warned.add(said)
            level = logging.WARNING
        expected = isinstance(error, AiodisaggError)
        text, rows = "item %s: writing rows %d-%d to %s: %s", (action.start, action.stop)
        logger.log(level, text, action.key, *rows, self.link.remote.name, said, exc_info=None if expected else error)

    def fence(self, key: ItemKey) -> None:
        """Ends the item's write and fences it; ends in WritesFenced."""
        self._tasks.start(self._fence(key), f"fence {key}")

    async def _fence(self, key: ItemKey) -> None:
        write = self._writes.get(key)
        if write is not None:
            write.cancel()
            await asyncio.wait([write])
        plane = self._used.get(key)
        if plane is not None:
            await plane.transport.fence(plane.remote)
        self._used.pop(key, None)
        self._tell(WritesFenced(self.peer, key))

    async def aclose(self) -> None:
        """Ends every write, lets go of the peer's pool (which fences it), and lets the fences report. Planes that were
        replaced are waited for."""
        writes = list(self._writes.values())
        for write in writes:
            write.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._plane is not None:
            await self._let_go(self._plane)
        if writes:
            await asyncio.wait(writes)
        await self._tasks.join()
