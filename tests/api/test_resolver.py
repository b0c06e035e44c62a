"""Names are looked up on threads of their own."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from aiodisagg.api.resolver import PoolResolver

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
