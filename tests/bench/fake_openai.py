"""A server of OpenAI's chat API that follows a script, and a clock that only moves when somebody moves it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec
from aiohttp import web

from aiodisagg.bench.chat_client import Clock


class FakeClock(Clock):
    """``reads`` counts how often the client looked, so that a server can wait until an event was noted."""

    def __init__(self) -> None:
        self.value, self.reads = 100.0, 0
        self._read = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def now(self) -> float:
        self.reads += 1
        task = asyncio.get_running_loop().create_task(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return self.value

    async def _tell(self) -> None:
        async with self._read:
            self._read.notify_all()

    async def until(self, at_s: float) -> None:
        self.value = max(self.value, at_s)

    async def read_after(self, reads: int) -> None:
        async with self._read:
            await self._read.wait_for(lambda: self.reads > reads)


def event(content: str | None = None, **more: Any) -> bytes:
    """The data of an event with a piece of text."""
    delta = {} if content is None else {"content": content}
    return msgspec.json.encode({"id": "x", "choices": [{"index": 0, "delta": delta}], **more})


def usage(prompt: int, completion: int) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return msgspec.json.encode({"id": "x", "choices": [], "usage": counts})


DONE = b"[DONE]"
Step = tuple[float, bytes]
"""Seconds that pass, and what is sent then."""


def answer_of(gaps_s: list[float], prompt: int = 7, tokens: int | None = None) -> list[Step]:
    """A role, a piece of text after each gap, usage, the end."""
    steps: list[Step] = [(0.0, event(""))]
    steps += [(gap, event("word ")) for gap in gaps_s]
    return [*steps, (0.0, usage(prompt, len(gaps_s) if tokens is None else tokens)), (0.0, DONE)]


@dataclass
class FakeServer:
    """``script(body)``: what to send; an int instead is an HTTP status. ``bodies``: what was asked, in order."""

    script: Callable[[dict[str, Any]], list[Step] | int]
    clock: FakeClock | None = None
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    metrics_text: Callable[[], str] = lambda: ""
    before: Callable[[dict[str, Any]], Any] | None = None
    """Awaited before each answer."""
    said: ClassVar[str] = "near [/INST] [type=missing]"
    """The message of its errors: to a terminal's markup, tags."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read())
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.before is not None:
            await self.before(body)
        steps = self.script(body)
        if isinstance(steps, int):
            return web.json_response({"error": {"message": self.said, "code": "no"}}, status=steps)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for seconds, data in steps:
            reads = 0
            if self.clock is not None:
                self.clock.value += seconds
                reads = self.clock.reads
            await response.write(b"data: " + data + b"\n\n")
            if self.clock is not None:
                await self.clock.read_after(reads)
        await response.write_eof()
        return response

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics_text())

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake-vl", "object": "model"}]})


@asynccontextmanager
async def serving(server: FakeServer) -> AsyncIterator[FakeServer]:
    app = web.Application(client_max_size=1 << 28)
    app.router.add_post("/v1/chat/completions", server.answer)
    app.router.add_get("/v1/models", server.models)
    app.router.add_get("/metrics", server.metrics)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield server
    finally:
        await runner.cleanup()
