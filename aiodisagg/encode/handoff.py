"""From an encode peer's accelerator into the receiver's blocks, by the shortest way that the data plane has.

| the plane to the receiver | the rows go |
|---|---|
| maps the pool, and the receiver has a device pool that can be opened | device to device, without the host |
| maps the pool | device to host, straight into the granted block; the mapping is pinned |
| anything else | device to a pinned staging buffer, which the transport sends |

In the first two a view of the block (``zero_copy``) is held until the copy's event has come: it is what keeps the
lease from being taken back, and ``fence`` from returning, while the device still writes. In the third the staging
buffer of a failed write waits for the fence before it is used again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import xxhash

from aiodisagg.device import pool as device_pool
from aiodisagg.device.copies import Accelerator, DeviceBytes, Pinned, address_of
from aiodisagg.device.pool import RemotePool
from aiodisagg.errors import DeviceError, TransportClosed, TransportError
from aiodisagg.link.hello import Hello
from aiodisagg.peer.driver import Tasks
from aiodisagg.peer.planes import Plane
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.base import Slice

logger = logging.getLogger(__name__)

COPY_THREADS = 4
"""While some wake up, commit or hash what they copied, the copies of others keep the device's copy engine busy."""
STAGED_WRITES = 16
"""Bounds the memory of staging buffers: a buffer is as large as the largest chunk that it held, and a chunk at most a
block. That is 16 MiB for 1024 rows of Qwen3-VL-30B-A3B, so 256 MiB."""
STAGED_PER_PLANE = 2
"""While one buffer is sent, the other is filled."""

T = TypeVar("T")


class _Mapped(Protocol):
    """What a ``zero_copy`` transport's remote is."""

    address: int
    size_bytes: int

    def view(self, offset: int, size_bytes: int, lease: int) -> memoryview: ...


@dataclass(frozen=True, slots=True)
class _Way:
    """How rows go to one connected plane; neither pinned nor twin: staged."""

    pinned: Pinned | None = None
    twin: RemotePool | None = None

    @property
    def name(self) -> str:
        return "device" if self.twin is not None else "pinned" if self.pinned is not None else "staged"


@dataclass(frozen=True, slots=True)
class _Attached:
    finding: asyncio.Task[_Way]
    checksum: bool
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(STAGED_PER_PLANE))
    copies: set[asyncio.Future[Any]] = field(default_factory=set)


class _Staging:
    """A pinned buffer."""

    def __init__(self, accelerator: Accelerator, size_bytes: int) -> None:
        self.arena = Arena(size_bytes)
        try:
            self.pinned = accelerator.pin(self.arena.address, self.arena.size_bytes)
        except DeviceError:
            self.arena.close()
            raise

    def close(self) -> None:
        self.pinned.close()
        self.arena.close()


class HandOff:
    """One for an encode peer; methods belong to the loop's thread. ``aclose`` after every plane was detached.

    At most ``STAGED_WRITES`` staging buffers are in use, and ``STAGED_PER_PLANE`` by one plane; further writes wait. A
    buffer is in use until its write succeeded or was fenced. So fewer than ``STAGED_WRITES // STAGED_PER_PLANE`` planes
    whose writes do not end, 7, never stop the others. The accelerator stays the caller's.
    """

    def __init__(self, accelerator: Accelerator, *, checksum: bool) -> None:
        self._accelerator, self._checksum = accelerator, checksum
        self._threads = ThreadPoolExecutor(COPY_THREADS, "aiodisagg-copy")
        self._planes: dict[int, _Attached] = {}
        self._slots = asyncio.Semaphore(STAGED_WRITES)
        self._idle: list[_Staging] = []
        self._unfenced: list[_Staging] = []
        self._tasks = Tasks("hand-off")

    def attach(self, plane: Plane, remote: Hello) -> None:
        """For a plane that was just connected: begins to find the best way; writes wait until it is found."""
        find = self._find(plane, remote)
        finding = asyncio.get_running_loop().create_task(find, name="find a way")
        self._planes[id(plane)] = _Attached(finding, remote.checks(self._checksum))

    async def _find(self, plane: Plane, remote: Hello) -> _Way:
        way = _Way()
        if plane.transport.capabilities.zero_copy:
            words = remote.transports.get(device_pool.NAME)
            way = await asyncio.to_thread(self._open, cast(_Mapped, plane.remote), words, remote.name)
        logger.info("rows go to %s by way of: %s", remote.name, way.name)
        return way

    def _open(self, mapped: _Mapped, words: bytes | None, name: str) -> _Way:
        if words is not None:
            try:
                return _Way(twin=RemotePool(self._accelerator, words, mapped.size_bytes))
            except DeviceError as error:
                logger.warning("the device pool of %s cannot be used: %s", name, error)
        try:
            return _Way(pinned=self._accelerator.pin(mapped.address, mapped.size_bytes))
        except DeviceError as error:
            logger.warning("the pool of %s cannot be pinned: %s", name, error)
            return _Way()

    async def write(self, plane: Plane, data: DeviceBytes, offset: int, lease: int) -> tuple[int, bool]:
        """Brings rows to ``offset`` of the peer's pool: their checksum (0 without), and whether they lie in its twin.

        Outcomes mean what they mean for ``Transport.write``. Raises its errors, and DeviceError.
        """
        attached = self._planes[id(plane)]
        way = await asyncio.shield(attached.finding)
        if way.name == "staged":
            async with AsyncExitStack() as slots:
                await slots.enter_async_context(attached.slots)  # first: who waits here holds nothing of the others'
                await slots.enter_async_context(self._slots)
                return await self._write_staged(plane, attached, slots, data, offset, lease), False
        self._check(plane, attached)
        view = cast(_Mapped, plane.remote).view(offset, data.size_bytes, lease)
        if way.twin is not None:
            copy = self._start(attached, self._to_device, view, data, way.twin.address + offset)
        else:
            copy = self._start(attached, self._to_host, view, data, attached.checksum)
        del view  # the copy's thread has it; an error that somebody keeps must not keep it too
        return _result(await asyncio.shield(copy)), way.twin is not None

    async def _write_staged(
        self, plane: Plane, attached: _Attached, slots: AsyncExitStack, data: DeviceBytes, offset: int, lease: int
    ) -> int:  # fmt: skip
        self._check(plane, attached)
        staging = self._start(attached, self._stage, data, attached.checksum)
        try:
            checksum, buffer = _result(await asyncio.shield(staging))
            self._check(plane, attached)
            view = buffer.arena.view[: data.size_bytes]
            await plane.transport.write(plane.remote, [Slice(view, offset, lease)])
        except BaseException:
            self._tasks.start(self._reclaim(plane, slots.pop_all(), staging), "staging buffer")
            raise
        self._idle.append(buffer)
        return checksum

    async def _reclaim(
        self, plane: Plane, slots: AsyncExitStack, staging: asyncio.Future[tuple[int, _Staging] | DeviceError]
    ) -> None:  # fmt: skip
        async with slots:
            staged = await staging
            if isinstance(staged, DeviceError):
                return
            try:
                await plane.transport.fence(plane.remote)
            except TransportError as error:
                logger.warning("a staging buffer is lost, it could not be fenced: %s", error)
                self._unfenced.append(staged[1])
            else:
                self._idle.append(staged[1])

    def _check(self, plane: Plane, attached: _Attached) -> None:
        """Before a copy and before a write begins. Raises TransportClosed."""
        if self._planes.get(id(plane)) is not attached:
            raise TransportClosed(plane.transport.name, "the plane was replaced", peer=plane.remote.peer)

    # -- copies --------------------------------------------------------------------------------------------------

    def _start(
        self, attached: _Attached, copy: Callable[..., T], *arguments: object
    ) -> asyncio.Future[T | DeviceError]:  # fmt: skip
        """A copy on a thread. It runs to its end even if nobody waits: a device does not stop half-way."""
        done = asyncio.wrap_future(self._threads.submit(_caught, copy, *arguments))
        attached.copies.add(done)
        done.add_done_callback(attached.copies.discard)
        return done

    def _to_host(self, view: memoryview, data: DeviceBytes, checksum: bool) -> int:
        self._accelerator.outward.copy(address_of(view), data.address, data.size_bytes)
        return xxhash.xxh3_64_intdigest(view) if checksum else 0

    def _to_device(self, lease_holder: memoryview, data: DeviceBytes, target: int) -> int:
        self._accelerator.outward.copy(target, data.address, data.size_bytes)
        return 0

    def _stage(self, data: DeviceBytes, checksum: bool) -> tuple[int, _Staging]:
        try:
            buffer = self._idle.pop()
        except IndexError:
            buffer = _Staging(self._accelerator, data.size_bytes)
        if buffer.arena.size_bytes < data.size_bytes:
            buffer.close()
            buffer = _Staging(self._accelerator, data.size_bytes)
        try:
            return self._to_host(buffer.arena.view[: data.size_bytes], data, checksum), buffer
        except DeviceError:
            buffer.close()
            raise

    # -- ends ----------------------------------------------------------------------------------------------------

    async def detach(self, plane: Plane) -> None:
        """Before the plane is disconnected: waits for its copies and lets go of its memory. Its writes that have not
        begun yet raise TransportClosed. Idempotent."""
        attached = self._planes.pop(id(plane), None)
        if attached is None:
            return
        way = await attached.finding
        if attached.copies:
            await asyncio.wait(attached.copies)
        for held in (way.pinned, way.twin):
            if held is not None:
                await asyncio.to_thread(held.close)

    async def aclose(self) -> None:
        await self._tasks.join()
        await asyncio.to_thread(self._threads.shutdown)
        while self._idle:
            await asyncio.to_thread(self._idle.pop().close)


def _caught(copy: Callable[..., T], *arguments: object) -> T | DeviceError:
    """Its error as a value: raised on the thread, its traceback would keep the view, and with it the lease."""
    try:
        return copy(*arguments)
    except DeviceError as error:
        return error.with_traceback(None)


def _result(outcome: T | DeviceError) -> T:
    if isinstance(outcome, DeviceError):
        raise outcome
    return outcome
