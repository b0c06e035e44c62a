"""What is mooncake's own: no RDMA is an error, silence costs one thread, promises are checked, the end is quick."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from aiodisagg import strangers
from aiodisagg.bench.watch import LoopWatch
from aiodisagg.errors import ConfigError, PeerGone, TransportUnavailable, WriteRefused
from aiodisagg.transport import mooncake_engine
from aiodisagg.transport.base import Slice, Transport
from aiodisagg.transport.description import pack, unpack
from aiodisagg.transport.mooncake import MooncakeTcpTransport, MooncakeTransport
from aiodisagg.transport.mooncake_greeting import Pool
from aiodisagg.transport.mooncake_side import Attached, Check, Checked, Message, Wire
from aiodisagg.transport.testing import Kit
from tests.transport.test_mooncake import engine_imported

__all__ = ["engine_imported"]

pytestmark = pytest.mark.anyio
no_device = pytest.mark.skipif(Path("/sys/class/infiniband").is_dir(), reason="this machine has an RDMA device")

KIT = Kit(MooncakeTcpTransport)


async def refuses_to_open(transport: MooncakeTransport) -> str:
    with pytest.raises(TransportUnavailable) as found:
        await transport.open(None, lambda offset, size, lease: False, incarnation="me")
    await transport.aclose()
    return str(found.value)


@no_device
async def test_rdma_that_is_not_there_is_an_error(no_leaks: None) -> None:
    assert "no RDMA device" in await refuses_to_open(MooncakeTransport())


@no_device
async def test_a_device_that_cannot_be_used_is_no_reason_for_tcp(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_leaks: None
) -> None:
    (tmp_path / "mlx5_0").touch()
    monkeypatch.setattr(mooncake_engine, "_HCAS", tmp_path)
    assert "no usable RDMA device" in await refuses_to_open(MooncakeTransport())
    monkeypatch.setattr(mooncake_engine, "_hcas", lambda topology: ["mlx5_0"])
    assert "does not start with rdma" in await refuses_to_open(MooncakeTransport())
    async with KIT.pair() as (receiver, writer, remote, _):  # and TCP still starts beside the failure
        await writer.write(remote, [receiver.slice(b"tcp", 0)])
        assert receiver.holds(b"tcp", 0)


async def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    for wrong in ({"progress_timeout_s": 0}, {"heartbeat_s": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            MooncakeTcpTransport(**wrong)  # type: ignore[arg-type]
    for host in ("0.0.0.0", "::1", "localhost"):
        assert host in await refuses_to_open(MooncakeTcpTransport(host=host))
    with pytest.raises(ConfigError, match="progress_timeout_s"):
        await MooncakeTcpTransport(progress_timeout_s=7).open(None, lambda *_: False, incarnation="me")
    monkeypatch.setenv("MC_LOG_DIR", "/nowhere")
    assert "MC_LOG_DIR" in await refuses_to_open(MooncakeTcpTransport())


@asynccontextmanager
async def impostor(talk: Callable[[Wire], Awaitable[None]]) -> AsyncIterator[bytes]:
    """The description of a receiver whose side connection ``talk`` serves."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await talk(Wire(reader, writer))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        yield pack("mooncake-tcp", Pool("127.0.0.1", port, "impostor", b"token"))
    finally:
        server.close()


async def test_an_engine_that_stays_silent_costs_one_thread(no_leaks: None) -> None:
    asked = asyncio.Event()
    left = asyncio.Event()

    async def silent_engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await left.wait()
        writer.close()

    engine = await asyncio.start_server(silent_engine, "127.0.0.1", 0)
    port = engine.sockets[0].getsockname()[1]

    async def talk(wire: Wire) -> None:
        await wire.hear()
        wire.say(Attached(1 << 20, 4096, port, 4096, []))
        await left.wait()

    async with impostor(talk) as description, KIT.receiver() as receiver:
        writer = MooncakeTcpTransport(connect_timeout_s=2)
        await writer.open(None, lambda *_: False, incarnation="me")
        remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        connecting = asyncio.ensure_future(writer.connect(description, peer="impostor"))
        await asked.wait()
        for number in range(20):  # the way to a peer that is well stays open
            await writer.write(remote, [receiver.slice(bytes([number]) * 100, 0)])
        assert not connecting.done()
        with pytest.raises(PeerGone, match="no answer in 2 s"):
            await connecting
        left.set()
        engine.close()
        await writer.aclose()


async def test_a_data_plane_that_leads_elsewhere_is_noticed(no_leaks: None) -> None:
    async with KIT.receiver() as receiver, KIT.writer() as (writer, _):
        opened = receiver.transport._engines[0]  # type: ignore[attr-defined]
        checks: list[Message | None] = []

        async def talk(wire: Wire) -> None:
            await wire.hear()
            place = opened.address(opened.place(7))
            wire.say(Attached(1 << 20, receiver.arena.address, opened.engine.port, place, []))
            checks.append(await wire.hear())
            wire.say(Checked(False))
            await wire.hear()

        async with impostor(talk) as description:
            with pytest.raises(TransportUnavailable, match="another process"):
                await writer.connect(description, peer="impostor")
        (check,) = checks
        assert isinstance(check, Check)
        assert opened.read(opened.place(7)) == check.nonce, "the check's bytes went through the engine"
        assert receiver.untouched()


async def test_the_next_life_at_an_address_gets_an_engine_of_its_own(no_leaks: None) -> None:
    """An engine never forgets a peer's data port; here it is told that it met an earlier life there."""
    async with KIT.receiver() as receiver, KIT.writer() as (writer, _):
        assert isinstance(writer, MooncakeTransport)
        segment = f"127.0.0.1:{receiver.transport._engines[0].engine.port}"  # type: ignore[attr-defined]
        writer._engines[0].lives[segment] = "earlier"
        for _ in range(2):
            remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
            await writer.write(remote, [receiver.slice(b"new life", 0)])
            assert receiver.holds(b"new life", 0)
            assert len(writer._engines) == 2
            await writer.disconnect(remote)


async def test_strangers_at_the_side_port_are_no_trouble(no_leaks: None) -> None:
    async with KIT.pair() as (receiver, writer, remote, _):
        pool = unpack("mooncake-tcp", Pool, receiver.transport.describe())
        for words in (b"", b"\xff" * 64, b"\0\0\0\x05hello", (2**31).to_bytes(4, "big"), b"\0\0\0\0"):
            reader, stream = await asyncio.open_connection(pool.host, pool.port)
            stream.write(words)
            stream.write_eof()
            assert await asyncio.wait_for(reader.read(), 60) == b""
            stream.close()
        thief = msgspec.structs.replace(pool, token=secrets.token_bytes(16))
        with pytest.raises(PeerGone):
            await writer.connect(pack("mooncake-tcp", thief), peer=receiver.incarnation)
        await writer.write(remote, [receiver.slice(b"as before", 0)])
        assert receiver.holds(b"as before", 0)


async def test_silent_strangers_make_room_for_each_other_and_for_writers(
    monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    """Each held a descriptor for ``connect_timeout_s``, however many came in that time."""
    monkeypatch.setattr(strangers, "MANY", 4)
    monkeypatch.setattr(strangers, "GRACE_S", 0.0)
    kit = Kit(lambda: MooncakeTcpTransport(connect_timeout_s=60))
    async with kit.receiver() as receiver, kit.writer() as (writer, _), asyncio.timeout(60):
        pool = unpack("mooncake-tcp", Pool, receiver.transport.describe())
        silent = [await asyncio.open_connection(pool.host, pool.port) for _ in range(6)]
        for reader, _ in silent[:2]:
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        await writer.write(remote, [receiver.slice(b"fine", 0)])
        assert receiver.holds(b"fine", 0)
        for _, stream in silent:
            stream.close()
            with contextlib.suppress(ConnectionError):
                await stream.wait_closed()


async def test_closing_does_not_freeze_the_loop(no_leaks: None) -> None:
    """The engine's destructor would hold the GIL for a second."""
    async with KIT.receiver() as receiver, KIT.writer() as (writer, _):
        remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        await writer.write(remote, [receiver.slice(b"x" * 100_000, 0)])
        closing = asyncio.ensure_future(_close(writer, receiver.transport))
        watch = LoopWatch()  # which knows what was not the loop's fault: other processes had the processor
        await closing
        for _ in range(3):  # it looks in the next turn, if one has been late
            await asyncio.sleep(0)
        worst = watch.take()
        watch.close()
        assert worst.held_ms < 500, f"one turn of the loop took {worst.held_ms:.0f} ms"


async def _close(*transports: Transport) -> None:
    for transport in transports:
        await transport.aclose()


async def test_a_small_write_is_not_stuck_behind_many_large_ones(no_leaks: None) -> None:
    size = 8 << 20
    kit = Kit(lambda: MooncakeTcpTransport(chunk_bytes=1 << 20))
    async with kit.pair(4 * size + 4096) as (receiver, writer, remote, _):
        source = bytearray(size)
        large = [
            asyncio.ensure_future(writer.write(remote, [receiver.slice(source, 4096 + number * size)]))
            for number in range(4)
        ]
        await writer.write(remote, [receiver.slice(b"small", 0)])
        assert not any(one.done() for one in large)
        await asyncio.gather(*large)


async def test_a_write_under_a_revoked_lease_is_refused_and_others_go_on(no_leaks: None) -> None:
    async with KIT.pair() as (receiver, writer, remote, name):
        item, other = receiver.slice(b"too late", 0), receiver.slice(b"fine", 100)
        async with asyncio.timeout(60):
            await receiver.transport.revoke(name, [item.lease])
        with pytest.raises(WriteRefused):
            await writer.write(remote, [Slice(other.source, 50, other.lease), item])
        await writer.write(remote, [other])
        assert receiver.holds(b"fine", 100) and receiver.untouched(0, 100)
