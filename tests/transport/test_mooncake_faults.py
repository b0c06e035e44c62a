"""Faults of an engine and of its peers, with an engine that is a memcpy: one write fails, and nothing is held up."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from aiodisagg.errors import PeerGone, TransportUnavailable, WriteFailed
from aiodisagg.transport import mooncake_open
from aiodisagg.transport.base import Slice, Transport
from aiodisagg.transport.mooncake import MooncakeTcpTransport, MooncakeTransport
from aiodisagg.transport.mooncake_engine import DONE, PENDING
from aiodisagg.transport.mooncake_job import Job, Lane
from aiodisagg.transport.mooncake_remote import MooncakeRemote
from aiodisagg.transport.mooncake_side import Attached, Message, Side, Wire
from aiodisagg.transport.testing import Kit
from tests.transport.test_mooncake_edges import impostor

pytestmark = pytest.mark.anyio

PATIENCE_S = 10
QUIET = 10
"""Turns of the loop in which what has nothing to wait for would end."""


class FakeEngine:
    """All peers live in this process: a transfer is done when it is submitted, unless it is told otherwise."""

    ports = itertools.count(1)
    ids = itertools.count(1)
    submit_raises: Exception | None = None
    register_raises: Exception | None = None
    status_says: int = DONE

    def __init__(self, *_: object) -> None:
        self.port = next(self.ports)

    def register(self, address: int, size_bytes: int) -> None:
        if self.register_raises is not None:
            raise self.register_raises

    def unregister(self, address: int) -> None:
        pass

    def probe(self, segment: str) -> bool:
        return True

    def submit(self, segment: str, source: int, destination: int, size_bytes: int) -> int:
        if self.submit_raises is not None:
            error, self.submit_raises = self.submit_raises, None
            raise error
        ctypes.memmove(destination, source, size_bytes)
        return next(self.ids)

    def status(self, transfer: int) -> int:
        return self.status_says

    def close(self) -> None:
        pass

    def park(self) -> None:
        pass


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_open, "Engine", FakeEngine)


def engine_of(transport: object) -> FakeEngine:
    return cast(FakeEngine, cast(MooncakeTransport, transport)._engines[0].engine)


@asynccontextmanager
async def in_time(transport: Transport) -> AsyncIterator[None]:
    """Neither the body nor the end of the transport, whatever became of the body, waits for ever."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield
    finally:
        await asyncio.wait_for(transport.aclose(), PATIENCE_S)


@pytest.mark.parametrize("make", [MooncakeTcpTransport, MooncakeTransport])
async def test_a_transfer_that_raises_fails_its_write_only(
    make: Callable[[], MooncakeTransport], caplog: pytest.LogCaptureFixture, no_leaks: None
) -> None:
    """It ended the one thread of all writes: they, their fences and the end of the transport waited for ever."""
    pair = Kit(make).pair()
    async with Kit(make).receiver() as other, pair as (receiver, writer, remote, _), in_time(writer):
        second = await writer.connect(other.transport.describe(), peer=other.incarnation)
        engine_of(writer).submit_raises = TypeError("incompatible function arguments")
        with pytest.raises(WriteFailed, match="refused"):
            await writer.write(remote, [receiver.slice(b"one", 0)])
        await writer.fence(remote)
        for to, there in ((second, other), (remote, receiver)):
            await writer.write(to, [there.slice(b"two", 0)])
            assert there.holds(b"two", 0)
    assert "was not started" in caplog.text


async def test_a_turn_that_raises_is_not_the_last(caplog: pytest.LogCaptureFixture, no_leaks: None) -> None:
    async with Kit(MooncakeTcpTransport).pair() as (receiver, writer, remote, _), in_time(writer):

        def bug() -> None:
            raise ValueError("a bug")

        cast(MooncakeTransport, writer)._engines[0].pump.call(bug)
        await writer.write(remote, [receiver.slice(b"fine", 0)])
        assert receiver.holds(b"fine", 0)
    assert "a turn failed" in caplog.text


@pytest.mark.parametrize("error", [TransportUnavailable("mooncake", "ulimit -l"), OSError("no memory")])
async def test_a_staging_slot_that_cannot_be_replaced_is_one_less(error: Exception, no_leaks: None) -> None:
    kit = Kit(lambda: MooncakeTransport(staging_slots=2, overdue_s=0.0))
    async with kit.pair() as (receiver, writer, remote, _), in_time(writer):
        engine = engine_of(writer)
        engine.status_says, engine.register_raises = PENDING, error
        with pytest.raises(WriteFailed, match="no end of a transfer"):
            await writer.write(remote, [receiver.slice(b"one", 0)])
        engine.status_says = DONE
        await writer.fence(remote)
        await writer.write(remote, [receiver.slice(b"two", 0)])
        assert receiver.holds(b"two", 0)


@pytest.mark.parametrize(("address", "place"), [(-1, 64), (0, 64), (64, -1), (2**64 - 4096, 64), (64, 2**64 - 4)])
async def test_addresses_that_cannot_be_are_not_given_to_the_engine(address: int, place: int, no_leaks: None) -> None:
    async def talk(wire: Wire) -> None:
        await wire.hear()
        wire.say(Attached(1 << 20, address, 1, place, []))
        await wire.hear()

    async with impostor(talk) as description, Kit(MooncakeTcpTransport).writer() as (writer, _):
        engine_of(writer).submit_raises = TypeError("incompatible function arguments")
        with pytest.raises(PeerGone, match="something else answers"):
            await writer.connect(description, peer="impostor")


class FakeWire:
    """A connection that is silent until it ends."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[Message | None] = asyncio.get_running_loop().create_future()

    def say(self, message: Message) -> None:
        pass

    async def hear(self) -> Message | None:
        return await asyncio.shield(self.ended)

    async def close(self) -> None:
        pass


class Writing:
    """A remote with one RDMA write under way, whose source is copied and which does not end by itself."""

    def __init__(self, quarantine_s: float) -> None:
        self.wire = FakeWire()
        pump: Any = None
        lane = Lane("p", "segment", 4096)
        self.remote = MooncakeRemote("mooncake", "p", 1 << 20, pump, lane, [])
        wire, never_s = cast(Wire, self.wire), 1000.0
        self.remote.side = Side("mooncake", "p", wire, never_s, quarantine_s, self._bar, lambda error: None)
        self.job = Job(lane, [Slice(memoryview(b"x" * 100), 0, 1)], 1 << 20)
        self.job.freed()
        self.remote.jobs.add(self.job)

    async def _bar(self, leases: frozenset[int]) -> bool:
        return False

    async def settles(self) -> asyncio.Task[None]:
        settling = asyncio.get_running_loop().create_task(self.remote.settled())
        for _ in range(QUIET):
            await asyncio.sleep(0)
        return settling

    def reset(self) -> None:
        self.wire.ended.set_result(None)


async def test_a_fence_begun_before_the_peer_is_gone_ends_after_the_quarantine(no_leaks: None) -> None:
    """It had decided to wait for the end, which never comes once a target is dead."""
    writing = Writing(quarantine_s=0.0)
    settling = await writing.settles()
    assert not settling.done() and not writing.remote.side.gone
    writing.reset()
    await asyncio.wait_for(settling, PATIENCE_S)
    assert not writing.job.end.done()
    await writing.remote.side.close(goodbye=None)


async def test_a_reset_of_the_side_connection_alone_ends_no_fence(no_leaks: None) -> None:
    """The engine's connections live: a piece may still leave, though its source is free."""
    writing = Writing(quarantine_s=1000.0)
    writing.reset()
    settling = await writing.settles()
    assert writing.remote.side.gone and not settling.done()
    writing.job.ended()
    await asyncio.wait_for(settling, PATIENCE_S)
    await writing.remote.side.close(goodbye=None)


async def test_a_source_that_is_read_in_place_is_waited_for_after_the_quarantine(no_leaks: None) -> None:
    writing = Writing(quarantine_s=0.0)
    writing.remote.jobs.clear()
    job = Job(writing.remote.lane, [Slice(memoryview(b"x" * 100), 0, 1)], 1 << 20)
    writing.remote.jobs.add(job)
    writing.reset()
    settling = await writing.settles()
    await writing.remote.side.at_rest
    for _ in range(QUIET):
        await asyncio.sleep(0)
    assert not settling.done()
    job.freed()
    await asyncio.wait_for(settling, PATIENCE_S)
    await writing.remote.side.close(goodbye=None)
