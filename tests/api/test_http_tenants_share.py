"""What there is little of before a request is in line, tenants take in turn: connections, threads, lookups of names."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest
from aiohttp import web
from http_fakes import MODEL, ScriptedBackend, Served, asking, data_url, image, media_host, png, says, serving

from aiodisagg.api import chat, fetch
from aiodisagg.api.data_url import decode_data_url
from aiodisagg.api.fetch import MediaFetcher
from aiodisagg.api.parse import parse_request
from aiodisagg.api.resolver import THREADS, PoolResolver
from aiodisagg.peer.turns import Turns
from tests.services.system import PATIENCE_S, eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

LOOPBACK = ("127.0.0.1",)
LONG = "x" * 70_000
"""A body that is read on a thread."""


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


def asked_by(tenant: str, served: Served, *parts: dict[str, Any]) -> asyncio.Task[int]:
    async def ask() -> int:
        return (await served.post({"model": MODEL, "messages": asking(*parts)}, x_tenant=tenant))[0]

    return asyncio.ensure_future(ask())


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def fetcher_of(served: Served) -> MediaFetcher:
    return served.server._chat._fetcher


async def test_a_silent_host_delays_who_names_it() -> None:
    answers = asyncio.Semaphore(0)

    async def silent(request: web.Request) -> web.StreamResponse:
        await answers.acquire()
        return web.Response(body=png(), content_type="image/png")

    async with (
        media_host({"/silent": silent, "/fast": says(png())}) as (url, asked),
        serving(ScriptedBackend(), allow_private_media_hosts=LOOPBACK, media_connections=1) as served,
    ):
        slots = fetcher_of(served)._slots
        first = asked_by("a", served, *[image(f"{url}/silent")] * 3)
        await eventually(lambda: asked == ["/silent"] and slots.waiting == 2)
        second = asked_by("b", served, image(f"{url}/fast"))
        await eventually(lambda: slots.waiting == 3)
        answers.release()
        assert await second == 200
        assert asked[:2] == ["/silent", "/fast"]
        for _ in range(2):
            answers.release()
        assert await first == 200 and asked[2:] == ["/silent", "/silent"]


class Blocked:
    """Lets a function begin its work one call at a time; ``begun``: whose calls, in order."""

    def __init__(self) -> None:
        self.begun, self.may_end = list[str](), threading.Semaphore(0)

    def call(self, whose: str) -> None:
        self.begun.append(whose)
        self.may_end.acquire()


async def test_long_bodies_are_read_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = Blocked()

    def parse(body: bytearray) -> Any:
        blocked.call("a" if b"from a" in body else "b")
        return parse_request(body)

    monkeypatch.setattr(chat, "parse_request", parse)
    async with serving(ScriptedBackend()) as served:
        workers = served.server._chat._workers
        asked = [asked_by("a", served, text("from a"), text(LONG)) for _ in range(4)]
        await eventually(lambda: blocked.begun == ["a"] * 2 and workers.waiting == 2)
        asked.append(asked_by("b", served, text(LONG)))
        await eventually(lambda: workers.waiting == 3)
        blocked.may_end.release(5)
        assert await asyncio.gather(*asked) == [200] * 5
    assert blocked.begun == ["a", "a", "b", "a", "a"]


async def test_data_urls_are_decoded_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = Blocked()

    def decode(raw: memoryview, max_bytes: int, param: str) -> bytes:
        data = decode_data_url(raw, max_bytes, param)
        blocked.call(data[:1].decode())
        return data

    monkeypatch.setattr(fetch, "decode_data_url", decode)
    pictures = {tenant: image(data_url(tenant.encode() * 100_000)) for tenant in "ab"}
    async with serving(ScriptedBackend()) as served:
        workers = served.server._chat._workers
        first = asked_by("a", served, *[pictures["a"]] * 5)
        await eventually(lambda: blocked.begun == ["a"] * 2 and workers.waiting == 3)
        second = asked_by("b", served, pictures["b"])
        await eventually(lambda: workers.waiting == 4)
        blocked.may_end.release()  # its body is read, and while nobody else asks, another of the first's is decoded
        await eventually(lambda: blocked.begun == ["a"] * 3 and workers.waiting == 3)
        blocked.may_end.release(5)
        assert await asyncio.gather(first, second) == [200, 200]
    assert blocked.begun == ["a", "a", "a", "b", "a", "a"]


async def test_lookups_end_with_their_request_and_leave_threads_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, looked_up, look_up = threading.Event(), list[str](), socket.getaddrinfo

    def slow(host: Any, port: Any, *more: Any, **how: Any) -> Any:
        if str(host).endswith(".lame.test"):
            looked_up.append(host)
            answers.wait()
            raise socket.gaierror("no answer")
        return look_up("127.0.0.1" if host == "fast.test" else host, port, *more, **how)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    async with (
        media_host({"/x": says(png())}) as (url, _),
        serving(ScriptedBackend(), allow_private_media_hosts=LOOPBACK, media_timeout_s=300.0) as served,
    ):
        turns = turns_of(served)
        lame = [image(f"http://{n}.lame.test/") for n in range(16)]
        flood = [asked_by("a", served, *lame) for _ in range(4)]
        try:
            await eventually(lambda: len(looked_up) == THREADS // 2 and turns.waiting == 64 - THREADS // 2)
            port = url.rpartition(":")[2]
            async with asyncio.timeout(PATIENCE_S):
                assert await asked_by("b", served, image(f"http://fast.test:{port}/x")) == 200
            for gone in flood:
                gone.cancel()
            await eventually(lambda: turns.waiting == 0, "nothing waits for those who are gone")
            assert len(looked_up) == THREADS // 2
        finally:
            answers.set()
        await eventually(lambda: repr(turns) == f"<Turns {THREADS} free, 0 held, 0 wait>")
        assert len(looked_up) == THREADS // 2


def turns_of(served: Served) -> Turns:
    resolver = fetcher_of(served)._own_resolver
    assert isinstance(resolver, PoolResolver)
    return resolver._turns
