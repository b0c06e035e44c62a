"""What is particular to plain TCP: broken frames, leases that end in mid-chunk, silent peers, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from aiodisagg.errors import ConfigError, PeerGone, TransportUnavailable, WriteFailed
from aiodisagg.transport.base import Remote, Slice, Transport
from aiodisagg.transport.chunks import Chunk, Gone, Hello, Placed, Rejected, Welcome, decode
from aiodisagg.transport.description import pack, unpack
from aiodisagg.transport.stream import StreamTransport, _Pool, _Receiving
from aiodisagg.transport.testing import Kit, Receiver
from aiodisagg.transport.wire import FRAME_BYTES, frame
from tests.conftest import LOOPS
from tests.transport.certificate import contexts

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]


class Stranger:
    """Some program at the other end of a TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def hear(self) -> object:
        data = await asyncio.wait_for(self.reader.readexactly(FRAME_BYTES), 60)
        end = 2 + int.from_bytes(data[:2], "big")
        if end > FRAME_BYTES:
            data += await asyncio.wait_for(self.reader.readexactly(end - FRAME_BYTES), 60)
        return decode(data[2:end])

    async def is_sent_away(self) -> bool:
        try:
            return await asyncio.wait_for(self.reader.read(), 60) == b""
        except ConnectionError:
            return True


@asynccontextmanager
async def stranger(receiver: Receiver) -> AsyncIterator[Stranger]:
    port = unpack("stream", _Pool, receiver.transport.describe()).port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Stranger(reader, writer)
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@asynccontextmanager
async def server() -> AsyncIterator[tuple[asyncio.Queue[Stranger], bytes]]:
    """A peer that does what the test says; its connections, and a description of it."""
    accepted: asyncio.Queue[Stranger] = asyncio.Queue()
    writers: list[asyncio.StreamWriter] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        accepted.put_nowait(Stranger(reader, writer))

    listening = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield accepted, pack("stream", _Pool("127.0.0.1", listening.sockets[0].getsockname()[1], "p", b"t"))
    finally:
        listening.close()
        for writer in writers:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def receiving(receiver: Receiver) -> _Receiving:
    found = receiver.transport._receiving  # type: ignore[attr-defined]
    assert isinstance(found, _Receiving)
    return found


def hello(receiver: Receiver, writer: str = "x") -> bytes:
    """What the receiver wants to hear first."""
    token = unpack("stream", _Pool, receiver.transport.describe()).token
    return frame(Hello(writer, receiver.incarnation, token))


async def connect_in_the_end(writer: Transport, receiver: Receiver) -> Remote:
    """To a receiver that bears strangers so shortly that a busy machine may be too slow for it, now and then."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(PeerGone):
                return await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)


def unlent(data: bytes) -> Slice:
    return Slice(memoryview(data), 0, 1)


async def test_broken_streams_end_and_hurt_nobody(no_leaks: None) -> None:
    async with Kit(StreamTransport).pair() as (receiver, writer, remote, _):
        for data in (
            b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n".ljust(FRAME_BYTES),
            b"\0" * FRAME_BYTES,
            b"\xff" * FRAME_BYTES,
            frame(Placed(3)),
            frame(Chunk(1, 1, 0, -5, 1)),
        ):
            async with stranger(receiver) as other:
                other.writer.write(data)
                assert await other.is_sent_away()
        async with stranger(receiver) as other:
            other.writer.write(hello(receiver)[:10])  # and then nothing more
        await writer.write(remote, [receiver.slice(b"fine", 0)])
        assert receiver.holds(b"fine", 0)
        assert receiver.untouched(4)


async def test_who_does_not_greet_is_sent_away_in_time(no_leaks: None) -> None:
    kit = Kit(lambda: StreamTransport(connect_timeout_s=0.2))
    async with kit.receiver() as receiver, Kit(StreamTransport).writer() as (writer, _):
        remote = await connect_in_the_end(writer, receiver)
        for words in (b"", hello(receiver)[:10]):
            async with stranger(receiver) as other:
                other.writer.write(words)
                assert await other.is_sent_away()
        while True:
            async with stranger(receiver) as other:
                other.writer.write(frame(Hello("x", receiver.incarnation, b"guessed")))
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # too late
                    assert isinstance(await other.hear(), Gone)
                    assert await other.is_sent_away()
                    break
        assert not receiving(receiver).greeting, "and those who did greet are not waited for"
        await writer.write(remote, [receiver.slice(b"fine", 0)])
        assert receiver.holds(b"fine", 0)


async def test_who_begins_no_tls_is_sent_away_in_time(no_leaks: None) -> None:
    """The connection is no transport's yet while its handshake lasts; the loop alone would wait a minute for it."""
    kit = Kit(lambda: StreamTransport(tls=contexts(), connect_timeout_s=0.2))
    async with kit.receiver() as receiver, stranger(receiver) as other:
        async with asyncio.timeout(20):
            assert await other.is_sent_away()


async def test_the_incarnation_is_not_told_and_not_enough(no_leaks: None) -> None:
    async with Kit(StreamTransport).receiver() as receiver, Kit(StreamTransport).writer() as (writer, _):
        pool = unpack("stream", _Pool, receiver.transport.describe())
        for expected, token in (
            ("?", b""),
            ("?", pool.token),
            (receiver.incarnation, b""),
            (receiver.incarnation, b"x" * 16),
        ):
            async with stranger(receiver) as other:
                other.writer.write(frame(Hello("x", expected, token)))
                answer = await other.hear()
                assert isinstance(answer, Gone) and receiver.incarnation not in answer.message
        thief = pack("stream", msgspec.structs.replace(pool, token=b"x" * 16))
        with pytest.raises(PeerGone, match="another incarnation"):
            await writer.connect(thief, peer=receiver.incarnation)


async def test_a_chunk_before_the_greeting_ends_its_connection(no_leaks: None) -> None:
    async with Kit(StreamTransport).receiver() as receiver, stranger(receiver) as other:
        data = receiver.slice(b"evil", 0)
        other.writer.write(frame(Chunk(receiving(receiver)._session, 1, 0, 4, data.lease)) + b"evil")
        assert await other.is_sent_away()
        assert receiver.untouched()


async def test_the_kernel_looks_after_hosts_that_vanish(no_leaks: None) -> None:
    async with Kit(lambda: StreamTransport(stall_s=40)).pair() as (receiver, _, _remote, _name):
        wires = list(receiving(receiver).wires)
        assert len(wires) == 2
        for wire in wires:
            assert wire._transport is not None
            sock: socket.socket = wire._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            options = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            found = [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, one)) for one in options]
            assert found == [10, 10, 3, 40_000]


async def test_refused_chunks_are_read_and_dropped(no_leaks: None) -> None:
    async with Kit(StreamTransport).receiver() as receiver, stranger(receiver) as other:
        other.writer.write(hello(receiver, "x" * 300))  # longer than the usual frame
        welcome = await other.hear()
        assert isinstance(welcome, Welcome)
        lease = receiver.lender.lend(0, 100)
        for number, (session, offset, size, under) in enumerate(
            [(1, 0, 4, lease), (0, 0, 4, lease + 1), (0, -4, 4, lease), (0, 2**60, 4, lease), (0, 0, 900_000, lease)]
        ):
            other.writer.write(frame(Chunk(welcome.session + session, number, offset, size, under)) + b"d" * size)
            answer = await other.hear()
            assert isinstance(answer, Rejected)
            assert (answer.number, answer.gone) == (number, session == 1)
        end = receiver.arena.size_bytes
        across = receiver.lender.lend(end - 2, 4)  # its owner would let it happen
        other.writer.write(frame(Chunk(welcome.session, 8, end - 2, 4, across)) + b"over")
        assert isinstance(await other.hear(), Rejected)
        assert receiver.untouched()
        other.writer.write(frame(Chunk(welcome.session, 9, 0, 4, lease)) + b"good")
        assert await other.hear() == Placed(9)
        other.writer.write(frame(Chunk(welcome.session, 10, 50, 0, lease)))
        assert await other.hear() == Placed(10)
        assert receiver.holds(b"good", 0)


async def test_a_lease_that_ends_in_mid_chunk_is_respected(no_leaks: None) -> None:
    async with Kit(StreamTransport).receiver() as receiver, stranger(receiver) as other:
        other.writer.write(hello(receiver))
        welcome = await other.hear()
        assert isinstance(welcome, Welcome)
        lease, mark = receiver.lender.lend(0, 1000), receiver.lender.lend(2000, 4)
        async with stranger(receiver) as second:
            second.writer.write(hello(receiver))
            assert isinstance(await second.hear(), Welcome)
            other.writer.write(frame(Chunk(welcome.session, 1, 0, 1000, lease)) + b"d" * 500)
            while not receiver.holds(b"d" * 500, 0):  # a round trip on another connection turns the receiver's loop
                second.writer.write(frame(Chunk(welcome.session, 2, 2000, 4, mark)) + b"mark")
                await second.hear()
        receiver.lender.withdraw(lease)
        await receiver.transport.revoke("x", [lease])
        receiver.arena.view[:1000] = b"\x33" * 1000
        other.writer.write(b"d" * 500)
        assert isinstance(await other.hear(), Rejected)
        assert receiver.holds(b"\x33" * 1000, 0)


async def test_an_owner_whose_admit_fails_refuses(caplog: pytest.LogCaptureFixture, no_leaks: None) -> None:
    async with Kit(StreamTransport).pair() as (receiver, writer, remote, _):
        lent = receiver.slice(b"x", 0)
        receiver.lender._lent = None  # type: ignore[assignment]  # the owner's bug
        with pytest.raises(Exception, match="does not cover"):
            await writer.write(remote, [lent])
        assert "admit failed" in caplog.text


async def test_a_peer_that_never_answers_is_given_up(no_leaks: None) -> None:
    kit = Kit(lambda: StreamTransport(stall_s=0.2))
    async with kit.writer() as (writer, _), server() as (accepted, description):
        connecting = asyncio.ensure_future(writer.connect(description, peer="p"))
        for _ in range(2):  # one connection for small writes, one for the others
            other = await accepted.get()
            assert isinstance(await other.hear(), Hello)
            other.writer.write(frame(Welcome(1, 1 << 24)))
        remote = await connecting
        with pytest.raises(WriteFailed, match="no answer"):
            await asyncio.wait_for(writer.write(remote, [unlent(b"x" * (16 << 20))]), 60)
        await asyncio.wait_for(writer.fence(remote), 60)
        with pytest.raises(PeerGone):
            await writer.write(remote, [unlent(b"x")])


@pytest.mark.parametrize(
    "answer", [b"\xff" * FRAME_BYTES, frame(Placed(0)), frame(Hello("a", "b", b"c"))], ids=range(3)
)
async def test_a_peer_that_talks_nonsense_is_gone(answer: bytes, no_leaks: None) -> None:
    async with Kit(StreamTransport).writer() as (writer, _), server() as (accepted, description):
        connecting = asyncio.ensure_future(writer.connect(description, peer="p"))
        (await accepted.get()).writer.write(answer)
        with pytest.raises(PeerGone, match=r"protocol|4 KiB"):
            await connecting


async def test_a_small_write_does_not_wait_for_a_huge_one_that_is_stuck(no_leaks: None) -> None:
    async with Kit(StreamTransport).writer() as (writer, _), server() as (accepted, description):
        connecting = asyncio.ensure_future(writer.connect(description, peer="p"))
        others = []
        for _ in range(2):
            others.append(await accepted.get())
            assert isinstance(await others[-1].hear(), Hello)
            others[-1].writer.write(frame(Welcome(1, 1 << 26)))
        remote = await connecting
        huge = asyncio.ensure_future(writer.write(remote, [unlent(b"x" * (64 << 20))]))
        assert isinstance(await others[1].hear(), Chunk)  # and reads no further: the kernel's buffers are soon full
        small = asyncio.ensure_future(writer.write(remote, [unlent(b"y" * 1000)]))
        chunk = await others[0].hear()
        assert isinstance(chunk, Chunk) and await others[0].reader.readexactly(1000) == b"y" * 1000
        others[0].writer.write(frame(Placed(chunk.number)))
        await asyncio.wait_for(small, 60)
        assert not huge.done()
        huge.cancel()
        await asyncio.gather(huge, return_exceptions=True)


async def test_one_lost_connection_of_two_loses_the_peer(no_leaks: None) -> None:
    """Also while the second one is being made: nothing of the first may be left."""
    async with Kit(StreamTransport).writer() as (writer, _), server() as (accepted, description):
        for lost in (0, 1):
            connecting = asyncio.ensure_future(writer.connect(description, peer="p"))
            others = []
            for _ in range(2):
                others.append(await accepted.get())
                assert isinstance(await others[-1].hear(), Hello)
                if len(others) == 2 and not lost:
                    others[0].writer.close()
                    with pytest.raises(PeerGone):
                        await connecting
                else:
                    others[-1].writer.write(frame(Welcome(1, 1 << 24)))
            if lost:
                remote = await connecting
                others[1].writer.close()
                with pytest.raises(PeerGone):
                    while True:
                        await writer.write(remote, [unlent(b"x" * (2 << 20))])
                with pytest.raises(PeerGone):
                    await writer.write(remote, [unlent(b"x")])
            for other in others:
                assert await other.is_sent_away()


async def test_silence_and_refusal_on_connect_are_gone(no_leaks: None) -> None:
    kit = Kit(lambda: StreamTransport(connect_timeout_s=0.2))
    async with kit.writer() as (writer, _):
        async with server() as (accepted, description):
            with pytest.raises(PeerGone, match=r"0\.2 s"):
                await writer.connect(description, peer="p")
            await accepted.get()
        for _ in range(2):
            with pytest.raises(PeerGone, match="cannot connect"):
                await writer.connect(description, peer="p")
        with pytest.raises(PeerGone):
            await writer.connect(pack("stream", _Pool("127.0.0.1", 70_000, "p", b"t")), peer="p")
        with pytest.raises(TransportUnavailable, match="not an IP address"):
            await writer.connect(pack("stream", _Pool("example.org", 1, "p", b"t")), peer="p")


async def test_another_incarnation_behind_the_same_port(no_leaks: None) -> None:
    kit = Kit(StreamTransport)
    async with kit.writer() as (writer, _):
        async with kit.receiver() as old:
            description = old.transport.describe()
            port = unpack("stream", _Pool, description).port
            remote = await writer.connect(description, peer=old.incarnation)
            late = old.slice(b"late", 0)
        async with Kit(lambda: StreamTransport(port=port)).receiver() as new:
            assert new.lender.lend(0, 4) == late.lease
            with pytest.raises(PeerGone, match="lost"):
                for _ in range(1000):
                    await writer.write(remote, [late])
            with pytest.raises(PeerGone, match="incarnation"):
                await writer.connect(description, peer=old.incarnation)
            assert new.untouched()
            with pytest.raises(TransportUnavailable, match="cannot listen"):
                async with Kit(lambda: StreamTransport(port=port)).receiver():
                    pass


async def test_options_are_checked(no_leaks: None) -> None:
    for key, options in (
        ("host", {"host": "localhost"}),
        ("advertise", {"advertise": "example.org"}),
        ("window", {"window": 0}),
        ("chunk_bytes", {"chunk_bytes": 0}),
    ):
        with pytest.raises(ConfigError, match=key):
            StreamTransport(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="advertise"):
        async with Kit(lambda: StreamTransport(host="0.0.0.0")).receiver():
            pass
    async with Kit(lambda: StreamTransport(host="::1")).pair() as (receiver, writer, remote, _):
        await writer.write(remote, [receiver.slice(b"six", 0)])
        assert receiver.holds(b"six", 0)
