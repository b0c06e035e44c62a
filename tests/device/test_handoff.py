"""Rows of a device on their way into a block: nothing is told, fenced, reused or let go before the copy's event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import xxhash

from aiodisagg.device import pool as device_pool
from aiodisagg.device.copies import Accelerator, DeviceBytes
from aiodisagg.device.pool import NAME, DevicePool
from aiodisagg.encode.handoff import HandOff
from aiodisagg.errors import DeviceError, PeerGone, WriteFailed, WriteRefused
from aiodisagg.link.hello import Hello, PeerRole
from aiodisagg.peer.planes import Plane
from aiodisagg.transport.base import Remote, Slice
from aiodisagg.transport.ipc import IpcTransport
from aiodisagg.transport.memory import MemoryTransport
from aiodisagg.transport.testing import GUARD, Kit, Receiver
from tests.conftest import LOOPS
from tests.device.fake_cuda import FakeCuda

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True),
]
ROWS = bytes(range(200)) * 10


def on_device(cuda: FakeCuda, data: bytes = ROWS) -> DeviceBytes:
    address = cuda.malloc(len(data))
    cuda.allocated[address][:] = data
    return DeviceBytes(address, len(data))


@dataclass
class Way:
    receiver: Receiver
    plane: Plane
    handoff: HandOff
    writer: str


@asynccontextmanager
async def way(
    accelerator: Accelerator, kind: type[IpcTransport] | type[MemoryTransport] = IpcTransport, *,
    words: dict[str, bytes] | None = None, checksum: bool = True,
) -> AsyncIterator[Way]:  # fmt: skip
    """A hand-off attached to a receiver's pool of 64 KiB."""
    async with Kit(kind).pair(1 << 16) as (receiver, transport, remote, name):
        handoff, plane = HandOff(accelerator, checksum=checksum), Plane(transport, remote)
        handoff.attach(plane, Hello(name="r", incarnation=receiver.incarnation, role=PeerRole.LANGUAGE,
                                    transports=words or {}))  # fmt: skip
        try:
            yield Way(receiver, plane, handoff, name)
        finally:
            await handoff.detach(plane)
            await handoff.aclose()


async def turns(count: int = 50) -> None:
    """Lets the loop turn: words between two sockets of this process need two turns or three."""
    for _ in range(count):
        await asyncio.sleep(0)


async def waited(cuda: FakeCuda) -> None:
    assert await asyncio.to_thread(cuda.waiting.wait, 30)


async def test_rows_go_straight_into_the_block(accelerator: Accelerator, cuda: FakeCuda) -> None:
    rows = on_device(cuda)
    async with way(accelerator) as one:
        lease = one.receiver.lender.lend(512, rows.size_bytes)
        assert await one.handoff.write(one.plane, rows, 512, lease) == (xxhash.xxh3_64_intdigest(ROWS), False)
        assert bytes(one.receiver.arena.view[512 : 512 + len(ROWS)]) == ROWS
        assert one.receiver.arena.view[511] == one.receiver.arena.view[512 + len(ROWS)] == GUARD
        assert ("copy", "device", "pinned") in cuda.log
    assert cuda.names() == ["register", "copy", "record", "event", "unregister"]
    cuda.free(rows.address)


async def test_the_lease_is_held_until_the_event(accelerator: Accelerator, cuda: FakeCuda) -> None:
    rows = on_device(cuda)
    async with way(accelerator) as one:
        lease = one.receiver.lender.lend(0, rows.size_bytes)
        cuda.gate.clear()
        write = asyncio.create_task(one.handoff.write(one.plane, rows, 0, lease))
        await waited(cuda)
        revoke = asyncio.create_task(one.receiver.transport.revoke(one.writer, [lease]))
        fence = asyncio.create_task(one.plane.transport.fence(one.plane.remote))
        write.cancel()
        await asyncio.wait([write])
        assert write.cancelled()
        await turns()
        assert not revoke.done() and not fence.done(), "the device still writes there"
        cuda.gate.set()
        async with asyncio.timeout(30):
            await revoke
            await fence
        with pytest.raises(WriteRefused):
            await one.handoff.write(one.plane, rows, 0, lease)
    cuda.free(rows.address)


async def test_detaching_waits_for_the_copies_and_then_lets_go(accelerator: Accelerator, cuda: FakeCuda) -> None:
    rows = on_device(cuda)
    async with way(accelerator) as one:
        lease = one.receiver.lender.lend(0, rows.size_bytes)
        cuda.gate.clear()
        write = asyncio.create_task(one.handoff.write(one.plane, rows, 0, lease))
        await waited(cuda)
        write.cancel()
        detach = asyncio.create_task(one.handoff.detach(one.plane))
        await asyncio.wait([write])
        assert not detach.done() and "unregister" not in cuda.names()
        cuda.gate.set()
        await detach
        assert cuda.names()[-2:] == ["event", "unregister"]
    cuda.free(rows.address)


async def test_a_failed_copy_is_an_error_and_holds_no_lease(accelerator: Accelerator, cuda: FakeCuda) -> None:
    rows = on_device(cuda)
    async with way(accelerator) as one:
        lease = one.receiver.lender.lend(0, rows.size_bytes)
        cuda.fails = True
        with pytest.raises(DeviceError) as caught:
            await one.handoff.write(one.plane, rows, 0, lease)
        async with asyncio.timeout(30):  # while the error is still referred to
            await one.plane.transport.fence(one.plane.remote)
        assert "out of order" in str(caught.value)
    cuda.free(rows.address)


@pytest.mark.parametrize("kind", [IpcTransport, MemoryTransport])
async def test_a_copy_without_an_event_holds_the_lease_until_it_is_over(
    accelerator: Accelerator, cuda: FakeCuda, kind: type[IpcTransport] | type[MemoryTransport]
) -> None:
    """It was told as failed while the device still wrote into the block, which the fence then gave back; over other
    planes the staging buffer was unmapped under the copy."""
    rows = on_device(cuda)
    async with way(accelerator, kind) as one:
        lease = one.receiver.lender.lend(0, rows.size_bytes)
        cuda.record_fails = True
        cuda.gate.clear()
        write = asyncio.create_task(one.handoff.write(one.plane, rows, 0, lease))
        copied = asyncio.create_task(waited(cuda))
        await asyncio.wait([write, copied], return_when=asyncio.FIRST_COMPLETED)
        fence = asyncio.create_task(one.plane.transport.fence(one.plane.remote))
        await turns()
        assert not write.done() and "unregister" not in cuda.names()
        assert fence.done() is (kind is MemoryTransport), "the device still writes there"
        cuda.gate.set()
        with pytest.raises(DeviceError, match="no event to be had"):
            await write
        async with asyncio.timeout(30):
            await fence
            await copied
    cuda.free(rows.address)


@pytest.mark.parametrize("who", ["another process", "this process"])
async def test_with_a_device_pool_no_byte_passes_the_host(
    accelerator: Accelerator, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    rows, pool = on_device(cuda), DevicePool(accelerator, 1 << 16)
    if who == "another process":
        monkeypatch.setattr(device_pool, "_ours", {})
    async with way(accelerator, words={NAME: pool.description}) as one:
        lease = one.receiver.lender.lend(1024, rows.size_bytes)
        cuda.gate.clear()
        write = asyncio.create_task(one.handoff.write(one.plane, rows, 1024, lease))
        await waited(cuda)
        revoke = asyncio.create_task(one.receiver.transport.revoke(one.writer, [lease]))
        await turns()
        assert not revoke.done() and not write.done()
        cuda.gate.set()
        assert await write == (0, True)
        async with asyncio.timeout(30):
            await revoke
        landed = pool.at(1024, len(ROWS)).address - pool.at(0, 0).address
        assert cuda.allocated[pool.at(0, 0).address].raw[landed : landed + len(ROWS)] == ROWS
        assert set(one.receiver.arena.view[:4096]) == {GUARD}
        assert ("copy", "device", "device") in cuda.log
    assert "register" not in cuda.names() and (cuda.names()[-1] == "close") is (who == "another process")
    pool.close()
    cuda.free(rows.address)


@pytest.mark.parametrize("fault", ["cannot open", "another size", "nonsense"])
async def test_without_its_device_pool_a_receiver_gets_rows_by_the_host(
    accelerator: Accelerator, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    rows, pool = on_device(cuda), DevicePool(accelerator, 1 << 15 if fault == "another size" else 1 << 16)
    monkeypatch.setattr(device_pool, "_ours", {})  # seen from another process
    cuda.can_open = fault != "cannot open"
    async with way(accelerator, words={NAME: b"?" if fault == "nonsense" else pool.description}) as one:
        lease = one.receiver.lender.lend(0, rows.size_bytes)
        _, device = await one.handoff.write(one.plane, rows, 0, lease)
        assert not device and bytes(one.receiver.arena.view[: len(ROWS)]) == ROWS
    pool.close()
    cuda.free(rows.address)


async def test_other_planes_send_a_pinned_copy(accelerator: Accelerator, cuda: FakeCuda) -> None:
    small, rows, large = on_device(cuda, b"small"), on_device(cuda), on_device(cuda, bytes(40_000))
    async with way(accelerator, MemoryTransport) as one:
        for data in (small, rows, small, large, small):
            lease = one.receiver.lender.lend(64, data.size_bytes)
            checksum, device = await one.handoff.write(one.plane, data, 64, lease)
            sent = bytes(cuda.allocated[data.address].raw)
            assert bytes(one.receiver.arena.view[64 : 64 + len(sent)]) == sent
            assert (checksum, device) == (xxhash.xxh3_64_intdigest(sent), False)
        assert cuda.names().count("register") == 2, (
            "one buffer serves writes that follow each other, unless it is small"
        )
        assert len(cuda.registered) == 1, "which is given back then"
    for data in (small, rows, large):
        cuda.free(data.address)


class _Stuck(MemoryTransport):
    """Its writes fail, and may still read their source until ``fenced``."""

    def __init__(self) -> None:
        super().__init__()
        self.fenced = asyncio.Event()
        self.sources: list[memoryview] = []
        self.fails = True
        self.lost = False

    async def write(self, remote: Remote, slices: Sequence[Slice]) -> None:
        self.sources.append(slices[0].source)
        if self.fails:
            raise WriteFailed(self.name, "who knows", peer=remote.peer)

    async def fence(self, remote: Remote) -> None:
        await self.fenced.wait()
        if self.lost:
            raise PeerGone(self.name, "nobody knows what it reads", peer=remote.peer)


@pytest.mark.parametrize("lost", [False, True], ids=["fenced", "never fenced"])
async def test_the_source_of_a_failed_write_is_not_reused_before_the_fence(
    accelerator: Accelerator, cuda: FakeCuda, lost: bool
) -> None:
    first, second = on_device(cuda, b"first"), on_device(cuda, b"other")
    async with way(accelerator, _Stuck) as one:
        stuck = one.plane.transport
        assert isinstance(stuck, _Stuck)
        with pytest.raises(WriteFailed):
            await one.handoff.write(one.plane, first, 0, 1)
        stuck.fails, stuck.lost = False, lost
        await one.handoff.write(one.plane, second, 0, 2)
        assert [bytes(source) for source in stuck.sources] == [b"first", b"other"]
        stuck.fenced.set()
        await one.handoff._tasks.join()
        for _ in range(3):
            await one.handoff.write(one.plane, second, 0, 3)
        assert cuda.names().count("register") == 2
        assert not lost or bytes(stuck.sources[0]) == b"first", "it may be read for as long as this process lives"
        stuck.sources.clear()
        for buffer in one.handoff._unfenced:
            buffer.close()
    cuda.free(first.address)
    cuda.free(second.address)
