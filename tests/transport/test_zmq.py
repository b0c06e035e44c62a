"""What is particular to ZMQ: strangers on the port, restarts behind one port, stalled peers, credit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import zmq

from aiodisagg.errors import ConfigError, PeerGone, TransportUnavailable, WriteFailed, WriteRefused
from aiodisagg.transport.base import Slice
from aiodisagg.transport.chunks import Chunk, Gone, Hello, Placed, Rejected, Welcome, decode, encode
from aiodisagg.transport.description import pack, unpack
from aiodisagg.transport.testing import Kit, Receiver
from aiodisagg.transport.zmq import ZmqTransport, _Pool
from tests.conftest import LOOPS

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]


class Stranger:
    """A bare ZMQ socket of some program; blocking calls run on a thread."""

    def __init__(self, sock: zmq.Socket[bytes]) -> None:
        self.sock = sock

    async def say(self, *frames: bytes) -> None:
        await asyncio.to_thread(self.sock.send_multipart, frames)

    async def welcome_both(self) -> None:
        """A writer has two connections: one for small writes, one for the others."""
        for _ in range(2):
            identity, *_ = await asyncio.to_thread(self.sock.recv_multipart)
            await self.say(identity, encode(Welcome(1, 1 << 24)))

    async def hear(self) -> object:
        return decode((await asyncio.to_thread(self.sock.recv_multipart))[-1])


@asynccontextmanager
async def stranger(kind: zmq.SocketType, port: int | None) -> AsyncIterator[tuple[Stranger, int]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sock = context.socket(kind)
    sock.setsockopt(zmq.RCVTIMEO, 10_000)
    sock.setsockopt(zmq.LINGER, 0)
    if port is None:
        port = sock.bind_to_random_port("tcp://127.0.0.1")
    else:
        sock.connect(f"tcp://127.0.0.1:{port}")
    try:
        yield Stranger(sock), port
    finally:
        context.destroy(linger=0)


def unlent(data: bytes) -> Slice:
    return Slice(memoryview(data), 0, 1)


def port_of(receiver: Receiver) -> int:
    return unpack("zmq", _Pool, receiver.transport.describe()).port


async def test_bad_frames_are_answered_and_hurt_nobody(caplog: pytest.LogCaptureFixture, no_leaks: None) -> None:
    caplog.set_level(logging.WARNING, "aiodisagg")
    async with (
        Kit(ZmqTransport).pair() as (receiver, writer, remote, _),
        stranger(zmq.DEALER, port_of(receiver)) as (other, _port),
    ):
        for frames in ((b"",), (b"nonsense",), (b"x" * 100_000,), (encode(Placed(1)), b"more", b"and more")):
            await other.say(*frames)
            assert await other.hear() == Rejected(-1, False, "not understood")
        assert len(caplog.records) == 4, "one message is one message, whatever it has behind its header"
        pool = unpack("zmq", _Pool, receiver.transport.describe())
        for expected, guess in (("?", pool.token), (receiver.incarnation, b""), (receiver.incarnation, b"x" * 16)):
            await other.say(encode(Hello("me", expected, guess)))
            answer = await other.hear()
            assert isinstance(answer, Gone) and receiver.incarnation not in answer.message
        with pytest.raises(PeerGone, match="another incarnation"):
            thief = msgspec.structs.replace(pool, token=b"x" * 16)
            await writer.connect(pack("zmq", thief), peer=receiver.incarnation)
        await other.say(encode(Hello("me", receiver.incarnation, pool.token)))
        welcome = await other.hear()
        assert isinstance(welcome, Welcome)
        lease = receiver.lender.lend(0, 100)

        async def refused(chunk: Chunk, *payload: bytes) -> bool:
            await other.say(encode(chunk), *payload)
            answer = await other.hear()
            return isinstance(answer, Rejected) and answer.number == chunk.number

        assert await refused(Chunk(welcome.session + 1, 1, 0, 4, lease), b"data"), "another session"
        assert await refused(Chunk(welcome.session, 2, 0, 4, lease)), "no payload"
        assert await refused(Chunk(welcome.session, 3, 0, 4, lease + 1), b"data"), "no such lease"
        assert await refused(Chunk(welcome.session, 4, -4, 4, lease), b"data"), "before the pool"
        assert await refused(Chunk(welcome.session, 5, 2**60, 4, lease), b"data"), "behind the pool"
        assert await refused(Chunk(welcome.session, 6, 0, 101, lease), b"d" * 101), "wider than lent"
        assert receiver.untouched()
        assert await refused(Chunk(welcome.session, 7, 0, 4, lease), b"d" * 400), "more than announced"
        assert receiver.untouched(4)
        await other.say(encode(Chunk(welcome.session, 8, 0, 4, lease)), b"good", b"surplus")
        assert await other.hear() == Placed(8)
        await writer.write(remote, [receiver.slice(b"fine", 200)])
        assert receiver.holds(b"good", 0)
        assert receiver.holds(b"fine", 200)


async def test_a_message_larger_than_a_chunk_ends_its_connection_only(no_leaks: None) -> None:
    kit = Kit(lambda: ZmqTransport(chunk_bytes=1 << 16))
    async with kit.pair() as (receiver, writer, remote, _), stranger(zmq.DEALER, port_of(receiver)) as (other, _port):
        monitor = other.sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        await other.say(b"x" * (1 << 20))
        assert await asyncio.to_thread(monitor.poll, 10_000)
        other.sock.disable_monitor()
        monitor.close()
        await writer.write(remote, [receiver.slice(b"f" * 300_000, 0)])
        assert receiver.holds(b"f" * 300_000, 0)


async def test_another_incarnation_behind_the_same_port(no_leaks: None) -> None:
    kit = Kit(ZmqTransport)
    async with kit.writer() as (writer, _):
        async with kit.receiver() as old:
            port, description = port_of(old), old.transport.describe()
            remote = await writer.connect(description, peer=old.incarnation)
            late = old.slice(b"late", 0)
        async with Kit(lambda: ZmqTransport(port=port)).receiver() as new:
            assert port_of(new) == port
            lease = new.lender.lend(0, 4)
            assert lease == late.lease, "the new process numbers its leases like the old one"
            with pytest.raises(PeerGone):
                for _ in range(1000):
                    await writer.write(remote, [late])
            with pytest.raises(PeerGone, match="incarnation"):
                await writer.connect(description, peer=old.incarnation)
            assert new.untouched()


async def test_a_peer_that_never_answers_is_given_up(no_leaks: None) -> None:
    kit = Kit(lambda: ZmqTransport(connect_timeout_s=5, stall_s=0.2))
    async with kit.writer() as (writer, _), stranger(zmq.ROUTER, None) as (other, port):
        description = pack("zmq", _Pool("127.0.0.1", port, "p", b"t", b""))
        connecting = asyncio.ensure_future(writer.connect(description, peer="p"))
        await other.welcome_both()
        remote = await connecting
        write = asyncio.ensure_future(writer.write(remote, [unlent(b"x" * 100_000)]))
        with pytest.raises(WriteFailed, match="no answer"):
            await asyncio.wait_for(write, 60)
        await asyncio.wait_for(writer.fence(remote), 60)
        with pytest.raises(PeerGone):
            await writer.write(remote, [unlent(b"x")])


async def test_no_more_than_the_window_is_under_way(no_leaks: None) -> None:
    kit = Kit(lambda: ZmqTransport(chunk_bytes=1000, window=3))
    async with kit.writer() as (writer, _), stranger(zmq.ROUTER, None) as (other, port):
        description = pack("zmq", _Pool("127.0.0.1", port, "p", b"t", b""))
        connecting = asyncio.ensure_future(writer.connect(description, peer="p"))
        await other.welcome_both()
        remote = await connecting
        write = asyncio.ensure_future(writer.write(remote, [unlent(b"x" * 10_000)]))
        for number in range(10):
            if number == 0:
                for _ in range(3):
                    identity, *_ = await asyncio.to_thread(other.sock.recv_multipart)
                other.sock.setsockopt(zmq.RCVTIMEO, 100)
                with pytest.raises(zmq.Again):
                    await other.hear()
                other.sock.setsockopt(zmq.RCVTIMEO, 10_000)
            await other.say(identity, encode(Placed(number)))
            if number < 7:
                await other.hear()
        await asyncio.wait_for(write, 60)


async def test_a_small_write_does_not_wait_for_a_huge_one_without_credit(no_leaks: None) -> None:
    kit = Kit(lambda: ZmqTransport(chunk_bytes=2 << 20, window=1))
    async with kit.writer() as (writer, _), stranger(zmq.ROUTER, None) as (other, port):
        description = pack("zmq", _Pool("127.0.0.1", port, "p", b"t", b""))
        connecting = asyncio.ensure_future(writer.connect(description, peer="p"))
        await other.welcome_both()
        remote = await connecting
        huge = asyncio.ensure_future(writer.write(remote, [unlent(b"x" * (8 << 20))]))
        first, *_ = await asyncio.to_thread(other.sock.recv_multipart)  # never answered
        small = asyncio.ensure_future(writer.write(remote, [unlent(b"y" * 1000)]))
        second, _, payload = await asyncio.to_thread(other.sock.recv_multipart)
        assert second != first and payload == b"y" * 1000
        await other.say(second, encode(Placed(0)))
        await asyncio.wait_for(small, 60)
        assert not huge.done()
        huge.cancel()
        await asyncio.gather(huge, return_exceptions=True)


async def test_a_peer_that_makes_up_answers_is_gone(no_leaks: None) -> None:
    async with Kit(ZmqTransport).writer() as (writer, _), stranger(zmq.ROUTER, None) as (other, port):
        description = pack("zmq", _Pool("127.0.0.1", port, "p", b"t", b""))
        connecting = asyncio.ensure_future(writer.connect(description, peer="p"))
        identity = (await asyncio.to_thread(other.sock.recv_multipart))[0]
        await other.say(identity, b"gibberish")
        with pytest.raises(PeerGone, match="protocol"):
            await connecting


async def test_silence_on_connect_is_gone(no_leaks: None) -> None:
    kit = Kit(lambda: ZmqTransport(connect_timeout_s=0.2))
    async with kit.writer() as (writer, _), stranger(zmq.ROUTER, None) as (_other, port):
        with pytest.raises(PeerGone, match=r"0\.2 s"):
            await writer.connect(pack("zmq", _Pool("127.0.0.1", port, "p", b"t", b"")), peer="p")
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    async with server, Kit(ZmqTransport).writer() as (writer, _):
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PeerGone):
            await writer.connect(pack("zmq", _Pool("127.0.0.1", port, "p", b"t", b"")), peer="p")


async def test_addresses_are_checked(no_leaks: None) -> None:
    with pytest.raises(ConfigError, match="host"):
        ZmqTransport(host="localhost")
    with pytest.raises(ConfigError, match="advertise"):
        ZmqTransport(advertise="example.org")
    with pytest.raises(ConfigError, match="window"):
        ZmqTransport(window=0)
    kit = Kit(ZmqTransport)
    async with kit.receiver() as receiver, kit.writer() as (writer, _):
        with pytest.raises(TransportUnavailable, match="cannot listen"):
            async with Kit(lambda: ZmqTransport(port=port_of(receiver))).receiver():
                pass
        with pytest.raises(TransportUnavailable, match="not an IP address"):
            await writer.connect(pack("zmq", _Pool("example.org", 1, "p", b"t", b"")), peer="p")
    with pytest.raises(ConfigError, match="advertise"):
        async with Kit(lambda: ZmqTransport(host="0.0.0.0")).receiver():
            pass
    async with Kit(lambda: ZmqTransport(host="0.0.0.0", advertise="127.0.0.1")).pair() as (receiver, writer, remote, _):
        await writer.write(remote, [receiver.slice(b"x", 0)])


async def test_without_the_key_nobody_gets_in(no_leaks: None) -> None:
    kit, hasty = Kit(lambda: ZmqTransport(encrypt=True)), Kit(lambda: ZmqTransport(encrypt=True, connect_timeout_s=1))
    async with kit.receiver() as receiver, kit.writer() as (writer, _), hasty.writer() as (intruder, _):
        pool = unpack("zmq", _Pool, receiver.transport.describe())
        assert len(pool.server_key) == 40
        for key, why in ((zmq.curve_keypair()[0], "lost|no answer"), (b"short", "cannot connect")):
            forged = msgspec.structs.replace(pool, server_key=key)
            with pytest.raises(PeerGone, match=why):
                await intruder.connect(pack("zmq", forged), peer=receiver.incarnation)
        async with Kit(lambda: ZmqTransport(connect_timeout_s=1)).writer() as (open_writer, _):
            with pytest.raises(PeerGone):
                forged = msgspec.structs.replace(pool, server_key=b"")
                await open_writer.connect(pack("zmq", forged), peer=receiver.incarnation)
        remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        with pytest.raises(WriteRefused):
            await writer.write(remote, [unlent(b"x")])


@pytest.mark.parametrize("encrypt", [False, True])
async def test_a_peer_with_curve_and_one_without_never_connect(encrypt: bool, no_leaks: None) -> None:
    """A writer that wanted encryption sent its bytes in the clear to a receiver that had none."""
    ours, theirs = Kit(lambda: ZmqTransport(encrypt=encrypt)), Kit(lambda: ZmqTransport(encrypt=not encrypt))
    async with theirs.receiver() as receiver, ours.writer() as (writer, _):
        with pytest.raises(TransportUnavailable, match="CURVE"):
            await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)


async def test_who_says_nothing_is_sent_away_in_time(no_leaks: None) -> None:
    """libzmq would wait for 30 seconds."""
    async with Kit(lambda: ZmqTransport(connect_timeout_s=0.5)).receiver() as receiver:
        silent = [await asyncio.open_connection("127.0.0.1", port_of(receiver)) for _ in range(3)]
        silent[0][1].write(b"\xff\0\0\0")
        async with asyncio.timeout(20):
            for reader, writer in silent:
                with contextlib.suppress(ConnectionError):
                    while await reader.read(1024):
                        pass
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
