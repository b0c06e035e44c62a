"""What a server does about bad clients, wrong addresses and its own end, and how `dial` says what went wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import stat
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from aiodisagg import strangers
from aiodisagg.errors import AuthenticationFailed, ConfigError, LinkClosed, LinkError, RemoteProtocolError
from aiodisagg.link import Hello, Link, LinkConfig, LinkServer, dial, framing
from aiodisagg.link import connection as connection_module
from aiodisagg.link import hello as hello_module
from aiodisagg.link.address import TcpAddress, UnixAddress, parse, reachable_host
from tests.link.helpers import SECRET, RawPeer, hello, word

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

CERTIFICATE = Path(__file__).parent / "localhost.pem"
"""Self-signed, with its key, for 127.0.0.1 and localhost; protects nothing."""

LONG = LinkConfig(handshake_timeout_s=60.0)


async def echo(link: Link) -> None:
    while True:
        await link.send(await link.recv())


def serve(
    address: str,
    *,
    on_link: Callable[[Link], Awaitable[None]] = echo,
    secret: bytes | None = SECRET,
    config: LinkConfig | None = None,
    **more: object,
) -> LinkServer:
    return LinkServer(address, lambda: hello("server"), on_link=on_link, secret=secret, config=config, **more)  # type: ignore[arg-type]


async def check(server: LinkServer, *, secret: bytes | None = SECRET, ssl: ssl.SSLContext | None = None) -> None:
    """A well-behaved client is served."""
    link = await dial(server.address, hello("good"), secret=secret, ssl=ssl)
    await link.send(word(1))
    assert await link.recv() == word(1)
    await link.aclose()


async def check_in_the_end(server: LinkServer) -> None:
    """The same of a server that bears strangers so shortly that a busy machine may be too slow for it, now and then."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(LinkError):
                return await check(server)


# -- bad clients ------------------------------------------------------------------------------------------------


async def test_a_wrong_secret_is_told_to_both_sides(address: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serve(address) as server:
        with pytest.raises(AuthenticationFailed, match="shared secret"):
            await dial(server.address, hello(), secret=b"not the right secret")
        await check(server)
    assert "shared secret" in caplog.text


async def test_a_silent_client_is_dropped(address: str) -> None:
    async with serve(address, config=LinkConfig(handshake_timeout_s=0.05)) as server:
        raw = await RawPeer.connect(server)
        await raw.end()
        await raw.aclose()
        await check_in_the_end(server)


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 64, framing.frame(framing.GREETING, b"\x93")])
async def test_a_client_that_sends_garbage_is_dropped_at_once(address: str, junk: bytes) -> None:
    async with serve(address, config=LONG) as server:
        raw = await RawPeer.connect(server)
        raw.writer.write(junk)
        assert b"protocol" in await raw.end()
        await raw.aclose()
        await check(server)


async def test_a_large_frame_is_refused_before_the_handshake(address: str) -> None:
    async with serve(address) as server:
        raw = await RawPeer.connect(server)
        raw.writer.write(framing.header(framing.HELLO, 1 << 20))
        assert b"131072 are allowed" in await raw.end()
        await raw.aclose()


async def test_silent_clients_cannot_lock_others_out(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "MANY", 2)
    monkeypatch.setattr(strangers, "GRACE_S", 0.0)
    async with serve(address, config=LONG) as server:
        silent = [await RawPeer.connect(server) for _ in range(3)]
        await silent[0].end()  # the oldest made room
        await check(server)
        await silent[1].end()
        assert server.links <= 3
        for raw in silent:
            await raw.aclose()


async def test_any_number_of_honest_clients_may_come_at_once(address: str) -> None:
    """The sixty-fifth ended the first, who was about to answer: of 200 that dialled at once, 136 failed."""
    async with serve(address, config=LONG) as server, asyncio.timeout(60):
        dialling = (dial(server.address, hello(f"e{n}"), secret=SECRET, config=LONG) for n in range(200))
        links = await asyncio.gather(*dialling)
        await asyncio.gather(*(link.aclose() for link in links))


async def test_another_version_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve(address) as server:
        raw = await RawPeer.connect(server)
        monkeypatch.setattr(hello_module, "PROTOCOL_VERSION", 9)
        shake = hello_module.Handshake(dialling=True, hello=hello(), secret=SECRET, nonce=bytes(32), peer="server")
        monkeypatch.undo()
        raw.writer.write(shake.greeting)
        assert b"speaks link version 9, not 1" in await raw.end()
        await raw.aclose()


async def test_without_a_secret_other_users_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign(sock: socket.socket, peer: str) -> None:
        raise AuthenticationFailed(peer, "its process runs as another user (4000000)")

    async with serve("unix:", secret=None) as server:
        await check(server, secret=None)
        with monkeypatch.context() as patch:
            patch.setattr(connection_module, "check_user", foreign)
            with pytest.raises(AuthenticationFailed, match="refused by the peer: runs as another user"):
                await dial(server.address, hello())
        with monkeypatch.context() as patch:
            patch.setattr("aiodisagg.link.link.check_user", foreign)
            with pytest.raises(AuthenticationFailed, match="4000000"):
                await dial(server.address, hello())
        await check(server, secret=None)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
async def test_the_kernel_says_who_connects() -> None:
    script = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.connect('\\0' + sys.argv[1]);"
        " data = s.recv(1000); assert b'another user' in data, data"
    )
    async with serve("unix:", secret=None) as server:
        name = server.address.removeprefix("unix:@")
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, name)
        assert await process.wait() == 0


async def test_a_handler_that_fails_closes_its_link_only(address: str, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(link: Link) -> None:
        if link.remote.name == "bad":
            raise RuntimeError("planted")
        await echo(link)

    async with serve(address, on_link=handler) as server:
        bad = await dial(server.address, hello("bad"), secret=SECRET)
        with pytest.raises(LinkClosed, match="closed by the peer"):
            await bad.recv()
        await bad.aclose()
        await check(server)
    assert "planted" in caplog.text


async def test_leaving_cancels_handlers_and_closes_links_and_handshakes(address: str) -> None:
    cancelled = asyncio.Event()

    async def handler(link: Link) -> None:
        try:
            await link.recv()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with serve(address, on_link=handler) as server:
        link = await dial(server.address, hello(), secret=SECRET)
        silent = await RawPeer.connect(server)
        await silent.until(framing.GREETING)
    assert cancelled.is_set()
    assert server.links == 0
    await silent.end()
    await silent.aclose()
    with pytest.raises(LinkClosed):
        await link.recv()
    await link.aclose()
    with pytest.raises(LinkError):
        await dial(server.address, hello(), secret=SECRET)


# -- dialling ---------------------------------------------------------------------------------------------------


async def test_nobody_listens(address: str, tmp_path: Path) -> None:
    async with serve(address) as server:
        gone = server.address
    with pytest.raises(LinkError, match="cannot connect"):
        await dial(gone, hello(), secret=SECRET)
    with pytest.raises(LinkError, match="No such file"):
        await dial(f"unix:{tmp_path}/none", hello(), secret=SECRET)


async def test_a_listener_that_says_nothing_times_out() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"tcp:127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(LinkError, match=r"no handshake within 0\.05 s"):
            await dial(address, hello(), secret=SECRET, config=LinkConfig(handshake_timeout_s=0.05))


async def test_something_else_listens() -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()
        writer.close()
        done.set()

    done = asyncio.Event()
    server = await asyncio.start_server(http, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(RemoteProtocolError):
        await dial(f"tcp:localhost:{port}", hello(), secret=SECRET)
    await done.wait()
    server.close()
    await server.wait_closed()


async def test_a_cancelled_dial_leaves_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve(address, config=LONG) as server:
        # A listener that accepts and never answers the greeting.
        asked = asyncio.Event()
        monkeypatch.setattr(hello_module.Handshake, "receive", lambda *_: asked.set())
        task = asyncio.create_task(dial(server.address, hello(), secret=SECRET))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("bad", ["", "tcp:host", "tcp::80", "tcp:host:99999", "http://host:1", "unix:" + "x" * 200])
def test_bad_addresses_are_config_errors(bad: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        parse(bad)


def test_addresses() -> None:
    assert parse("tcp:[::1]:80") == TcpAddress("::1", 80)
    assert str(parse("tcp:[::1]:80")) == "tcp:[::1]:80"
    assert parse("unix:@a") == UnixAddress("@a")
    assert parse("unix:") != parse("unix:")
    assert reachable_host("127.0.0.1") == "127.0.0.1"


# -- where a server listens -------------------------------------------------------------------------------------


async def test_without_a_secret_only_this_host_is_reachable() -> None:
    with pytest.raises(ConfigError, match="shared secret"):
        async with serve("tcp:0.0.0.0:0", secret=None):
            pass
    with pytest.raises(ConfigError, match="shared secret"):
        await dial("tcp:192.0.2.1:9", hello())
    async with serve("tcp:127.0.0.1:0", secret=None) as server:
        await check(server, secret=None)


async def test_a_wildcard_is_never_advertised(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve("tcp:0.0.0.0:0", advertise_host="10.1.2.3") as server:
        assert server.address.startswith("tcp:10.1.2.3:")
        assert not server.address.endswith(":0")
    monkeypatch.setattr("aiodisagg.link.server.reachable_host", lambda host: "127.0.0.1")
    async with serve("tcp:0.0.0.0:0") as server:
        await check(server)


async def test_a_port_in_use_is_named() -> None:
    async with serve("tcp:127.0.0.1:0") as server:
        with pytest.raises(ConfigError, match=server.address):
            async with serve(server.address):
                pass
        await check(server)


async def test_an_address_can_be_tried_before_it_is_needed(address: str) -> None:
    """Nobody can connect meanwhile, nothing stays behind, and what would fail later fails now."""
    async with serve(address) as server:
        taken = server.address
        with pytest.raises(ConfigError, match="cannot listen on"):
            await serve(taken).check()
        await check(server)
    later = serve(taken)
    await later.check()
    with pytest.raises(LinkError):
        await dial(taken, hello(), secret=SECRET)
    async with later:
        assert later.address == taken
        await check(later)


async def test_a_socket_file_is_private_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "link.sock"
    async with serve(f"unix:{path}") as server:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        await check(server)
        with pytest.raises(ConfigError, match=r"link\.sock"):
            async with serve(f"unix:{path}"):
                pass
        await check(server)
    assert not path.exists()


async def test_a_socket_file_of_a_dead_process_is_replaced_and_other_files_are_not(tmp_path: Path) -> None:
    path = tmp_path / "link.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serve(f"unix:{path}") as server:
        await check(server)
    path.write_text("precious")
    with pytest.raises(ConfigError):
        async with serve(f"unix:{path}"):
            pass
    assert path.read_text() == "precious"


async def test_tls() -> None:
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(CERTIFICATE)
    ours = ssl.create_default_context(cafile=str(CERTIFICATE))
    async with serve("tcp:127.0.0.1:0", ssl=theirs) as server:
        await check(server, ssl=ours)
        with pytest.raises(LinkError):
            await dial(server.address, hello(), secret=SECRET, ssl=ssl.create_default_context())


async def test_who_begins_no_tls_is_sent_away_in_time() -> None:
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(CERTIFICATE)
    async with serve("tcp:127.0.0.1:0", ssl=theirs, config=LinkConfig(handshake_timeout_s=0.2)) as server:
        _, host, port = server.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_a_hello_is_made_for_each_connection(address: str) -> None:
    names = iter(["first", "second"])

    def make() -> Hello:
        return hello(next(names))

    async with LinkServer(address, make, on_link=echo, secret=SECRET) as server:
        for name in ("first", "second"):
            link = await dial(server.address, hello(), secret=SECRET)
            assert link.remote.name == name
            await link.aclose()


async def test_leaving_does_not_wait_for_ever_for_what_a_handler_has_begun(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aiodisagg.link.server.LEAVE_S", 0.01)
    here = asyncio.Event()

    async def never_done(link: Link) -> None:
        here.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.Event().wait()  # a fence that has no end

    async with asyncio.timeout(30):
        async with serve(address, on_link=never_done) as server:
            link = await dial(server.address, hello("writer"), secret=SECRET)
            await here.wait()
        await link.aclose()
    assert "is left before all that was begun for it has ended" in caplog.text
