"""Host names of media, resolved on threads of their own.

A name server that does not answer keeps a thread for half a minute, and nothing can end that. The loop's own few
threads for it are for links and the bootstrap server: who sends URLs must not be able to take those.
"""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from aiohttp.abc import AbstractResolver, ResolveResult

THREADS = 32


class PoolResolver(AbstractResolver):
    """The operating system's resolver on ``threads`` threads. Raises OSError."""

    def __init__(self, threads: int = THREADS) -> None:
        self._pool = ThreadPoolExecutor(threads, "aiodisagg-names")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        look_up = partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)
        found = await asyncio.get_running_loop().run_in_executor(self._pool, look_up)
        numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [
            ResolveResult(
                hostname=host, host=str(address[0]), port=int(address[1]), family=kind, proto=proto, flags=numeric
            )
            for kind, _, proto, _, address in found
            if kind in (socket.AF_INET, socket.AF_INET6)
        ]  # fmt: skip

    async def close(self) -> None:
        """Does not wait for name servers."""
        self._pool.shutdown(wait=False, cancel_futures=True)
