"""A backend that follows a script, a host that serves pictures, and servers around them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from PIL import Image

from aiodisagg.api import HttpConfig, HttpServer
from aiodisagg.engine.types import Delta, FinishReason, SamplingParams, Usage
from aiodisagg.models.base import ChatMessage
from aiodisagg.scheduler.shares import Tenant

MODEL = "tests/scripted-vl"
_TLS = ssl.create_default_context()  # never used, but a client makes one unless it is given, and that takes long
HELLO = [{"role": "user", "content": "hello"}]


def png(side: int = 4, color: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (color, color, color)).save(out, "PNG")
    return out.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def asking(*parts: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


def answer(*texts: str, finish: FinishReason = FinishReason.STOP) -> list[Delta]:
    """An answer in pieces; the last one carries the finish reason and usage (7 prompt tokens, one a piece)."""
    pieces = [Delta(text, (i,)) for i, text in enumerate(texts[:-1])]
    return [*pieces, Delta(texts[-1], (len(pieces),), finish, Usage(7, len(texts)))]


@dataclass
class Call:
    messages: list[ChatMessage]
    sampling: SamplingParams
    request_id: str
    timeout_s: float | None
    tenant: Tenant
    priority: int
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: bool = False
    yielded: int = 0


Step = Delta | Exception | asyncio.Event
"""What to yield, to raise, or to wait for."""


class ScriptedBackend:
    """Follows ``script`` for every call, and remembers the calls."""

    model_names: tuple[str, ...] = (MODEL,)
    created = 1_700_000_000

    def __init__(self, script: Sequence[Step] | Callable[[Call], AsyncGenerator[Delta, None]] = ()) -> None:
        self.script = script or answer("Hello", " there")
        self.calls: list[Call] = []
        self.is_ready = (True, "")
        self.broken = ""
        self.started: asyncio.Queue[Call] = asyncio.Queue()

    async def generate(
        self,
        messages: Sequence[ChatMessage],
        sampling: SamplingParams,
        *,
        request_id: str,
        timeout_s: float | None = None,
        tenant: Tenant,
        priority: int = 0,
    ) -> AsyncGenerator[Delta, None]:
        call = Call(list(messages), sampling, request_id, timeout_s, tenant, priority)
        self.calls.append(call)
        self.started.put_nowait(call)
        try:
            async with aclosing(self.script(call) if callable(self.script) else self._steps()) as steps:
                async for delta in steps:
                    call.yielded += 1
                    yield delta
        except (asyncio.CancelledError, GeneratorExit):
            call.cancelled = True
            raise
        finally:
            call.closed.set()

    async def _steps(self) -> AsyncGenerator[Delta, None]:
        for step in self.script:  # type: ignore[union-attr]
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, Exception):
                raise step
            else:
                yield step

    def ready(self) -> tuple[bool, str]:
        return self.is_ready

    def metrics(self) -> str:
        return "# TYPE scripted_calls counter\nscripted_calls_total 3\n"


def forever(text: str = "la ") -> Callable[[Call], AsyncGenerator[Delta, None]]:
    """A script that never ends and yields to the loop between deltas."""

    async def run(call: Call) -> AsyncGenerator[Delta, None]:
        while True:
            await asyncio.sleep(0)
            yield Delta(text, (1,))

    return run


@dataclass
class Served:
    """A running server and the ways to talk to it."""

    server: HttpServer
    client: AsyncOpenAI
    session: aiohttp.ClientSession

    async def post(self, body: Any, **headers: str) -> tuple[int, Any, aiohttp.ClientResponse]:
        """Status, decoded body and response of a chat request; ``body`` may be raw bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        async with self.session.post("/v1/chat/completions", data=data, headers=sent) as response:
            return response.status, await response.json(), response

    async def connect(self, **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection on which a chat request has been sent; reads little ahead."""
        host, port = self.server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=4096)
        body = json.dumps({"model": MODEL, "messages": HELLO, **fields}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        return reader, writer

    async def refused(self, **fields: Any) -> tuple[int, Any]:
        """Status and error of a chat request with ``fields`` over those of a good one."""
        status, body, _ = await self.post({"model": MODEL, "messages": HELLO, **fields})
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return status, body["error"]


@asynccontextmanager
async def serving(backend: ScriptedBackend, *, resolver: Any = None, **settings: Any) -> AsyncIterator[Served]:
    async with (
        HttpServer(backend, port=0, config=HttpConfig(**settings), resolver=resolver) as server,
        DefaultAsyncHttpxClient(verify=_TLS) as http,
        AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=30, http_client=http
        ) as client,
        aiohttp.ClientSession(server.url) as session,
    ):
        yield Served(server, client, session)


def says(data: bytes, mime: str = "image/png", **headers: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(body=data, content_type=mime, headers=headers)

    return handle


class Silent:
    """A host that is asked, and never answers; ``left``: nobody waits for it any more."""

    def __init__(self) -> None:
        self.asked, self.left = asyncio.Event(), asyncio.Event()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()
        raise AssertionError


@asynccontextmanager
async def media_host(
    routes: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]], host: str = "127.0.0.1"
) -> AsyncIterator[tuple[str, list[str]]]:
    """Serves ``routes`` (by path) on a free port; gives its URL and the list of paths it was asked for."""
    asked: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        return await routes[request.path](request)

    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, 0).start()
        yield f"http://{host}:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


def full_writes(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Is set once a connection of a server has to wait for its client to read."""
    full, pause = asyncio.Event(), BaseProtocol.pause_writing

    def pause_writing(self: BaseProtocol) -> None:
        full.set()
        pause(self)

    monkeypatch.setattr(BaseProtocol, "pause_writing", pause_writing)
    return full
