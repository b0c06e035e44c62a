"""Prompts are planned on a few threads, tenants in turn.

Theory. A plan costs milliseconds, that of a text of megabytes a second or two, and admission, which shares the service
among tenants, comes after it: so who floods this line would keep all others out of that one. Tenants that wait take
turns, each with its first. A place is taken for as long as a thread works, also for somebody who has left; who leaves
the line holds nothing in it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from aiodisagg.models.base import ChatMessage

T = TypeVar("T")

PLANNERS = 2
"""Prompts that are planned at once. Planning is mostly Python: with a thread for each of a burst's prompts all of them
would be planned at its end, and none before; so the first is encoded while the last is planned. Each more of them takes
Python's lock from who prepares and launches the first pictures."""


class Closed(Exception):
    """Nothing is planned any more."""


class Planning(Generic[T]):
    """Methods belong to the loop's thread, but for ``close``, which waits for the threads.

    Args:
        plan: called on the threads.
    """

    def __init__(self, plan: Callable[[Sequence[ChatMessage]], T], threads: int = PLANNERS) -> None:
        self._plan, self._free = plan, threads
        self._pool = ThreadPoolExecutor(threads, "aiodisagg-plan")
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """Who waits, by tenant; the tenant whose turn is next is the first."""

    def close(self) -> None:
        self._pool.shutdown()

    @property
    def waiting(self) -> int:
        return sum(len(line) for line in self._lines.values())

    async def plan(self, messages: Sequence[ChatMessage], tenant: str) -> T:
        """What ``plan`` returns or raises. Raises Closed."""
        loop = asyncio.get_running_loop()
        await self._turn(tenant, loop)
        try:
            work = self._pool.submit(self._plan, messages)
        except RuntimeError:  # as the pool has it
            self._next()
            raise Closed from None
        work.add_done_callback(lambda _: self._ended(loop))
        return await asyncio.wrap_future(work)

    async def _turn(self, tenant: str, loop: asyncio.AbstractEventLoop) -> None:
        if self._free:
            self._free -= 1
            return
        mine: asyncio.Future[None] = loop.create_future()
        self._lines.setdefault(tenant, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # it came in the same moment
                self._next()
            elif line := self._lines.get(tenant):
                with contextlib.suppress(ValueError):
                    line.remove(mine)
                if not line:
                    del self._lines[tenant]
            raise

    def _ended(self, loop: asyncio.AbstractEventLoop) -> None:
        """On the thread that planned, or where the work was cancelled."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(self._next)

    def _next(self) -> None:
        while self._lines:
            tenant, line = self._lines.popitem(last=False)
            first = line.popleft()
            if line:
                self._lines[tenant] = line  # at the end
            if not first.done():
                first.set_result(None)
                return
        self._free += 1
