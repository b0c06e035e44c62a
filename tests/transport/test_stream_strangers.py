"""Strangers on the port of plain TCP: how many that say nothing are borne, and that they lock nobody out."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

import pytest

from aiodisagg import strangers
from aiodisagg.transport.chunks import Welcome, decode
from aiodisagg.transport.description import unpack
from aiodisagg.transport.stream import StreamTransport, _Pool
from aiodisagg.transport.testing import Kit, Receiver
from aiodisagg.transport.wire import FRAME_BYTES
from tests.conftest import LOOPS
from tests.transport.test_stream import hello, receiving, stranger

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody has had the time to greet."""
    monkeypatch.setattr(strangers, "GRACE_S", 0.0)


@pytest.mark.usefixtures("no_grace")
async def test_silent_strangers_make_room_for_each_other_and_for_writers(no_leaks: None) -> None:
    """Each held a descriptor for ``connect_timeout_s``, however many came in that time."""
    kit = Kit(lambda: StreamTransport(connect_timeout_s=600))
    async with kit.pair() as (receiver, writer, remote, _), AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(stranger(receiver)) for _ in range(100)]
        async with asyncio.timeout(20):
            for other in silent[:36]:
                assert await other.is_sent_away()
            late = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
            assert await silent[36].is_sent_away()  # its first connection was one more, its second one no more
            await writer.write(late, [receiver.slice(b"late", 0)])
            await writer.write(remote, [receiver.slice(b"fine", 4)])  # who has said the token is none of them
        assert receiver.holds(b"latefine", 0)
        assert len(receiving(receiver).greeting) == 63 and len(receiving(receiver).wires) == 63 + 4
        for other in silent[37:]:
            other.writer.write(hello(receiver))
            await other.hear()  # it was left alone


@pytest.mark.usefixtures("no_grace")
async def test_a_burst_of_strangers_is_ended_before_it_is_served(no_leaks: None) -> None:
    """The loop accepts many in one turn, and says only later that their connections are made."""
    kit = Kit(lambda: StreamTransport(connect_timeout_s=600))
    async with kit.receiver() as receiver, kit.writer() as (writer, _), AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(stranger(receiver)) for _ in range(100)))
        async with asyncio.timeout(20):
            remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
            await writer.write(remote, [receiver.slice(b"fine", 0)])
        assert receiver.holds(b"fine", 0)
        assert len(receiving(receiver).greeting) == 63 and len(receiving(receiver).wires) == 63 + 2


@contextmanager
def sockets(receiver: Receiver, count: int, word: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many connections that have said this, before the loop turns once."""
    port, opened = unpack("stream", _Pool, receiver.transport.describe()).port, list[socket.socket]()
    try:
        for _ in range(count):
            opened.append(socket.create_connection(("127.0.0.1", port)))
            opened[-1].sendall(word)
            opened[-1].setblocking(False)
        yield opened
    finally:
        for one in opened:
            one.close()


async def answer(one: socket.socket) -> object:
    """A word, or None: sent away."""
    data = b""
    while len(data) < FRAME_BYTES:
        try:
            got = await asyncio.get_running_loop().sock_recv(one, FRAME_BYTES - len(data))
        except ConnectionError:
            got = b""
        if not got:
            return None
        data += got
    return decode(data[2 : 2 + int.from_bytes(data[:2], "big")])


async def test_more_writers_at_once_than_strangers_are_borne_are_all_welcome(no_leaks: None) -> None:
    """A loop accepts a hundred connections before it reads one: each of the last ended one of the first, whose greeting
    was there."""
    kit = Kit(lambda: StreamTransport(connect_timeout_s=600))
    async with kit.receiver() as receiver:
        with sockets(receiver, 100, hello(receiver)) as writers:
            async with asyncio.timeout(60):
                answers = await asyncio.gather(*map(answer, writers))
            assert [type(one) for one in answers] == [Welcome] * 100
            assert not receiving(receiver).greeting


async def test_of_a_crowd_of_strangers_the_oldest_go_when_they_had_their_time(
    no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strangers, "GRACE_S", 0.2)
    kit = Kit(lambda: StreamTransport(connect_timeout_s=600))
    async with kit.pair() as (receiver, writer, remote, _), AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(stranger(receiver)) for _ in range(70)]
        async with asyncio.timeout(60):
            for other in silent[:6]:
                assert await other.is_sent_away()
            await writer.write(remote, [receiver.slice(b"fine", 0)])
        assert len(receiving(receiver).greeting) == 64
        assert receiver.holds(b"fine", 0)


async def test_there_are_never_more_strangers_than_descriptors_for_them(
    no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However young they are."""
    for name, value in (("GRACE_S", 600.0), ("MANY", 4), ("MOST", 8)):
        monkeypatch.setattr(strangers, name, value)
    kit = Kit(lambda: StreamTransport(connect_timeout_s=600))
    async with kit.pair() as (receiver, writer, remote, _), AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(stranger(receiver)) for _ in range(12)]
        async with asyncio.timeout(60):
            for other in silent[:4]:
                assert await other.is_sent_away()
            late = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
            await writer.write(late, [receiver.slice(b"late", 0)])
            await writer.write(remote, [receiver.slice(b"fine", 4)])
        assert receiver.holds(b"latefine", 0) and len(receiving(receiver).greeting) == 7
        for other in silent[5:]:
            other.writer.write(hello(receiver))
            await other.hear()
