"""Two processes over Mooncake's engine: kill, stop and restart in mid-transfer end in typed errors, and nothing moves
after a fence. ``AIODISAGG_MOONCAKE=mooncake`` runs the same over RDMA (``make test-rdma`` does)."""

from __future__ import annotations

import asyncio
import base64
import os
import signal

import pytest

from aiodisagg.errors import PeerGone, TransportClosed, WriteFailed
from aiodisagg.transport.base import Slice
from aiodisagg.transport.mooncake import MooncakeTransport
from aiodisagg.transport.testing import Kit
from tests.conftest import LOOPS
from tests.transport.child import SIZE, SLOWNESS, make
from tests.transport.test_mooncake import engine_imported
from tests.transport.test_two_processes import child, writing_to_child, written_by_child

__all__ = ["engine_imported"]

NAME = os.environ.get("AIODISAGG_MOONCAKE", "mooncake-tcp")
RDMA = NAME == "mooncake"
PATIENCE_S = 20 * SLOWNESS

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", LOOPS[1:] if RDMA else LOOPS, indirect=True),
]


def mine(receiver_or_writer: object) -> MooncakeTransport:
    assert isinstance(receiver_or_writer, MooncakeTransport)
    return receiver_or_writer


async def test_bytes_of_another_process_arrive_and_a_clean_end_fences(no_leaks: None) -> None:
    async with written_by_child(NAME, forever=False) as (receiver, one, lease):
        assert await one.hear() == {"written": True}
        assert receiver.holds(b"\xaa" * SIZE, 0)
        assert receiver.untouched(SIZE)
        await one.say(do="end")
        assert await one.hear() == {"closed": True}
        async with asyncio.timeout(PATIENCE_S):
            await receiver.transport.revoke("child-writer", [lease])


async def test_a_writer_killed_in_mid_write_is_fenced_after_the_quarantine(no_leaks: None) -> None:
    async with written_by_child(NAME, forever=True) as (receiver, one, lease):
        assert await one.hear() == {"writing": True}
        began_s = asyncio.get_running_loop().time()
        await one.die()
        revoke = asyncio.ensure_future(receiver.transport.revoke("child-writer", [lease]))
        await asyncio.sleep(0)
        assert mine(receiver.transport).revoking == 1
        async with asyncio.timeout(PATIENCE_S):
            await revoke
        assert asyncio.get_running_loop().time() - began_s >= 0.8, "what it had sent may still have been on its way"
        assert mine(receiver.transport).revoking == 0
        receiver.arena.view[:] = b"\x33" * receiver.arena.size_bytes
        words = {"description": base64.b64encode(receiver.transport.describe()).decode(), "peer": receiver.incarnation}
        next_lease = receiver.lender.lend(0, 100)
        async with child("writer", NAME, **words, size_bytes=100, lease=next_lease, forever=False) as other:
            assert await other.hear() == {"written": True}
        assert receiver.arena.view[100:] == b"\x33" * (receiver.arena.size_bytes - 100)


@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL])
async def test_a_stopped_writer_holds_its_leases(then: signal.Signals, no_leaks: None) -> None:
    async with written_by_child(NAME, forever=True) as (receiver, one, lease):
        assert await one.hear() == {"writing": True}
        one.signal(signal.SIGSTOP)
        revoke = asyncio.ensure_future(receiver.transport.revoke("child-writer", [lease]))
        done, _ = await asyncio.wait([revoke], timeout=1.5)  # longer than the quarantine: silence is not death
        assert not done
        one.signal(then)
        async with asyncio.timeout(PATIENCE_S):
            await revoke
        receiver.arena.view[:] = b"\x33" * receiver.arena.size_bytes
        if then == signal.SIGCONT:  # its next write under the lease is refused on its own side, and it ends
            assert await asyncio.wait_for(one.process.wait(), PATIENCE_S) == 1
        assert receiver.arena.view == b"\x33" * receiver.arena.size_bytes


async def test_a_process_that_leaves_in_mid_write_ends_with_its_own_code(no_leaks: None) -> None:
    """A thread inside the engine while the interpreter is taken down would abort the process."""
    async with Kit(lambda: make(NAME)).receiver(SIZE) as receiver:
        lease = receiver.lender.lend(0, SIZE)
        description = base64.b64encode(receiver.transport.describe()).decode()
        words = {"description": description, "peer": receiver.incarnation, "size_bytes": SIZE, "lease": lease}
        async with child("leaver", NAME, **words) as one:
            assert await asyncio.wait_for(one.process.wait(), PATIENCE_S) == 7


async def test_a_receiver_killed_in_mid_write_is_gone(request: pytest.FixtureRequest) -> None:
    if not RDMA:  # there a transfer to a dead process never ends, and its engine is kept until this one ends
        request.getfixturevalue("no_leaks")
    async with writing_to_child(NAME) as (_, task, one):
        await one.die()
        with pytest.raises(PeerGone):
            await asyncio.wait_for(task, PATIENCE_S)


async def test_a_stopped_receiver_is_given_up_within_five_heartbeats(no_leaks: None) -> None:
    async with writing_to_child(NAME) as (_, task, one):
        one.signal(signal.SIGSTOP)
        with pytest.raises(PeerGone, match="silent"):
            await asyncio.wait_for(task, PATIENCE_S)


async def test_a_cancelled_write_to_a_stopped_receiver_keeps_its_source_leased(no_leaks: None) -> None:
    async with child("receiver", NAME, size_bytes=SIZE) as one, Kit(lambda: make(NAME)).writer() as (writer, _):
        description = base64.b64decode(str((await one.hear())["description"]))
        remote = await writer.connect(description, peer="child-receiver")
        source = bytearray(b"\xaa" * SIZE)
        await writer.write(remote, [Slice(memoryview(source), 0, 1)])
        one.signal(signal.SIGSTOP)
        task = asyncio.ensure_future(writer.write(remote, [Slice(memoryview(source), 0, 2)]))
        await asyncio.wait([task], timeout=0.2)
        if RDMA and task.done():  # a card needs nobody at the other end
            await task
        else:
            task.cancel()
            with pytest.raises((asyncio.CancelledError, PeerGone)):
                await task
        assert RDMA or 0 < mine(writer).leased_bytes <= SIZE  # an RDMA write into a stopped process just ends
        one.signal(signal.SIGCONT)
        async with asyncio.timeout(PATIENCE_S):
            await writer.fence(remote)
        assert mine(writer).leased_bytes == 0
        source[:] = b"\x55" * SIZE
        await one.say(do="count", byte=0x55)
        assert await one.hear() == {"count": 0}


async def test_the_fence_ends_though_the_receiver_stays_stopped(no_leaks: None) -> None:
    """TCP: the engine's progress time-out; what was in flight may land there later, never the source's new bytes."""
    async with child("receiver", NAME, size_bytes=SIZE) as one, Kit(lambda: make(NAME)).writer() as (writer, _):
        description = base64.b64decode(str((await one.hear())["description"]))
        remote = await writer.connect(description, peer="child-receiver")
        source = bytearray(b"\xaa" * SIZE)
        await writer.write(remote, [Slice(memoryview(source), 0, 1)])
        one.signal(signal.SIGSTOP)
        writes = [asyncio.ensure_future(writer.write(remote, [Slice(memoryview(source), 0, 2)])) for _ in range(3)]
        async with asyncio.timeout(PATIENCE_S):
            outcomes = await asyncio.gather(*writes, return_exceptions=True)
            assert RDMA or all(isinstance(outcome, PeerGone | WriteFailed) for outcome in outcomes)
            await writer.fence(remote)
        source[:] = b"\x55" * SIZE
        one.signal(signal.SIGCONT)
        await one.say(do="count", byte=0x55)
        assert await one.hear() == {"count": 0}
        await one.say(do="count", byte=0xAA)
        assert await one.hear() == {"count": SIZE}


async def test_closing_with_a_stopped_receiver_ends_in_time(no_leaks: None) -> None:
    async with child("receiver", NAME, size_bytes=SIZE) as one, Kit(lambda: make(NAME)).writer() as (writer, _):
        description = base64.b64decode(str((await one.hear())["description"]))
        remote = await writer.connect(description, peer="child-receiver")
        source = memoryview(bytes(SIZE))
        await writer.write(remote, [Slice(source, 0, 1)])
        one.signal(signal.SIGSTOP)
        write = asyncio.ensure_future(writer.write(remote, [Slice(source, 0, 2)]))
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            await writer.aclose()
        (outcome,) = await asyncio.gather(write, return_exceptions=True)
        assert outcome is None or isinstance(outcome, TransportClosed)
