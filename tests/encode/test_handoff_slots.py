"""Staging buffers are shared fairly: receivers that take nothing cannot stop those that do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from aiodisagg.device.copies import Accelerator, DeviceBytes
from aiodisagg.encode.handoff import STAGED_PER_PLANE, STAGED_WRITES, HandOff
from aiodisagg.errors import TransportClosed
from aiodisagg.link.hello import Hello, PeerRole
from aiodisagg.peer.planes import Plane
from aiodisagg.transport.base import Remote, Slice
from aiodisagg.transport.memory import MemoryTransport
from tests.device.fake_cuda import FakeCuda

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
PATIENCE_S = 30.0
MOST_STUCK = STAGED_WRITES // STAGED_PER_PLANE - 1
ROWS_BYTES = 64


class Peer(Remote):
    def __init__(self, name: str) -> None:
        self.peer, self.size_bytes = name, 1 << 16


class Network(MemoryTransport):
    """Writes to a peer in ``stuck`` never end; its fences end with ``fenced``. ``begun``: to whom writes were begun."""

    def __init__(self) -> None:
        super().__init__()
        self.stuck: set[str] = set()
        self.begun: asyncio.Queue[str] = asyncio.Queue()
        self.fenced = asyncio.Event()

    async def write(self, remote: Remote, slices: Sequence[Slice]) -> None:
        self.begun.put_nowait(remote.peer)
        if remote.peer in self.stuck:
            await asyncio.get_running_loop().create_future()

    async def fence(self, remote: Remote) -> None:
        if remote.peer in self.stuck:
            await self.fenced.wait()


@pytest.fixture
def rows() -> Iterator[tuple[Accelerator, DeviceBytes]]:
    cuda = FakeCuda()
    address = cuda.malloc(ROWS_BYTES)
    made = Accelerator(cuda, 0)
    yield made, DeviceBytes(address, ROWS_BYTES)
    made.close()
    assert not cuda.wrong and not cuda.registered


class Receivers:
    def __init__(self, handoff: HandOff, rows: DeviceBytes) -> None:
        self.network, self.handoff, self._rows = Network(), handoff, rows
        self.planes: list[Plane] = []
        self.writes: list[asyncio.Task[Any]] = []

    def attach(self, name: str) -> Plane:
        plane = Plane(self.network, Peer(name))
        self.handoff.attach(plane, Hello(name=name, incarnation=name, role=PeerRole.LANGUAGE))
        self.planes.append(plane)
        return plane

    def write(self, plane: Plane) -> asyncio.Task[Any]:
        task = asyncio.create_task(self.handoff.write(plane, self._rows, 0, 1))
        self.writes.append(task)
        return task

    async def stuck(self, name: str, writes: int) -> Plane:
        """A receiver that takes nothing, and that many writes to it; returns when as many as ever will are begun."""
        self.network.stuck.add(name)
        plane = self.attach(name)
        for _ in range(writes):
            self.write(plane)
        for _ in range(min(writes, STAGED_PER_PLANE)):
            assert await self.network.begun.get() == name
        return plane


@asynccontextmanager
async def receivers(rows: tuple[Accelerator, DeviceBytes]) -> AsyncIterator[Receivers]:
    made = Receivers(HandOff(rows[0], checksum=False), rows[1])
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield made
    finally:
        made.network.fenced.set()
        for write in made.writes:
            write.cancel()
        await asyncio.gather(*made.writes, return_exceptions=True)
        for plane in made.planes:
            await made.handoff.detach(plane)
        await made.handoff.aclose()


@pytest.mark.parametrize("count", [1, MOST_STUCK])
async def test_receivers_that_take_nothing_do_not_stop_another(
    rows: tuple[Accelerator, DeviceBytes], count: int
) -> None:
    """One black-holed receiver held all staging buffers of a process, and no other got a row."""
    async with receivers(rows) as made:
        for number in range(count):
            await made.stuck(f"stuck {number}", STAGED_WRITES)
        well = made.attach("well")
        for _ in range(STAGED_WRITES):
            assert await made.write(well) == (0, False)


async def test_a_buffer_that_is_not_fenced_counts(rows: tuple[Accelerator, DeviceBytes]) -> None:
    """Cancelled writes gave their slots back at once, and each next one took a buffer more."""
    async with receivers(rows) as made:
        plane = await made.stuck("stuck", STAGED_PER_PLANE)
        for write in made.writes:
            write.cancel()
        await asyncio.wait(made.writes)
        made.write(plane)
        well = made.attach("well")
        for _ in range(3):
            await made.write(well)
        begun = [made.network.begun.get_nowait() for _ in range(made.network.begun.qsize())]
        assert begun == ["well"] * 3, "a write to the other waits for its fence"
        made.network.fenced.set()
        assert await made.network.begun.get() == "stuck"


async def test_no_write_is_begun_by_a_plane_that_is_let_go(rows: tuple[Accelerator, DeviceBytes]) -> None:
    async with receivers(rows) as made:
        plane = await made.stuck("stuck", STAGED_PER_PLANE + 1)
        waiting = made.writes[-1]
        await made.handoff.detach(plane)
        for write in made.writes[:STAGED_PER_PLANE]:
            write.cancel()
        made.network.fenced.set()
        with pytest.raises(TransportClosed, match="replaced"):
            await waiting
        assert made.network.begun.empty()
