"""Names are looked up on threads of their own."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

from aiodisagg.api.resolver import PoolResolver, asking

pytestmark = pytest.mark.anyio


async def test_this_host() -> None:
    resolver = PoolResolver()
    try:
        (found, *_) = await resolver.resolve("localhost", 80)
        assert (found["host"], found["port"], found["hostname"]) == ("127.0.0.1", 80, "localhost")
        with pytest.raises(OSError):
            await resolver.resolve("a name with spaces", 80)
    finally:
        await resolver.close()


async def test_name_servers_that_do_not_answer_hold_nobody_else_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, look_up = threading.Event(), socket.getaddrinfo

    def slow(host: Any, *more: Any, **how: Any) -> Any:
        if host == "lame.test":
            answers.wait()
            raise socket.gaierror("no answer")
        return look_up(host, *more, **how)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    resolver = PoolResolver(threads=2)
    try:
        lame = [asyncio.ensure_future(resolver.resolve("lame.test")) for _ in range(64)]  # the loop has fewer threads
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            assert await asyncio.get_running_loop().getaddrinfo("localhost", 80)
        await resolver.close()  # nor does the end of the server wait
    finally:
        answers.set()
        await asyncio.gather(*lame, return_exceptions=True)


async def test_one_tenant_has_half_of_the_threads_and_who_leaves_holds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, looked_up = threading.Event(), list[str]()

    def slow(host: str, *more: Any) -> Any:
        looked_up.append(host)
        if host == "lame.test":
            answers.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    resolver = PoolResolver(threads=4)

    def resolve(tenant: str, host: str) -> asyncio.Future[Any]:
        asking.set(tenant)
        return asyncio.ensure_future(resolver.resolve(host))

    try:
        flood = [resolve("a", "lame.test") for _ in range(64)]
        async with asyncio.timeout(30):
            assert await resolve("b", "fine.test") == []
        for one in flood:
            one.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        assert repr(resolver._turns) == "<Turns 2 free, 2 held, 0 wait>"
        answers.set()
        assert await resolve("a", "fine.test") == []
        assert sorted(looked_up) == ["fine.test", "fine.test", "lame.test", "lame.test"]
    finally:
        answers.set()


def test_a_process_ends_while_a_name_server_is_silent() -> None:
    script = """
import asyncio, socket, threading
from aiodisagg.api.resolver import PoolResolver

async def main():
    asked = threading.Event()
    socket.getaddrinfo = lambda *_: asked.set() or threading.Event().wait()
    looking = asyncio.ensure_future(PoolResolver().resolve("lame.test"))
    await asyncio.to_thread(asked.wait)
    looking.cancel()

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)
