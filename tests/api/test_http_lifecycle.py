"""Clients that go away, many at once, stopping, health and metrics."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import aiohttp
import openai
import pytest
from http_fakes import (
    HELLO,
    MODEL,
    Call,
    ScriptedBackend,
    Silent,
    answer,
    asking,
    forever,
    full_writes,
    image,
    media_host,
    serving,
)

from aiodisagg.api import ApiKey, HttpConfig, HttpServer
from aiodisagg.engine.types import Delta
from aiodisagg.errors import ConfigError, DeadlineExceeded, Draining, NoEncodePeer
from aiodisagg.scheduler.shares import Tenant

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

BODY = {"model": MODEL, "messages": HELLO}


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


async def closed(call: Call) -> None:
    async with asyncio.timeout(60):
        await call.closed.wait()
    assert call.cancelled


# -- going away ---------------------------------------------------------------------------------------------------


async def test_leaving_a_stream_stops_the_backend() -> None:
    backend = ScriptedBackend([Delta("first", (1,)), asyncio.Event()])
    async with serving(backend) as served:
        stream = await served.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content == "first":
                break
        await stream.close()
        await closed(backend.calls[0])


async def test_leaving_a_busy_stream_stops_the_backend() -> None:
    backend = ScriptedBackend(forever())
    async with serving(backend) as served:
        async with served.session.post("/v1/chat/completions", json={**BODY, "stream": True}) as response:
            await response.content.readline()
            response.close()
        await closed(backend.calls[0])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_leaving_before_the_first_token_stops_the_backend(stream: bool) -> None:
    backend = ScriptedBackend([asyncio.Event()])
    async with serving(backend) as served:
        task = asyncio.create_task(served.post({**BODY, "stream": stream}))
        call = await backend.started.get()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await closed(call)
        async with served.session.get("/metrics") as response:
            assert 'status="499"} 1.0' in await response.text()


async def test_leaving_while_media_are_fetched_stops_the_fetch() -> None:
    slow, backend = Silent(), ScriptedBackend()
    async with (
        media_host({"/slow": slow}) as (url, _),
        serving(backend, allow_private_media_hosts=("127.0.0.1",)) as served,
    ):
        task = asyncio.create_task(served.post({**BODY, "messages": asking(image(f"{url}/slow"))}))
        await slow.asked.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await slow.left.wait()
    assert not backend.calls


async def test_a_client_that_does_not_read_holds_the_backend_back_and_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    backend = ScriptedBackend(forever("x" * 10_000))
    async with serving(backend, write_timeout_s=0.2) as served:
        _reader, writer = await served.connect(stream=True)
        call = await backend.started.get()
        await closed(call)
        # Socket buffers take a few megabytes; a server that does not wait would take all there is.
        assert call.yielded < 2000
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]  # nobody here did wrong


async def test_a_client_that_does_not_read_the_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    full = full_writes(monkeypatch)

    async def until_full(call: Call) -> AsyncGenerator[Delta, None]:
        while not full.is_set():
            await asyncio.sleep(0)
            yield Delta("x" * 1000, (1,))
        for delta in answer("end"):
            yield delta

    backend = ScriptedBackend(until_full)
    async with serving(backend, write_timeout_s=0.2, max_requests=1) as served:
        _reader, writer = await served.connect(stream=True)
        await closed(await backend.started.get())
        backend.script = answer("next")
        assert (await served.post(BODY))[0] == 200  # its place is free again
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


# -- many ---------------------------------------------------------------------------------------------------------


async def test_fifty_streams_at_once() -> None:
    all_here = asyncio.Event()
    calls = 0

    async def echo(call: Call) -> AsyncGenerator[Delta, None]:
        nonlocal calls
        calls += 1
        if calls == 50:
            all_here.set()
        await all_here.wait()
        words = str(call.messages[0].parts[0].text).split()  # type: ignore[union-attr]
        for delta in answer(*(word + " " for word in words)):
            await asyncio.sleep(0)
            yield delta

    async def ask(served: Any, i: int) -> str:
        stream = await served.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"stream {i} says {i * i}"}], stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async with serving(ScriptedBackend(echo)) as served, asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(served, i)) for i in range(50)]
    assert [task.result() for task in tasks] == [f"stream {i} says {i * i} " for i in range(50)]


# -- starting and stopping ----------------------------------------------------------------------------------------


async def test_stopping_lets_running_requests_finish() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend([Delta("Hello", (1,)), gate, *answer(" there")])
    server = HttpServer(backend, port=0)
    await server.__aenter__()
    async with aiohttp.ClientSession(server.url) as session:
        async with session.post("/v1/chat/completions", json={**BODY, "stream": True}) as response:
            await response.content.readline()
            async with session.get("/health") as health:  # leaves a connection open on which it can be asked again
                assert health.status == 200
            stop = asyncio.create_task(server.__aexit__(None, None, None))
            async with session.get("/health") as health:
                assert health.status == 503 and (await health.json())["reason"] == "stopping"
            gate.set()
            text = await response.text()
            assert "there" in text and text.endswith("data: [DONE]\n\n")
        await stop
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get("/health")


async def test_a_stopping_server_takes_nothing_new() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend([gate, *answer("done")])
    server = HttpServer(backend, port=0)
    await server.__aenter__()
    async with aiohttp.ClientSession(server.url) as session:
        async with session.get("/health"):
            pass
        running = asyncio.create_task(session.post("/v1/chat/completions", json=BODY))
        await backend.started.get()
        async with session.get("/health"):
            pass
        stop = asyncio.create_task(server.__aexit__(None, None, None))
        async with session.post("/v1/chat/completions", json=BODY) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "stopping")
            assert response.headers["Retry-After"] == "1"
        gate.set()
        async with await running as response:
            assert response.status == 200
        await stop
    assert len(backend.calls) == 1


async def test_a_backend_that_drains_is_a_server_that_stops() -> None:
    """Its port may stay open for minutes: a client with a connection to it has to go elsewhere."""
    async with (
        serving(ScriptedBackend([Draining()])) as served,
        aiohttp.ClientSession(served.server.url) as session,
        session.post("/v1/chat/completions", json=BODY) as response,
    ):
        assert (response.status, (await response.json())["error"]["code"]) == (503, "stopping")
        assert (response.headers["Retry-After"], response.headers["Connection"]) == ("1", "close")


@pytest.mark.parametrize(
    ("error", "status"), [(DeadlineExceeded("it", 1.0), 504), (NoEncodePeer("gone"), 503), (RuntimeError("bug"), 500)]
)
async def test_a_stream_that_fails_is_counted_as_failed(error: Exception, status: int) -> None:
    backend = ScriptedBackend([Delta("Hello", (1,)), error])
    async with serving(backend) as served, aiohttp.ClientSession(served.server.url) as session:
        async with session.post("/v1/chat/completions", json={**BODY, "stream": True}) as response:
            assert response.status == 200 and '"error"' in await response.text()
        async with session.get("/metrics") as metrics:
            text = await metrics.text()
    assert f'aiodisagg_http_requests_total{{route="/v1/chat/completions",status="{status}"}} 1.0' in text
    assert 'route="/v1/chat/completions",status="200"' not in text


async def test_stopping_cuts_what_is_not_done_in_time() -> None:
    backend = ScriptedBackend([Delta("Hello", (1,)), asyncio.Event()])
    with pytest.raises(openai.APIConnectionError):
        async with serving(backend, grace_s=0.05) as served:
            task = asyncio.create_task(served.client.chat.completions.create(model=MODEL, messages=HELLO))
            call = await backend.started.get()
            await served.server.__aexit__(None, None, None)
            assert call.closed.is_set() and call.cancelled
            await task


async def test_a_port_in_use_and_other_addresses_that_cannot_be() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port} is in use"):
            async with HttpServer(ScriptedBackend(), port=port):
                pass
    with pytest.raises(ConfigError, match="host: "):
        async with HttpServer(ScriptedBackend(), "192.0.2.1", 0):
            pass
    with pytest.raises(ConfigError, match="port"):
        HttpServer(ScriptedBackend(), port=70_000)


@pytest.mark.parametrize(
    ("host", "config", "warns"),
    [
        ("0.0.0.0", HttpConfig(), True),
        ("127.0.0.1", HttpConfig(), False),
        ("localhost", HttpConfig(), False),
        ("0.0.0.0", HttpConfig(api_key="secret"), False),
        ("0.0.0.0", HttpConfig(api_keys=(ApiKey("key", Tenant("a")),)), False),
    ],
    ids=["open to all", "here only", "here only by name", "operator's key", "a tenant's key"],
)
async def test_a_server_that_is_open_to_all_says_so(
    host: str, config: HttpConfig, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with HttpServer(ScriptedBackend(), host, 0, config):
        assert ("can be reached from other hosts, and needs no key" in caplog.text) is warns


async def test_urls() -> None:
    async with HttpServer(ScriptedBackend(), "0.0.0.0", 0) as server, aiohttp.ClientSession() as session:
        assert server.url.startswith("http://127.0.0.1:") and not server.url.endswith(":0")
        async with session.get(f"{server.url}/health") as response:
            assert await response.json() == {"status": "ok", "reason": ""}


# -- watching -----------------------------------------------------------------------------------------------------


async def test_health_and_metrics() -> None:
    backend = ScriptedBackend()
    async with serving(backend) as served:
        backend.is_ready = (False, "no encode peer")
        async with served.session.get("/health") as response:
            assert (response.status, (await response.json())["reason"]) == (503, "no encode peer")
        async with served.session.get("/live") as response:
            assert (response.status, await response.json()) == (200, {"status": "ok", "reason": "ok"})
        backend.broken = "the engine is broken"
        async with served.session.get("/live") as response:
            assert (response.status, (await response.json())["reason"]) == (503, "the engine is broken")
        backend.is_ready = (True, "")
        async with served.session.get("/health") as response:
            assert response.status == 200
        await served.client.chat.completions.create(model=MODEL, messages=HELLO)
        async with served.session.get("/no/such/\u00e9") as response:
            assert response.status == 404
        async with served.session.get("/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            lines = (await response.text()).splitlines()
    assert "scripted_calls_total 3" in lines
    assert 'aiodisagg_http_requests_total{route="/v1/chat/completions",status="200"} 1.0' in lines
    assert 'aiodisagg_http_requests_total{route="/health",status="503"} 1.0' in lines
    assert 'aiodisagg_http_requests_total{route="none",status="404"} 1.0' in lines


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_requests", 0),
        ("max_body_bytes", -1),
        ("media_timeout_s", float("nan")),
        ("grace_s", -0.1),
        ("api_key", ""),
        ("allow_private_media_hosts", ("intranet",)),
        ("allowed_media_domains", ("http://x/",)),
    ],
)
def test_settings_are_checked(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"http.{key}"):
        HttpConfig(**{key: value})
