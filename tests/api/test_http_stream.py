"""Streams as proxies and old clients want them: never silent for long, and with an end."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

import aiohttp
import openai
import pytest
from aiohttp import web
from http_fakes import (
    HELLO,
    MODEL,
    Call,
    ScriptedBackend,
    Served,
    answer,
    asking,
    full_writes,
    image,
    media_host,
    png,
    says,
    serving,
)

from aiodisagg.api import chat
from aiodisagg.engine.types import Delta
from aiodisagg.errors import EncodeFailed, EngineError, InvalidRequest, NoEncodePeer, Overloaded

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

BODY = {"model": MODEL, "messages": HELLO, "stream": True}
COMMENT = b": nothing yet\n"


async def comment(response: aiohttp.ClientResponse) -> None:
    """Reads one, and nothing else."""
    assert [await response.content.readline() for _ in range(2)] == [COMMENT, b"\n"]


async def test_a_stream_that_waits_for_its_first_token_is_not_silent(skip: Callable[[float], None]) -> None:
    """Proxies cut it otherwise, with work of minutes behind it."""
    gate = asyncio.Event()
    backend = ScriptedBackend([gate, *answer("Hello", " there")])
    async with serving(backend) as served:
        asked = asyncio.create_task(served.session.post("/v1/chat/completions", json=BODY))
        await backend.started.get()
        skip(14.0)
        assert not asked.done()
        skip(1.0)
        async with await asyncio.wait_for(asked, 20) as response:
            assert response.status == 200 and response.headers["X-Request-Id"]
            await comment(response)
            for _ in range(3):
                skip(15.0)
                await comment(response)
            gate.set()
            events = (await response.text()).split("\n\n")
    assert '"role":"assistant"' in events[0] and events[-2] == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events[:-1])


async def test_a_stream_that_waits_between_tokens_is_not_silent(skip: Callable[[float], None]) -> None:
    gate = asyncio.Event()
    async with serving(ScriptedBackend([Delta("Hello", (1,)), gate, *answer(" there")])) as served:
        async with served.session.post("/v1/chat/completions", json=BODY) as response:
            for _ in range(4):
                assert not (await response.content.readline()).startswith(b":")
            skip(15.0)
            await comment(response)
            gate.set()
            assert (await response.text()).endswith("data: [DONE]\n\n")


async def test_the_openai_client_skips_comments(skip: Callable[[float], None]) -> None:
    waits = [asyncio.Event() for _ in range(2)]
    backend = ScriptedBackend([waits[0], Delta("Hello", (1,)), waits[1], *answer(" there")])
    async with serving(backend) as served:
        asked = asyncio.create_task(served.client.chat.completions.create(**BODY))  # type: ignore[call-overload]
        await backend.started.get()
        skip(15.0)
        stream = await asyncio.wait_for(asked, 20)
        texts = []
        waits[0].set()
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content)
            if texts[-1] == "Hello":
                skip(15.0)
                asyncio.get_running_loop().call_later(0.0, waits[1].set)
    assert texts == ["", "Hello", " there", None]


async def test_media_that_take_long_to_fetch_are_waited_for_too(skip: Callable[[float], None]) -> None:
    arrived, gate = asyncio.Event(), asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        arrived.set()
        await gate.wait()
        return await says(png())(request)

    async with (
        media_host({"/slow": slow}) as (url, _),
        serving(ScriptedBackend(), allow_private_media_hosts=("127.0.0.1",), media_timeout_s=100.0) as served,
    ):
        body = {**BODY, "messages": asking(image(f"{url}/slow"))}
        asked = asyncio.create_task(served.session.post("/v1/chat/completions", json=body))
        await arrived.wait()
        skip(15.0)
        async with await asyncio.wait_for(asked, 20) as response:
            await comment(response)
            gate.set()
            assert (await response.text()).endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("stop", "no"), "invalid_value"),
        (Overloaded(2.0, "busy"), "overloaded"),
        (NoEncodePeer("gone"), "no_encode_peer"),
        (EncodeFailed("i", "broken"), "encode_failed"),
    ],
)
async def test_what_fails_after_a_comment_is_an_event(
    error: Exception, code: str, skip: Callable[[float], None]
) -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend([gate, error])
    async with serving(backend) as served:
        asked = asyncio.create_task(served.client.chat.completions.create(**BODY))  # type: ignore[call-overload]
        await backend.started.get()
        skip(15.0)
        stream = await asyncio.wait_for(asked, 20)
        gate.set()
        with pytest.raises(openai.APIError) as caught:
            await anext(stream)
        assert caught.value.code == code
        async with served.session.get("/metrics") as metrics:
            assert 'status="200"' not in await metrics.text()


@pytest.mark.parametrize("stream", [True, False])
async def test_the_log_of_an_internal_error_has_its_cause(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(call: Call) -> AsyncGenerator[Delta, None]:
        try:
            raise OSError("the disk is full")
        except OSError as error:
            raise EngineError(call.request_id, "its step failed") from error
        yield Delta("", ())

    async with serving(ScriptedBackend(broken)) as served:
        status, body, _ = await served.post({**BODY, "stream": stream})
    assert status == 500 and body["error"]["code"] == "internal_error"
    assert "OSError: the disk is full" in caplog.text


async def test_a_client_that_takes_no_comment_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as gone as one that takes no tokens, and what was computed for it stops."""
    monkeypatch.setattr(chat, "_COMMENT", b":" * 500_000 + b"\n\n")
    backend = ScriptedBackend([asyncio.Event()])
    async with serving(backend, stream_keepalive_s=1e-3, write_timeout_s=0.2) as served:
        _reader, writer = await served.connect(stream=True)
        call = await backend.started.get()
        async with asyncio.timeout(60):
            await call.closed.wait()
        assert call.cancelled
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def test_a_comment_does_not_break_an_event_that_is_being_taken(
    skip: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = full_writes(monkeypatch)
    async with serving(ScriptedBackend(answer("x" * 20_000_000, "end"))) as served:
        reader, writer = await served.connect(stream=True)
        await full.wait()
        skip(15.0)
        sent = bytearray()
        async with asyncio.timeout(60):
            while not sent.endswith(b"\r\n0\r\n\r\n"):
                sent += await reader.read(1 << 20)
        writer.close()
        await writer.wait_closed()
    events = re.split(rb"\n\n\r\n(?:[0-9a-f]+\r\n)?", sent.partition(b"\r\n\r\n")[2].partition(b"\r\n")[2])
    assert events.count(COMMENT.strip()) == 1 and events[-2:] == [b"data: [DONE]", b"\r\n"]
    assert len(events[1]) > 20_000_000 and events[2] == COMMENT.strip() and len(events[3]) < 1000


async def bytes_of(served: Served, version: str, *headers: str) -> bytes:
    host, port = served.server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(BODY).encode()
    lines = [f"POST /v1/chat/completions HTTP/{version}", "Content-Type: application/json", *headers]
    writer.write("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    async with asyncio.timeout(20):
        sent = await reader.read()
    writer.close()
    await writer.wait_closed()
    return sent


async def test_a_stream_of_http_1_0_ends_with_its_connection() -> None:
    """Also where the client would keep it: it has no other way to see the end, and waited for 75 s."""
    async with serving(ScriptedBackend()) as served:
        sent = await bytes_of(served, "1.0", "Connection: keep-alive")
    assert sent.startswith(b"HTTP/1.0 200") and sent.endswith(b"data: [DONE]\n\n")
    assert b"keep-alive" not in sent.split(b"\r\n\r\n")[0].lower()
