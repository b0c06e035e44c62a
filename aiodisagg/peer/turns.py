"""Places that tenants take in turn: threads, connections.

Theory. Admission shares the service among tenants. But before it a request needs other things of which there are few: a
thread that parses or plans, a connection to the host of a picture. First come, first served there would be the end of
sharing: who floods such a line, or holds what it has got for long, keeps all others out. So the tenant that holds the
fewest places goes first. Among equals they take turns: who has got a place or gives one back is behind those that wait.
A tenant that waits thus gets what others give back until it holds as many as they do, however long they keep theirs.

That helps where places are given back. Where nothing can end who has one, ``most`` of them are for one tenant, and what
is left is for the others.

Who leaves the line holds nothing in it. A place that a thread works in is taken for as long as it works, also for
somebody who has left; so nothing waits anywhere but in the lines here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """``places``, of which one tenant holds ``most`` (None: all) at once. Methods belong to the loop's thread.

    The lines have no bound of their own: each who waits is a request that was let in.
    """

    def __init__(self, places: int, most: int | None = None) -> None:
        self._free, self._most = places, places if most is None else most
        self._held: Counter[str] = Counter()
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """Who waits, by tenant. All of them are held to ``most`` while a place is free."""

    def __repr__(self) -> str:
        return f"<Turns {self._free} free, {self._held.total()} held, {self.waiting} wait>"

    @property
    def waiting(self) -> int:
        return sum(len(line) for line in self._lines.values())

    @contextlib.asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        await self._take(tenant)
        try:
            yield
        finally:
            self._give_back(tenant)

    async def work(self, tenant: str, start: Callable[[], Future[T]]) -> T:
        """Calls ``start`` in a place, which is taken until the future that it gives is done.

        Gives or raises what the future does, or raises what ``start`` raises.
        """
        await self._take(tenant)
        loop = asyncio.get_running_loop()
        try:
            work = start()
        except BaseException:
            self._give_back(tenant)
            raise
        work.add_done_callback(lambda _: self._ended(tenant, loop))
        return await asyncio.wrap_future(work)

    def _ended(self, tenant: str, loop: asyncio.AbstractEventLoop) -> None:
        """On the thread that worked, or where the work was cancelled."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(self._give_back, tenant)

    async def _take(self, tenant: str) -> None:
        if self._free and self._held[tenant] < self._most:
            self._give(tenant)
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(tenant, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # it came in the same moment
                self._give_back(tenant)
            elif line := self._lines.get(tenant):
                with contextlib.suppress(ValueError):
                    line.remove(mine)
                if not line:
                    del self._lines[tenant]
            raise

    def _give(self, tenant: str) -> None:
        self._free -= 1
        self._held[tenant] += 1

    def _give_back(self, tenant: str) -> None:
        self._free += 1
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        if tenant in self._lines:
            self._lines.move_to_end(tenant)
        self._hand_out()

    def _hand_out(self) -> None:
        while self._free and (able := [one for one in self._lines if self._held[one] < self._most]):
            tenant = min(able, key=self._held.__getitem__)
            line = self._lines.pop(tenant)
            first = line.popleft()
            if line:
                self._lines[tenant] = line  # at the end
            if not first.done():
                self._give(tenant)
                first.set_result(None)


class Closed(Exception):
    """Nobody works any more."""


class Workers:
    """Threads for what must not hold up the loop, tenants in turn. ``close`` is for any thread, and waits for them."""

    def __init__(self, threads: int, name: str) -> None:
        self._turns = Turns(threads)
        self._pool = ThreadPoolExecutor(threads, name)

    @property
    def waiting(self) -> int:
        return self._turns.waiting

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What ``work`` gives or raises, called on a thread. Raises Closed."""
        return await self._turns.work(tenant, lambda: self._submit(work))

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        try:
            return self._pool.submit(work)
        except RuntimeError:  # as the pool has it
            raise Closed from None

    def close(self) -> None:
        self._pool.shutdown()
