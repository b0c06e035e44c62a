"""Connections on which nobody asks anything end: each holds a descriptor, and needs no key."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from http_fakes import ScriptedBackend

from aiodisagg.api import server as api
from aiodisagg.bootstrap import server as bootstrap
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
