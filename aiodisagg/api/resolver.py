"""Host names of media, resolved on threads of their own.

A name server that does not answer keeps a thread for half a minute, and nothing can end that. The loop's own few
threads for it are for links and the bootstrap server: who sends URLs must not be able to take those. Nor may one tenant
take all that there are here, and a process that ends does not wait for any of them.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from typing import TypeVar

from aiohttp.abc import AbstractResolver, ResolveResult

from aiodisagg.peer.turns import Turns

T = TypeVar("T")

THREADS = 32
asking: ContextVar[str] = ContextVar("asking", default="")
"""The tenant for which a task looks names up; between it and the resolver is aiohttp, which knows no tenants."""


class PoolResolver(AbstractResolver):
    """The operating system's resolver on up to ``threads`` threads, half of them for one tenant. Raises OSError.

    Lookups that find no thread wait for their tenant's turn; there are as many as the one who uses this has tasks.
    Who is cancelled leaves the line. On a thread, a lookup goes on and takes its place until it is answered.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._turns = Turns(threads, most=max(1, threads // 2))

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        look_up = partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)
        found = await self._turns.work(asking.get(), lambda: _on_a_thread(look_up))
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


def _on_a_thread(work: Callable[[], T]) -> Future[T]:
    """Starts ``work`` on a daemon: an executor's threads are joined when the process ends."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()
    threading.Thread(target=_work, args=(work, result), name="aiodisagg-names", daemon=True).start()
    return result


def _work(work: Callable[[], T], result: Future[T]) -> None:
    try:
        found = work()
    except BaseException as error:
        result.set_exception(error)
        del result  # else the error keeps this frame, and the frame the error
    else:
        result.set_result(found)
