"""A TCP write that failed: its source is free, and what it had sent may still land. Neither side lends that range anew
before the quarantine is over, by its own clock.

Run as a program, this is the receiver of the test that has two processes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import msgspec
import pytest

from aiodisagg.errors import WriteFailed, WriteRefused
from aiodisagg.transport import mooncake_open
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.base import Remote, Slice, Transport
from aiodisagg.transport.mooncake import MooncakeTcpTransport, MooncakeTransport
from aiodisagg.transport.mooncake_engine import DONE, FAILED, PENDING
from aiodisagg.transport.mooncake_remote import MooncakeRemote
from aiodisagg.transport.mooncake_side import Barred, Goodbye
from aiodisagg.transport.testing import Kit, Receiver
from tests.transport.child import line, say
from tests.transport.test_mooncake import engine_imported
from tests.transport.test_mooncake_faults import PATIENCE_S, QUIET, FakeEngine
from tests.transport.test_two_processes import ROOT, Child

__all__ = ["engine_imported"]

pytestmark = pytest.mark.anyio

NEVER_S = 1000.0
SHORT_S = 0.2


@dataclass
class Transfer:
    """As it was submitted. What the engine has taken from the source is on its way, whatever is in the source now."""

    segment: str
    destination: int
    sent: bytes
    status: int = PENDING

    def land(self) -> None:
        ctypes.memmove(self.destination, self.sent, len(self.sent))


class ToldEngine(FakeEngine):
    """Transfers to segments that it was told to hold stay pending until they are told how they end."""

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.holds: set[str] = set()
        self.held: dict[int, Transfer] = {}
        self.lock = threading.Lock()

    def hold(self, *remotes: Remote) -> None:
        self.loop, self.submitted = asyncio.get_running_loop(), asyncio.Event()
        self.holds |= {cast(MooncakeRemote, remote).lane.segment for remote in remotes}

    def submit(self, segment: str, source: int, destination: int, size_bytes: int) -> int:
        if segment not in self.holds:
            return super().submit(segment, source, destination, size_bytes)
        with self.lock:
            number = next(self.ids)
            self.held[number] = Transfer(segment, destination, ctypes.string_at(source, size_bytes))
            self.loop.call_soon_threadsafe(self.submitted.set)
            return number

    def status(self, transfer: int) -> int:
        held = self.held.get(transfer)
        return DONE if held is None else held.status

    def tell(self, status: int) -> None:
        """To all, and to all that are submitted from now on."""
        with self.lock:
            self.holds.clear()
            for transfer in self.held.values():
                transfer.status = status


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_open, "Engine", ToldEngine)


def told_engine(transport: object) -> ToldEngine:
    return cast(ToldEngine, cast(MooncakeTransport, transport)._engines[0].engine)


async def in_step(remote: Remote) -> None:
    """All that either side had to say about this remote has been said, heard and answered."""
    for _ in range(3):
        await cast(MooncakeRemote, remote).side.alive()
        for _ in range(QUIET):
            await asyncio.sleep(0)


def kit(quarantine_s: float) -> Kit:
    return Kit(lambda: MooncakeTcpTransport(quarantine_s=quarantine_s))


async def fails(writer: Transport, remote: Remote, item: Slice) -> Transfer:
    """A write that fails with all its bytes in a kernel."""
    engine = told_engine(writer)
    engine.hold(remote)
    writing = asyncio.ensure_future(writer.write(remote, [item]))
    await asyncio.wait_for(engine.submitted.wait(), PATIENCE_S)
    engine.tell(FAILED)
    with pytest.raises(WriteFailed, match="reports a failure"):
        await asyncio.wait_for(writing, PATIENCE_S)
    (transfer,) = engine.held.values()
    engine.held.clear()
    return transfer


def revoking(receiver: Receiver) -> int:
    return cast(MooncakeTransport, receiver.transport).revoking


async def test_after_a_failed_piece_neither_fence_nor_revoke_ends_before_the_quarantine(
    told: None, no_leaks: None
) -> None:
    """Both ended at once, the range was lent anew, and bytes of the old lend landed in the new one."""
    async with kit(NEVER_S).pair() as (receiver, writer, remote, name), asyncio.timeout(PATIENCE_S):
        source = bytearray(b"late" * 10)
        item = receiver.slice(source, 0)
        transfer = await fails(writer, remote, item)
        item.source.release()
        source.extend(b"the source is free at once")
        fence = asyncio.ensure_future(writer.fence(remote))
        revoke = asyncio.ensure_future(receiver.transport.revoke(name, [item.lease]))
        await in_step(remote)
        assert not fence.done() and not revoke.done() and revoking(receiver) == 1
        transfer.land()
        await writer.aclose()  # our engine is gone, and what it had sent is not
        await fence
        receiving = cast(MooncakeTransport, receiver.transport)
        await asyncio.gather(*receiving._serving)  # the goodbye has been read
        assert not revoke.done() and revoking(receiver) == 1, "a goodbye after a failed piece is late, too"
        await receiver.transport.aclose()
        await revoke


async def test_the_receiver_counts_the_quarantine_by_its_own_clock(told: None, no_leaks: None) -> None:
    """A receiver that was stopped reads the writer's word, as old as it may be, before its kernel's bytes."""
    async with kit(NEVER_S).receiver() as receiver, kit(0.0).writer() as (writer, name), asyncio.timeout(PATIENCE_S):
        remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        item, other = receiver.slice(b"late", 0), receiver.slice(b"in time", 100)
        await fails(writer, remote, item)
        await writer.write(remote, [other])
        await writer.fence(remote)
        revoke = asyncio.ensure_future(receiver.transport.revoke(name, [item.lease]))
        await in_step(remote)
        assert not revoke.done() and revoking(receiver) == 1
        await receiver.transport.revoke(name, [other.lease])  # nothing failed under it, and the other holds nobody up
        assert revoking(receiver) == 1
        await writer.disconnect(remote)
        assert not revoke.done()
        await receiver.transport.aclose()
        await revoke


@pytest.mark.parametrize("make", [MooncakeTcpTransport, MooncakeTransport])
async def test_the_quarantine_after_a_failed_piece_ends(
    make: Callable[..., MooncakeTransport], told: None, no_leaks: None
) -> None:
    """RDMA has none: no kernel holds its bytes."""
    quarantine_s = SHORT_S if make is MooncakeTcpTransport else NEVER_S
    made = Kit(lambda: make(quarantine_s=quarantine_s))
    loop = asyncio.get_running_loop()
    async with made.pair() as (receiver, writer, remote, name), asyncio.timeout(PATIENCE_S):
        item = receiver.slice(b"late", 0)
        began_s = loop.time()
        await fails(writer, remote, item)
        await writer.fence(remote)
        fenced_s = loop.time()
        await receiver.transport.revoke(name, [item.lease])
        if make is MooncakeTcpTransport:
            assert fenced_s - began_s >= SHORT_S and loop.time() - fenced_s >= SHORT_S
        assert revoking(receiver) == 0


class _Barred(msgspec.Struct, frozen=True, array_like=True, tag="barred"):
    ticket: int


class _Goodbye(msgspec.Struct, frozen=True, array_like=True, tag="goodbye"):
    pass


def test_versions_without_the_field_and_with_it_understand_each_other() -> None:
    for old, new in ((_Barred(7), Barred(7)), (_Goodbye(), Goodbye())):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=type(new)) == new
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(new), type=type(old)) == old
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Barred(7, True)), type=_Barred) == _Barred(7)


# -- two processes ------------------------------------------------------------------------------------------------

SIZE = 16 << 20
QUARANTINE_S = 1.0
NEW = 0x33


def make() -> MooncakeTcpTransport:
    return MooncakeTcpTransport(heartbeat_s=0.2, connect_timeout_s=60, quarantine_s=QUARANTINE_S)


async def test_a_receiver_that_was_stopped_lends_no_range_that_old_bytes_land_in(no_leaks: None) -> None:
    """It read our word, and lent the range anew, before what its own kernel held of the old lend."""
    words = (sys.executable, "-m", "tests.transport.test_mooncake_late")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, cwd=ROOT)
    one = Child(process)
    try:
        async with Kit(make).writer() as (writer, name), asyncio.timeout(60):
            description = base64.b64decode(str((await one.hear())["description"]))
            remote = await writer.connect(description, peer="child-receiver")
            source = memoryview(b"\xaa" * SIZE)
            began = asyncio.Event()

            async def write() -> None:
                while True:
                    await writer.write(remote, [Slice(source, 0, 1)])
                    began.set()

            writing = [asyncio.ensure_future(write()) for _ in range(3)]
            await began.wait()
            await one.say(peer=name, lease=1)
            outcomes = await asyncio.gather(*writing, return_exceptions=True)
            assert all(isinstance(outcome, WriteRefused) for outcome in outcomes), outcomes
            await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            await writer.fence(remote)  # for the writer it is over
            one.signal(signal.SIGCONT)
            assert await one.hear() == {"lent": True}
            await asyncio.sleep(0.5)  # nothing happens, which has no event
            await one.say()
            assert await one.hear() == {"foreign": 0}
    finally:
        process.kill()
        await process.communicate()


async def _receive() -> None:
    """Revokes a lease in mid-write, is stopped, and lends its range anew as soon as the transport lets it."""
    arena, transport, new = Arena(SIZE), make(), bytes([NEW]) * SIZE
    await transport.open(arena, lambda offset, size, lease: True, incarnation="child-receiver")
    _hold_engine_back()
    say(description=base64.b64encode(transport.describe()).decode())
    asked = await line()
    revoke = asyncio.ensure_future(transport.revoke(str(asked["peer"]), [int(str(asked["lease"]))]))
    await asyncio.sleep(0)  # the writer has been asked
    os.kill(os.getpid(), signal.SIGSTOP)
    _keep_busy(time.monotonic() + 0.05)
    await revoke
    arena.view[:] = new
    say(lent=True)
    await line()
    say(foreign=SIZE - bytes(arena.view).count(bytes([NEW])))
    await transport.aclose()


def _hold_engine_back() -> None:
    """While the loop's thread is busy the engine's threads get a hundredth of the only processor."""
    processor = min(os.sched_getaffinity(0))
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, {processor})
            if thread != os.getpid():
                os.setpriority(os.PRIO_PROCESS, thread, 19)


def _keep_busy(until_s: float) -> None:
    if time.monotonic() < until_s:
        asyncio.get_running_loop().call_soon(_keep_busy, until_s)


if __name__ == "__main__":
    asyncio.run(_receive())
