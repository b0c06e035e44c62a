"""The data plane of a session: which one it is after failures, and that those it had before are let go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aiodisagg.device.copies import DeviceBytes
from aiodisagg.encode.session import FORGET_S, Session, WriterEvent
from aiodisagg.errors import PeerGone, TransportClosed, WriteFailed
from aiodisagg.link import Hello, PeerRole
from aiodisagg.peer import planes as planes_module
from aiodisagg.peer.planes import Plane, Planes
from aiodisagg.protocol import events
from aiodisagg.protocol.events import ChunkWritten, Write, WritesFenced
from aiodisagg.protocol.messages import ItemKey
from aiodisagg.transport.base import Remote, Slice
from aiodisagg.transport.memory import MemoryTransport

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
PATIENCE_S = 30.0
NAMES = ("best", "middle", "worst")
ROW = memoryview(b"row")


class Peer(Remote):
    """``closed``: it was disconnected. ``ends``: one future per write that waits."""

    def __init__(self, plane: str, peer: str) -> None:
        self.plane, self.peer, self.size_bytes = plane, peer, 1 << 16
        self.closed = False
        self.ends: set[asyncio.Future[None]] = set()


class Network(MemoryTransport):
    """``writes``: the remotes of all writes. A write fails if ``fails``; else, if ``waits``, waits in its ``ends``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.plane = name
        self.fails = self.waits = self.down = False
        self.remotes: list[Peer] = []
        self.writes: asyncio.Queue[Peer] = asyncio.Queue()
        self.connects: asyncio.Queue[None] = asyncio.Queue()
        self.answers = asyncio.Event()
        self.answers.set()

    async def connect(self, description: bytes, *, peer: str) -> Any:
        self.connects.put_nowait(None)
        await self.answers.wait()
        if self.down:
            raise PeerGone(self.plane, "nobody answers", peer=peer)
        self.remotes.append(Peer(self.plane, peer))
        return self.remotes[-1]

    async def write(self, remote: Remote, slices: Sequence[Slice]) -> None:
        assert isinstance(remote, Peer)
        if remote.closed:
            raise TransportClosed(self.plane, "disconnected", peer=remote.peer)
        self.writes.put_nowait(remote)
        if self.fails:
            raise WriteFailed(self.plane, "reset", peer=remote.peer)
        if self.waits:
            end = asyncio.get_running_loop().create_future()
            remote.ends.add(end)
            await asyncio.shield(end)

    async def fence(self, remote: Remote) -> None:
        assert isinstance(remote, Peer)
        if remote.ends:
            await asyncio.wait(remote.ends)

    async def disconnect(self, remote: Remote) -> None:
        assert isinstance(remote, Peer)
        await self.fence(remote)
        remote.closed = True

    @property
    def connected(self) -> int:
        return sum(not remote.closed for remote in self.remotes)

    def end_writes(self) -> None:
        for remote in self.remotes:
            for end in remote.ends:
                if not end.done():
                    end.set_result(None)


class Staging:
    """A hand-off that begins a write when ``ready``."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.attached: list[Plane] = []

    def attach(self, plane: Plane, remote: Hello) -> None:
        self.attached.append(plane)

    async def write(self, plane: Plane, data: DeviceBytes, offset: int, lease: int) -> tuple[int, bool]:
        await self.ready.wait()
        assert plane in self.attached
        await plane.transport.write(plane.remote, [Slice(ROW, offset, lease)])
        return 0, True

    async def detach(self, plane: Plane) -> None:
        if plane in self.attached:
            self.attached.remove(plane)


class One:
    """A session and its networks, best first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time
        self.later_s = 0.0
        monkeypatch.setattr(loop, "time", lambda: now() + self.later_s)
        self.networks = [Network(name) for name in NAMES]
        self.best, self.middle, self.worst = self.networks
        planes = Planes(NAMES, "127.0.0.1")
        planes.open_transports.update(zip(NAMES, self.networks, strict=True))
        hello = Hello(name="words", incarnation="L", role=PeerRole.LANGUAGE, transports=dict.fromkeys(NAMES, b""))
        self.told: asyncio.Queue[WriterEvent] = asyncio.Queue()
        link: Any = SimpleNamespace(local=hello, remote=hello, far_host="")
        self.staging = Staging()
        self.session = Session(link, planes, self.told.put_nowait, checksum=False, handoff=cast(Any, self.staging))
        self._numbers = count()

    def write(self, data: memoryview | DeviceBytes = ROW) -> ItemKey:
        number = next(self._numbers)
        key = ItemKey(1, number)
        self.session.write(Write("L", key, 1, "d", number, 0, 0, 1), data)
        return key

    async def event(self) -> WriterEvent:
        async with asyncio.timeout(PATIENCE_S):
            return await self.told.get()

    async def written(self, network: Network) -> None:
        """A write goes by this network and by no other."""
        self.write()
        event = await self.event()
        assert isinstance(event, ChunkWritten), event
        assert [each.writes.qsize() for each in self.networks] == [each is network for each in self.networks]
        network.writes.get_nowait()

    async def failed(self, network: Network) -> ItemKey:
        """A write by this network fails."""
        network.fails = True
        key = self.write()
        event = await self.event()
        assert isinstance(event, events.WriteFailed) and event.reason.startswith(network.plane), event
        network.fails = False
        network.writes.get_nowait()
        return key

    async def fenced(self, key: ItemKey) -> None:
        self.session.fence(key)
        assert await self.event() == WritesFenced("L", key)

    async def settled(self) -> None:
        """Attempts to connect, and what is let go of in the background, are over."""
        async with asyncio.timeout(PATIENCE_S):
            if self.session._connecting is not None:
                await asyncio.wait([self.session._connecting])
            await self.session._tasks.join()


@asynccontextmanager
async def one(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[One]:
    made = One(monkeypatch)
    try:
        yield made
    finally:
        for network in made.networks:
            network.end_writes()
        async with asyncio.timeout(PATIENCE_S):
            await made.session.aclose()
        assert not any(network.connected for network in made.networks)


async def best_is_forgiven(made: One) -> None:
    """The best plane failed just now: others are used instead, and it again after ``FORGET_S``."""
    made.later_s = FORGET_S - 1
    await made.written(made.middle)
    await made.settled()
    assert made.best.connects.qsize() == 1, "it is not tried yet"
    made.later_s = FORGET_S + 1
    await made.written(made.middle)  # it does not wait for the attempt
    await made.settled()
    await made.written(made.best)
    assert [network.connected for network in made.networks] == [1, 0, 0]


async def test_a_failure_is_forgotten_and_the_better_plane_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One reset moved a receiver to a slower plane for as long as the link lived."""
    async with one(monkeypatch) as made:
        await made.written(made.best)
        await made.failed(made.best)
        await made.written(made.middle)
        await best_is_forgiven(made)
        made.later_s = 10 * FORGET_S
        await made.written(made.best)
        await made.settled()
        assert [network.connects.qsize() for network in made.networks] == [2, 1, 0]


async def test_a_better_plane_that_does_not_connect_at_first_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One lost packet of the first handshake, and the slower plane was used for as long as the link lived."""
    async with one(monkeypatch) as made:
        made.best.down = True
        await made.written(made.middle)
        made.best.down = False
        await best_is_forgiven(made)


async def test_planes_that_can_never_connect_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not offered, or only for peers of one host."""
    async with one(monkeypatch) as made:
        del made.session.link.remote.transports["best"]
        monkeypatch.setattr(planes_module, "LOCAL", frozenset({"middle"}))
        await made.written(made.worst)
        made.later_s = FORGET_S + 1
        await made.written(made.worst)
        assert not made.session._failed
        assert [network.connects.qsize() for network in made.networks] == [0, 0, 1]


async def test_the_next_choice_forgets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with one(monkeypatch) as made:
        await made.failed(made.best)
        await made.written(made.middle)
        made.later_s = FORGET_S / 2
        await made.failed(made.middle)
        await made.written(made.worst)
        made.later_s = FORGET_S + 1
        made.best.down = True  # when the write that is about to fail has it tried
        await made.failed(made.worst)
        await made.settled()
        made.best.down = False
        await made.written(made.best)


async def test_a_better_plane_that_does_not_connect_is_tried_again_after_as_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with one(monkeypatch) as made:
        await made.failed(made.best)
        made.best.down = True
        for number in range(1, 4):
            made.later_s = number * (FORGET_S + 1)
            for _ in range(3):
                await made.written(made.middle)
                await made.settled()
            assert made.best.connects.qsize() == 1 + number
        assert [made.middle.connects.qsize(), made.worst.connects.qsize()] == [1, 0], "the one in use is kept"
        made.best.down = False
        made.later_s += FORGET_S + 1
        await made.written(made.middle)
        await made.settled()
        await made.written(made.best)


@pytest.mark.parametrize("down", [False, True])
async def test_the_plane_in_use_fails_while_a_better_one_is_tried(monkeypatch: pytest.MonkeyPatch, down: bool) -> None:
    async with one(monkeypatch) as made:
        await made.failed(made.best)
        await made.written(made.middle)
        made.later_s = FORGET_S + 1
        made.best.answers.clear()
        await made.failed(made.middle)
        key = made.write()
        made.best.down = down
        made.best.answers.set()
        assert isinstance(event := await made.event(), ChunkWritten) and event.chunk.lease == key.index
        await made.settled()
        assert [network.connected for network in made.networks] == [not down, 0, down]


async def test_planes_that_were_replaced_are_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stayed connected until the link ended: two that took turns used up the descriptors of both hosts."""
    async with one(monkeypatch) as made:
        for _ in range(5):
            for network in made.networks:
                await made.failed(network)
                await made.settled()
                assert not any(each.connected for each in made.networks)
            made.later_s += FORGET_S + 1
        await made.written(made.best)
        assert [network.connected for network in made.networks] == [1, 0, 0]


async def test_a_plane_with_writes_under_way_is_fenced_before_it_is_disconnected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with one(monkeypatch) as made:
        made.best.waits = True
        slow = made.write()
        old = await made.best.writes.get()
        failed = await made.failed(made.best)
        made.session.fence(failed)
        await made.written(made.middle)
        assert not old.closed and made.told.empty(), "the slow write may still land"
        made.best.end_writes()
        told = [await made.event() for _ in range(2)]
        assert WritesFenced("L", failed) in told
        assert [event.key for event in told if isinstance(event, ChunkWritten)] == [slow]
        await made.settled()
        assert not made.best.connected and made.best.writes.empty()


async def test_a_fence_is_answered_after_the_plane_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with one(monkeypatch) as made:
        key = await made.failed(made.best)
        await made.settled()
        assert not made.best.connected
        await made.fenced(key)


async def test_a_write_under_way_survives_the_better_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    async with one(monkeypatch) as made:
        await made.failed(made.best)
        made.middle.waits = True
        slow = made.write()
        old = await made.middle.writes.get()
        made.later_s = FORGET_S + 1
        made.write()
        await made.middle.writes.get()
        assert made.session._connecting is not None
        await asyncio.wait([made.session._connecting])
        await made.written(made.best)
        assert not old.closed
        made.middle.end_writes()
        told = [await made.event() for _ in range(2)]
        assert slow in [event.key for event in told if isinstance(event, ChunkWritten)] and len(told) == 2
        await made.settled()
        assert old.closed


async def test_a_staged_write_survives_the_better_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    async with one(monkeypatch) as made:
        await made.failed(made.best)
        await made.settled()
        await made.written(made.middle)
        staged = made.write(DeviceBytes(0, 3))
        made.later_s = FORGET_S + 1
        await made.written(made.middle)
        assert made.session._connecting is not None
        await asyncio.wait([made.session._connecting])
        await made.written(made.best)
        made.staging.ready.set()
        event = await made.event()
        assert isinstance(event, ChunkWritten) and event.chunk.lease == staged.index
        await made.settled()
        assert [network.connected for network in made.networks] == [1, 0, 0] and len(made.staging.attached) == 1


async def test_the_end_waits_for_planes_that_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async with one(monkeypatch) as made:
        made.best.waits = True
        slow = made.write()
        old = await made.best.writes.get()
        await made.failed(made.best)
        end = asyncio.create_task(made.session.aclose())
        event = await made.event()
        assert isinstance(event, events.WriteFailed) and event.key == slow
        assert not end.done() and not old.closed
        made.best.end_writes()
        await end
        assert old.closed
