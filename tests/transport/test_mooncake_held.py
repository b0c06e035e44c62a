"""What one peer may hold up: not the slots of the others, not a connect, not the writer's leave."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import cast

import pytest

from aiodisagg.errors import PeerGone, WriteFailed, WriteRefused
from aiodisagg.transport.base import Remote, Transport
from aiodisagg.transport.mooncake import MooncakeTcpTransport, MooncakeTransport
from aiodisagg.transport.mooncake_engine import DONE
from aiodisagg.transport.mooncake_pump import LARGE_BYTES
from aiodisagg.transport.mooncake_side import Attached, Check, Closing, Message, Wire
from aiodisagg.transport.testing import Kit, Receiver
from tests.transport.test_mooncake_edges import impostor
from tests.transport.test_mooncake_faults import PATIENCE_S, FakeEngine, in_time
from tests.transport.test_mooncake_late import in_step, revoking, told, told_engine

__all__ = ["told"]

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("told")]

NEVER_S = 1000.0

# -- staging slots ------------------------------------------------------------------------------------------------

SLOTS = 32
Peers = list[tuple[Receiver, Remote]]


@asynccontextmanager
async def peers(count: int, chunk_bytes: int) -> AsyncIterator[tuple[Transport, Peers]]:
    """A writer over RDMA with that many receivers, whose transfers are never overdue and done at the end."""
    kit = Kit(lambda: MooncakeTransport(staging_slots=SLOTS, chunk_bytes=chunk_bytes, overdue_s=NEVER_S))
    async with AsyncExitStack() as stack:
        receivers = [await stack.enter_async_context(kit.receiver(chunk_bytes)) for _ in range(count)]
        writer, _ = await stack.enter_async_context(kit.writer())
        try:
            async with asyncio.timeout(PATIENCE_S):
                yield (
                    writer,
                    [(one, await writer.connect(one.transport.describe(), peer=one.incarnation)) for one in receivers],
                )
        finally:
            told_engine(writer).tell(DONE)


def write(
    writer: Transport, receiver: Receiver, remote: Remote, size_bytes: int, pieces: int = 1
) -> asyncio.Task[None]:
    """Of so many pieces of that size, to the same place."""
    return asyncio.ensure_future(writer.write(remote, [receiver.slice(bytes(size_bytes), 0)] * pieces))


async def test_two_peers_that_do_not_answer_leave_slots_to_the_others(no_leaks: None) -> None:
    """They had all of them, and every other receiver waited for 30 s."""
    chunk_bytes = 4096
    async with peers(3, chunk_bytes) as (writer, [*dead, (third, way)]):
        told_engine(writer).hold(*(remote for _, remote in dead))
        stuck = [write(writer, one, remote, chunk_bytes, SLOTS) for one, remote in dead]
        await told_engine(writer).submitted.wait()
        for _ in range(20):
            await write(writer, third, way, 10)
        await write(writer, third, way, chunk_bytes, SLOTS)
        assert not any(one.done() for one in stuck)
        told_engine(writer).tell(DONE)
        await asyncio.gather(*stuck)


async def test_the_slots_of_lost_peers_are_replaced_when_they_are_lost(no_leaks: None) -> None:
    """And not when their pieces are overdue."""
    chunk_bytes = 2 * LARGE_BYTES
    async with peers(4, chunk_bytes) as (writer, [*dead, (fourth, way)]):
        told_engine(writer).hold(*(remote for _, remote in dead))
        stuck = [write(writer, one, remote, chunk_bytes, 10) for one, remote in dead for _ in range(2)]
        await told_engine(writer).submitted.wait()
        await write(writer, fourth, way, 10)
        large = write(writer, fourth, way, chunk_bytes, 4)
        for _ in range(20):
            await write(writer, fourth, way, 10)  # the last slots are for small ones
        assert not large.done()
        for one, _ in dead:
            for attachment in cast(MooncakeTransport, one.transport)._attachments:
                attachment.closing()
        outcomes = await asyncio.gather(*stuck, return_exceptions=True)
        assert all(isinstance(outcome, PeerGone) for outcome in outcomes)
        await large


async def test_a_slot_that_comes_back_is_not_replaced_again(no_leaks: None) -> None:
    """Peers that were silent for a while made slots, each of which counted as lost for good, up to the bound."""
    kit = Kit(lambda: MooncakeTransport(staging_slots=2, overdue_s=0.0))
    async with kit.pair() as (receiver, writer, remote, _), in_time(writer), asyncio.timeout(PATIENCE_S):
        for _ in range(3):
            told_engine(writer).hold(remote)
            with pytest.raises(WriteFailed, match="no end of a transfer"):
                await writer.write(remote, [receiver.slice(b"slow", 0)])
            told_engine(writer).tell(DONE)
            await writer.fence(remote)
        staging = cast(MooncakeTransport, writer)._engines[0].staging
        assert staging is not None and len(staging._arenas) == 3


# -- connecting ---------------------------------------------------------------------------------------------------


async def test_leases_may_be_revoked_while_their_writer_connects(
    monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    """The connect failed, and said that the engine leads to another process."""
    loop, probing, answers = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def probe(*_: object) -> bool:
        loop.call_soon_threadsafe(probing.set)
        return answers.wait(PATIENCE_S)

    kit = Kit(MooncakeTcpTransport)
    async with kit.receiver() as receiver, kit.writer() as (writer, name), asyncio.timeout(PATIENCE_S):
        monkeypatch.setattr(FakeEngine, "probe", probe)
        connecting = asyncio.ensure_future(writer.connect(receiver.transport.describe(), peer=receiver.incarnation))
        await probing.wait()
        items = [receiver.slice(b"too late", 0) for _ in range(3)]
        revokes = [asyncio.ensure_future(receiver.transport.revoke(name, [item.lease])) for item in items]
        answers.set()
        remote = await connecting
        await asyncio.gather(*revokes)
        for item in items:
            with pytest.raises(WriteRefused):
                await writer.write(remote, [item])
        assert receiver.untouched()
        await writer.write(remote, [receiver.slice(b"as usual", 0)])
        assert receiver.holds(b"as usual", 0)


@pytest.mark.parametrize(("word", "text"), [(Closing(), "closes"), (None, "its connection ended")])
async def test_a_receiver_that_leaves_in_the_greeting_is_gone(word: Message | None, text: str, no_leaks: None) -> None:
    place = ctypes.create_string_buffer(8)

    async def talk(wire: Wire) -> None:
        await wire.hear()
        wire.say(Attached(1 << 20, 4096, 1, ctypes.addressof(place), []))
        assert isinstance(await wire.hear(), Check)
        if word is not None:
            wire.say(word)

    async with impostor(talk) as description, Kit(MooncakeTcpTransport).writer() as (writer, _):
        with pytest.raises(PeerGone, match=text):
            await writer.connect(description, peer="impostor")


# -- leaving ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def a_piece_that_never_ends() -> AsyncIterator[tuple[Receiver, Transport, Remote, asyncio.Task[None]]]:
    """Its write has failed, its receiver lives, and its lease is being revoked."""
    kit = Kit(lambda: MooncakeTransport(overdue_s=0.0, progress_timeout_s=1))
    async with kit.pair() as (receiver, writer, remote, name), in_time(writer):
        told_engine(writer).hold(remote)
        item = receiver.slice(b"for ever", 0)
        with pytest.raises(WriteFailed, match="no end of a transfer"):
            await writer.write(remote, [item])
        revoke = asyncio.ensure_future(receiver.transport.revoke(name, [item.lease]))
        yield receiver, writer, remote, revoke
        await revoke


async def test_a_piece_that_never_ends_does_not_hold_its_writer(no_leaks: None) -> None:
    """Closing an encode peer did not end. What the receiver was promised has not changed."""
    async with a_piece_that_never_ends() as (receiver, writer, remote, revoke):
        for _ in range(2):
            await writer.disconnect(remote)
        fence = asyncio.ensure_future(writer.fence(remote))
        await in_step(remote)
        assert not fence.done() and not revoke.done() and revoking(receiver) == 1
        told_engine(writer).tell(DONE)
        await fence
        await revoke
        attachments = list(cast(MooncakeTransport, receiver.transport)._attachments)
        await asyncio.gather(*(one.ended for one in attachments))  # it has said goodbye
        assert not cast(MooncakeTransport, writer)._remotes


@pytest.mark.parametrize("left", [False, True])
async def test_a_piece_that_never_ends_does_not_hold_the_end_of_its_transport(left: bool) -> None:
    """Its engine and its slots are kept until the process ends."""
    async with a_piece_that_never_ends() as (_, writer, remote, revoke):
        if left:
            await writer.disconnect(remote)
        await in_step(remote)
        assert not revoke.done()
        await writer.aclose()
