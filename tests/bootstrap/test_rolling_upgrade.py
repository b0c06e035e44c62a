"""Servers and peers of two releases: what one says and the other does not know harms nobody else."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from aiodisagg.bootstrap.client import BootstrapClient
from aiodisagg.bootstrap.registry import Load
from aiodisagg.bootstrap.server import BootstrapServer
from aiodisagg.link.hello import PeerRole
from tests.bootstrap.test_registry import record
from tests.bootstrap.test_server_and_client import until, watching

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@asynccontextmanager
async def watched(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """A server of which only the membership stream is of interest."""
    app = web.Application()
    app.router.add_get("/v1/watch", handler)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def entry(name: str, *, state: str = "ready", later: bool = False, **said: object) -> dict[str, Any]:
    """As a server says it; ``later``: one of a later release, of a peer of that release."""
    more = {"said_later": [1, {"x": 2}]} if later else {}
    kept = {"name": name, "incarnation": f"{name}-life", "role": "encode", "addresses": [f"unix:@{name}"]}
    return {"record": kept | said | more, "state": state, "load": {"queued": 3} | more, "revision": 1} | more


async def test_a_peer_that_cannot_be_read_hides_nobody_and_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """One unknown field, of any peer, and an older language peer heard nothing of anybody any more."""
    entries = [
        entry("king", role="king"),
        entry("good"),
        entry("odd", state="sleeping"),
        entry("another", role="king"),
        entry("later", later=True),
    ]
    head = {"server": "s", "revision": 1, "snapshot": True, "settled": True, "said_later": 1}

    async def watch(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for more in ([], [entry("last")]):
            await response.write(json.dumps(head | {"entries": [*entries, *more]}).encode() + b"\n")
        await asyncio.Event().wait()
        return response

    caplog.set_level(logging.WARNING, "aiodisagg.bootstrap.client")
    async with watched(watch) as url:
        client = BootstrapClient(url, record("l", PeerRole.LANGUAGE))
        async with client, watching(client) as changes:
            await until(changes, "last")
            there = client._there[url]
    assert set(there) == {"good-life", "later-life", "last-life"} and there["later-life"].load == Load(queued=3)
    said = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(said) == 2 and all("http://127.0.0.1" in line for line in said)
    assert "king" in said[0] and "sleeping" in said[1]


async def test_a_membership_that_is_not_heard_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiodisagg.bootstrap.client.FIRST_RETRY_S", 1e-3)
    monkeypatch.setattr("aiodisagg.bootstrap.client.LAST_RETRY_S", 4e-3)
    asked, enough = 0, asyncio.Event()

    async def watch(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if asked == 10:
            enough.set()
        return web.Response(status=500) if asked % 2 else web.Response(body=b"{}\n")

    caplog.set_level(logging.DEBUG, "aiodisagg.bootstrap.client")
    async with watched(watch) as url:
        client = BootstrapClient(url, record("l", PeerRole.LANGUAGE))
        async with client, watching(client), asyncio.timeout(60):
            await enough.wait()
    of_it = [record for record in caplog.records if record.getMessage().startswith("membership of")]
    assert len(of_it) >= 9 and [record.levelname for record in of_it[:4]] == ["DEBUG", "DEBUG", "WARNING", "DEBUG"]
    assert sum(record.levelname == "WARNING" for record in of_it) == 1


async def test_what_a_later_release_says_to_a_server_is_not_read() -> None:
    """Upgraded before their server, peers could not register."""
    async with BootstrapServer(port=0) as server, aiohttp.ClientSession() as session:
        body = entry("e", later=True)
        async with session.put(f"{server.url}/v1/peers/e-life", json=body["record"]) as response:
            assert response.status == 200, await response.text()
        beat = {"load": body["load"], "state": "draining", "said_later": 1}
        async with session.post(f"{server.url}/v1/peers/e-life/heartbeat", json=beat) as response:
            assert response.status == 200, await response.text()
        async with session.get(f"{server.url}/v1/peers") as response:
            (known,) = await response.json()
        assert (known["state"], known["load"], "said_later" in known["record"]) == ("draining", {"queued": 3}, False)


HUGE = "1" + 400 * "0"
"""Too large for a float."""


async def test_a_load_that_nobody_can_have_is_refused() -> None:
    """It was passed on to everybody, and placing an item failed with OverflowError at every language peer."""
    async with BootstrapServer(port=0) as server, aiohttp.ClientSession() as session:
        async with session.put(f"{server.url}/v1/peers/e-life", json=entry("e")["record"]) as response:
            assert response.status == 200
        for key in ("queued", "active", "patches"):
            beat = f'{{"load": {{"{key}": {HUGE}}}}}'
            async with session.post(f"{server.url}/v1/peers/e-life/heartbeat", data=beat) as response:
                assert response.status == 422 and key in (await response.json())["error"]


async def test_a_load_that_nobody_can_have_hides_its_peer_only() -> None:
    """From a server that still passes it on."""
    head = {"server": "s", "revision": 1, "snapshot": True, "settled": True}
    mad = entry("mad")
    mad["load"] = {"patches": 123}
    line = json.dumps(head | {"entries": [mad, entry("good")]}).replace("123", HUGE)

    async def watch(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(line.encode() + b"\n")
        await asyncio.Event().wait()
        return response

    async with watched(watch) as url:
        client = BootstrapClient(url, record("l", PeerRole.LANGUAGE))
        async with client, watching(client) as changes:
            await until(changes, "good")
            assert set(client._there[url]) == {"good-life"}
