"""Connections on which nobody asks anything, or reads any answer, end: each holds a descriptor, and needs no key."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import struct
from typing import Any

import pytest
from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from http_fakes import HELLO, MODEL, ScriptedBackend, answer

from aiodisagg.api import HttpConfig
from aiodisagg.api import server as api
from aiodisagg.bootstrap import sending
from aiodisagg.bootstrap import server as bootstrap
from aiodisagg.bootstrap.registry import PeerRecord
from aiodisagg.link.hello import PeerRole
from aiodisagg.peer import http as peer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


def servers() -> list[tuple[Any, Any]]:
    return [
        (api, lambda: api.HttpServer(ScriptedBackend(), port=0)),
        (bootstrap, lambda: bootstrap.BootstrapServer("127.0.0.1", 0)),
        (peer, lambda: peer.MetricsServer(lambda: "", lambda: (True, "ok"), "127.0.0.1", 0)),
    ]


@pytest.mark.parametrize(("module", "make"), servers(), ids=["api", "bootstrap", "metrics"])
@pytest.mark.parametrize("said", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["nothing", "one request"])
async def test_a_connection_on_which_nobody_asks_ends(
    module: Any, make: Any, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEEPALIVE_S", 0.05)
    async with make() as server:
        port = int(server.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(said)
        heard = await asyncio.wait_for(reader.read(), 60)  # to its end
        assert heard.startswith(b"HTTP/1.1 200" if said else b"")
        writer.close()
        await writer.wait_closed()


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when a server has no connection any more to one of its clients."""
    event, connection_lost = asyncio.Event(), RequestHandler.connection_lost

    def lose(self: RequestHandler[web.Request], error: BaseException | None) -> None:
        connection_lost(self, error)
        event.set()

    monkeypatch.setattr(RequestHandler, "connection_lost", lose)
    return event


def nearly_deaf(server: Any) -> socket.socket:
    """A client of a server. The kernel holds little between the two of them."""
    listening = next(found for found in gc.get_objects() if isinstance(found, asyncio.Server) and found.sockets)
    listening.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of those that it accepts, too
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    return client


@pytest.mark.parametrize("streamed", [False, True])
async def test_nobody_may_leave_the_last_of_an_answer_unread(
    streamed: bool, lost: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an answer of which less than 64 KiB did not fit into the kernel's buffers a write did not wait, and the
    connection could not be closed before somebody read it."""
    monkeypatch.setattr(peer, "STUCK_S", 0.05)
    server: Any
    if streamed:
        server = api.HttpServer(ScriptedBackend(answer("x" * 50_000)), port=0, config=HttpConfig(write_timeout_s=0.05))
        body = json.dumps({"model": MODEL, "messages": HELLO, "stream": True})
        asked = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        asked += f"Content-Type: application/json\r\n\r\n{body}"
    else:
        server = peer.MetricsServer(lambda: "x" * 50_000, lambda: (True, "ok"), "127.0.0.1", 0)
        asked = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    async with server:
        with nearly_deaf(server) as client:
            client.sendall(asked.encode())
            await asyncio.wait_for(lost.wait(), 60)


class Talkative(ScriptedBackend):
    def metrics(self) -> str:
        return LONG


LONG = "# " + "x" * 500_000


@pytest.mark.parametrize("which", ["api", "bootstrap", "metrics"])
async def test_a_connection_on_which_nobody_reads_the_answers_ends(
    which: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was kept for as long as the client liked, with megabytes of the kernel's memory."""
    monkeypatch.setattr(bootstrap, "STUCK_S", 0.05)
    monkeypatch.setattr(peer, "STUCK_S", 0.05)
    server: Any
    if which == "api":
        server = api.HttpServer(Talkative(), port=0, config=HttpConfig(write_timeout_s=0.05))
    elif which == "metrics":
        server = peer.MetricsServer(lambda: LONG, lambda: (True, "ok"), "127.0.0.1", 0)
    else:
        server = bootstrap.BootstrapServer("127.0.0.1", 0)
        record = PeerRecord(name="a", incarnation="a", role=PeerRole.LANGUAGE, addresses=("x" * 250,) * 2_000)
        server.registry.register(record, 0.0)
    async with server:
        _reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]), limit=1)
        path = b"/v1/peers" if which == "bootstrap" else b"/metrics"
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(60):
                while True:
                    writer.write(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path)
                    await writer.drain()
        writer.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("which", ["metrics", "watch"])
async def test_a_large_answer_has_longer(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow line that takes it all the time was cut."""
    for module in (bootstrap, sending):
        monkeypatch.setattr(module, "SLOWEST_S", 1e-3)
    server: Any
    if which == "metrics":
        server, path = peer.MetricsServer(lambda: LONG, lambda: (True, "ok"), "127.0.0.1", 0), "/metrics"
    else:
        server, path = bootstrap.BootstrapServer("127.0.0.1", 0), "/v1/watch"
        record = PeerRecord(name="a", incarnation="a", role=PeerRole.LANGUAGE, addresses=("x" * 250,) * 2_000)
        server.registry.register(record, server._now())
    async with server:
        with nearly_deaf(server) as client:
            for module in (bootstrap, peer):
                monkeypatch.setattr(module, "STUCK_S", 0.0)  # what is not here at once has but that longer time
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            client.setblocking(False)
            came = 0
            while came < len(LONG):
                piece = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1 << 20), 60)
                assert piece, f"cut after {came} bytes"
                came += len(piece)


async def test_a_client_that_leaves_in_the_middle_of_an_answer_leaves_no_traceback(
    lost: asyncio.Event, caplog: pytest.LogCaptureFixture
) -> None:
    async with peer.MetricsServer(lambda: LONG, lambda: (True, "ok"), "127.0.0.1", 0) as server:
        with nearly_deaf(server) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            client.setblocking(False)
            assert await asyncio.get_running_loop().sock_recv(client, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await asyncio.wait_for(lost.wait(), 60)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
