"""The gate through which a receiving side places bytes, and which tells when nothing can land any more.

``revoke`` must not return while a copy under a revoked lease is in progress on another thread. The rule that makes
this sound without holding a lock around the copy or around the user's ``admit``: a copy is counted *before* it asks
``admit``. The owner withdraws the lease first and then looks at the count. If the count is zero, every later copy
will be refused; if not, the copies that are counted are waited for.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Iterable

from aiodisagg.transport.base import Admit

log = logging.getLogger(__name__)


class Landing:
    """The receiver's pool behind its gate. ``enter`` and ``leave`` on any thread, the rest on the owner's loop."""

    def __init__(self, pool: memoryview, admit: Admit) -> None:
        self._pool, self._admit = pool, admit
        self.size_bytes = pool.nbytes
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._inside: Counter[int] = Counter()
        self._waiting: list[tuple[frozenset[int] | None, asyncio.Future[None]]] = []

    def enter(self, offset: int, size_bytes: int, lease: int) -> memoryview | None:
        """The place for these bytes, to be filled and then left with :meth:`leave`; None: refused, nothing to leave."""
        if self.closed or offset < 0 or size_bytes < 0 or offset + size_bytes > self.size_bytes:
            return None
        with self._lock:
            self._inside[lease] += 1
        try:
            if self._admit(offset, size_bytes, lease) and not self.closed:
                return self._pool[offset : offset + size_bytes]
        except Exception:
            log.exception("admit failed for lease %d; refused", lease)
        self.leave(lease)
        return None

    def leave(self, lease: int) -> None:
        """The bytes are placed, or will never be."""
        with self._lock:
            self._inside[lease] -= 1
            if not self._inside[lease]:
                del self._inside[lease]
            wake = bool(self._waiting)
        if wake:
            self._loop.call_soon_threadsafe(self._wake)

    def admits(self, offset: int, size_bytes: int, lease: int) -> bool:
        """A look ahead, so that a write that will be refused is refused as a whole."""
        if self.enter(offset, size_bytes, lease) is None:
            return False
        self.leave(lease)
        return True

    async def settled(self, leases: Iterable[int] | None = None) -> None:
        """Returns when no copy under these leases (None: any lease) is in progress."""
        wanted = None if leases is None else frozenset(leases)
        with self._lock:
            if not self._busy(wanted):
                return
            future: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append((wanted, future))
        try:
            await future
        finally:
            with self._lock:
                self._waiting = [(which, waiter) for which, waiter in self._waiting if waiter is not future]

    def _busy(self, leases: frozenset[int] | None) -> bool:
        return bool(self._inside) if leases is None else not leases.isdisjoint(self._inside)

    def _wake(self) -> None:
        with self._lock:
            for leases, waiter in self._waiting:
                if not waiter.done() and not self._busy(leases):
                    waiter.set_result(None)

    async def aclose(self) -> None:
        """Refuses everything from now on and waits for the copies in progress."""
        self.closed = True
        await self.settled()
        self._pool = memoryview(b"")
