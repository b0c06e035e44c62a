"""What a review found: hosts that vanish, more attaches at once than places, and a close during a question."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import threading
from typing import cast

import pytest

from aiodisagg.errors import PeerGone, WriteFailed
from aiodisagg.transport import mooncake_open
from aiodisagg.transport.base import Slice
from aiodisagg.transport.description import unpack
from aiodisagg.transport.mooncake import MooncakeTcpTransport, MooncakeTransport
from aiodisagg.transport.mooncake_greeting import Pool
from aiodisagg.transport.mooncake_open import Openers, Places
from aiodisagg.transport.mooncake_remote import MooncakeRemote
from aiodisagg.transport.mooncake_side import Attach, Attached, Check, Checked, Goodbye, Ping, Pong, Side, Wire
from aiodisagg.transport.testing import Kit, Receiver
from tests.conftest import LOOPS
from tests.transport.test_mooncake_edges import impostor
from tests.transport.test_mooncake_faults import PATIENCE_S, QUIET, FakeEngine, FakeWire, engine_of, fake_engine

__all__ = ["fake_engine"]

pytestmark = pytest.mark.anyio

KIT = Kit(MooncakeTcpTransport)


async def turns() -> None:
    for _ in range(QUIET):
        await asyncio.sleep(0)


# -- a host that vanishes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)
async def test_both_ends_give_a_vanished_host_up_while_words_to_it_are_unacknowledged(no_leaks: None) -> None:
    """The kernel sends no keepalives then: a ``Bar`` under way kept the blocks of a vanished writer for 15 minutes."""
    async with KIT.pair() as (receiver, _, remote, _name):
        (attachment,) = cast(MooncakeTransport, receiver.transport)._attachments
        for wire in (attachment._wire, cast(MooncakeRemote, remote).side._wire):
            sock: socket.socket = wire._writer.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 180_000
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# -- more attaches at once than places ----------------------------------------------------------------------------


async def test_more_attaches_at_once_than_places_all_succeed(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    """They overwrote each other's check, and an engine that was well "led to another process"."""
    monkeypatch.setattr(mooncake_open, "MAX_PLACES", 2)
    count = 32
    async with KIT.receiver() as receiver, KIT.writer() as (writer, _):
        description = receiver.transport.describe()
        attaching = [writer.connect(description, peer=receiver.incarnation) for _ in range(count)]
        remotes = await asyncio.gather(*attaching)
        for number, remote in enumerate(remotes):
            await writer.write(remote, [receiver.slice(bytes([number]), number)])
        assert receiver.holds(bytes(range(count)), 0)


async def attach(receiver: Receiver) -> Wire:
    """A writer that has just asked."""
    pool = unpack("mooncake-tcp", Pool, receiver.transport.describe())
    wire = Wire(*await asyncio.open_connection(pool.host, pool.port))
    wire.say(Attach(pool.token, "writer", receiver.incarnation))
    return wire


async def attached(wire: Wire) -> int:
    """Its place."""
    words = await asyncio.wait_for(wire.hear(), PATIENCE_S)
    assert isinstance(words, Attached)
    return words.place


async def leave(*wires: Wire) -> None:
    for wire in wires:
        wire.say(Goodbye())
        await wire.close()


async def test_a_place_is_for_one_writer_until_its_check(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    monkeypatch.setattr(mooncake_open, "MAX_PLACES", 1)
    nonce = b"8 random"
    async with KIT.receiver() as receiver:
        first = await attach(receiver)
        place = await attached(first)
        ctypes.memmove(place, nonce, len(nonce))
        second = await attach(receiver)
        waiting = asyncio.ensure_future(attached(second))
        for _ in range(QUIET):
            first.say(Ping())
            assert await first.hear() == Pong()
        assert not waiting.done()
        first.say(Check(nonce))
        assert await first.hear() == Checked(True)
        assert await waiting == place
        first.say(Check(bytes(8)))  # what is there for the second
        assert await first.hear() == Checked(False)
        await leave(first, second)


async def test_who_leaves_without_a_check_gives_its_place_back(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    monkeypatch.setattr(mooncake_open, "MAX_PLACES", 1)
    async with KIT.receiver() as receiver:
        for _ in range(3):
            wire = await attach(receiver)
            await attached(wire)
            await leave(wire)


async def test_a_failed_check_gives_both_places_back(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    monkeypatch.setattr(mooncake_open, "MAX_PLACES", 1)
    async with KIT.receiver() as receiver, KIT.writer() as (writer, _):
        for _ in range(2):
            with monkeypatch.context() as dead:
                dead.setattr(FakeEngine, "probe", lambda *_: False)
                with pytest.raises(PeerGone, match="no engine answers"):
                    await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
            async with asyncio.timeout(PATIENCE_S):
                remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
            await writer.disconnect(remote)


async def test_a_cancelled_attach_keeps_its_place_until_its_thread_ends(
    monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    """A peer that stays silent holds the thread for up to a minute, and that thread still writes into its place."""
    monkeypatch.setattr(mooncake_open, "MAX_PLACES", 1)
    loop, probing, answers = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def probe(*_: object) -> bool:
        loop.call_soon_threadsafe(probing.set)
        return answers.wait(PATIENCE_S)

    monkeypatch.setattr(FakeEngine, "probe", probe)
    async with KIT.receiver() as receiver, KIT.writer() as (writer, _):
        connecting = asyncio.ensure_future(writer.connect(receiver.transport.describe(), peer=receiver.incarnation))
        await asyncio.wait_for(probing.wait(), PATIENCE_S)
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
        places = cast(MooncakeTransport, writer)._outgoing_places
        taking = asyncio.ensure_future(places.take())
        await turns()
        assert not taking.done()
        answers.set()
        (await asyncio.wait_for(taking, PATIENCE_S)).give_back()


async def test_a_step_without_a_thread_has_ended(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(mooncake_open, "MAX_PLACES", 1)
    places, openers = Places(), Openers("mooncake")
    place = await places.take()
    with monkeypatch.context() as full, pytest.raises(RuntimeError, match="new thread"):
        full.setattr(threading.Thread, "start", start)
        await openers.run(lambda: None, ended=place.give_back)
    assert (await asyncio.wait_for(places.take(), PATIENCE_S)).number == place.number
    await openers.aclose()


# -- a close during a question ------------------------------------------------------------------------------------


async def test_a_question_ends_when_its_side_closes(no_leaks: None) -> None:
    async def bar(leases: frozenset[int]) -> bool:
        return False

    never_s = 1000.0
    side = Side("mooncake", "p", cast(Wire, FakeWire()), never_s, never_s, bar, lambda error: None)
    asking = asyncio.ensure_future(side.alive())
    await turns()
    assert not asking.done()
    await side.close(goodbye=Goodbye())
    assert not await asyncio.wait_for(asking, PATIENCE_S)
    assert not await asyncio.wait_for(side.alive(), PATIENCE_S)


async def test_a_write_that_failed_ends_when_its_remote_is_disconnected(no_leaks: None) -> None:
    """It asked whether the receiver lives, and nobody was left to hear the answer: it never returned."""
    place = ctypes.create_string_buffer(8)
    asked = asyncio.Event()

    async def talk(wire: Wire) -> None:
        """A receiver that is stopped after its check."""
        await wire.hear()
        wire.say(Attached(1 << 20, 4096, 1, ctypes.addressof(place), []))
        await wire.hear()
        wire.say(Checked(True))
        await wire.hear()  # the one heartbeat
        if await wire.hear() == Ping():
            asked.set()
        await wire.hear()

    kit = Kit(lambda: MooncakeTcpTransport(heartbeat_s=1000.0))
    async with impostor(talk) as description, kit.writer() as (writer, _):
        remote = await writer.connect(description, peer="impostor")
        engine_of(writer).submit_raises = TypeError("incompatible function arguments")
        writing = asyncio.ensure_future(writer.write(remote, [Slice(memoryview(b"one"), 0, 1)]))
        await asyncio.wait_for(asked.wait(), PATIENCE_S)
        await writer.disconnect(remote)
        with pytest.raises(PeerGone, match="disconnected") as found:
            await asyncio.wait_for(writing, PATIENCE_S)
        assert isinstance(found.value.__cause__, WriteFailed)
