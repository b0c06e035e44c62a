"""Connections on which nobody asks anything, or reads any answer, end: each holds a descriptor, and needs no key."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import pytest
from aiohttp import web
from http_fakes import ScriptedBackend

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


async def test_nobody_may_leave_the_last_of_an_answer_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an answer of which less than 64 KiB did not fit into the kernel's buffers a write did not wait, and the
    connection could not be closed before somebody read it."""
    monkeypatch.setattr(peer, "STUCK_S", 0.05)
    written = sending.wait_for_all

    def into_small_buffers(request: web.Request) -> None:
        assert request.transport is not None
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        written(request)

    cut, taken = asyncio.Event(), sending.taken

    async def watched(*what: Any) -> None:
        try:
            await taken(*what)
        except asyncio.CancelledError:
            cut.set()
            raise

    monkeypatch.setattr(sending, "wait_for_all", into_small_buffers)
    monkeypatch.setattr(sending, "taken", watched)
    async with peer.MetricsServer(lambda: "x" * 50_000, lambda: (True, "ok"), "127.0.0.1", 0) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.wait_for(cut.wait(), 60)


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
