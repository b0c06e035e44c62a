"""What the submitter of a request holds: its tokens as they come, on the event loop.

The step thread never waits for a reader. What it has for one is merged into a single pending delta, so a reader that
is slow, or an event loop that is, gets fewer and longer deltas; nothing is lost and a handle holds at most one answer.
One wake-up of the loop serves all requests of a step.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from aiodisagg.engine.types import Delta
from aiodisagg.errors import AiodisaggError, EngineError
from aiodisagg.scheduler.cost import PrefillCosts


def merge(first: Delta | None, second: Delta) -> Delta:
    """One delta that says what both say."""
    if first is None:
        return second
    ids = (*first.token_ids, *second.token_ids)
    return Delta(first.text + second.text, ids, second.finish_reason, second.usage)


class RequestHandle:
    """A request in the engine. Iterate it once, in one task; leaving the iteration early cancels the request.

    ``async for delta in handle`` gives deltas until one has a ``finish_reason``, or raises the AiodisaggError that
    failed the request. Breaking out of the loop, closing the iterator and cancelling the task all cancel the request;
    a handle that is never iterated runs to its end unless :meth:`cancel` is called.
    """

    def __init__(self, request_id: str, cancel: Callable[[RequestHandle], None]) -> None:
        self.request_id = request_id
        self.tokens = 0
        """Of the answer so far, whether they were read or not."""
        self.prefill: PrefillCosts | None = None
        """What the engine had learned by the first token; None: nothing yet."""
        self._cancel = cancel
        self._lock = threading.Lock()
        self._pending: Delta | None = None
        self._error: AiodisaggError | None = None
        self._over = False
        self._has_pages = False
        self._needed: tuple[int, ...] = ()
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._asks = asyncio.Event()
        self._iterated = False

    def __repr__(self) -> str:
        state = "over" if self._over else "running" if self._has_pages else "waiting"
        return f"<RequestHandle {self.request_id} {state}>"

    @property
    def admitted(self) -> Awaitable[None]:
        """Awaits until the pages of the whole prompt are reserved: from now on rows are of use.

        Raises the request's error if it fails first, EngineError if it is cancelled first. May be awaited repeatedly.
        """
        return self._wait_admitted()

    async def _wait_admitted(self) -> None:
        await self._settled.wait()
        if self._error is not None:
            raise self._error
        if not self._has_pages:
            raise EngineError(self.request_id, "cancelled before it was admitted")

    async def needs(self) -> AsyncGenerator[tuple[int, ...], None]:
        """Indices of the items whose rows are needed, as that becomes known; ends with the request. For one task.

        The first value comes when the pages of the whole prompt are reserved: the items that are not in shared pages,
        perhaps none. More come if the request was preempted and found less when it came back. No item comes twice.
        """
        await self._settled.wait()
        while not self._over:
            self._asks.clear()
            with self._lock:
                needed, self._needed = self._needed, ()
            yield needed
            await self._asks.wait()

    def cancel(self) -> None:
        """Stops the request and frees what it holds; no effect when it is over. The last delta says CANCELLED."""
        if not self._over:
            self._cancel(self)

    async def __aiter__(self) -> AsyncGenerator[Delta, None]:
        if self._iterated:
            raise RuntimeError(f"request {self.request_id} is iterated a second time")
        self._iterated = True
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                with self._lock:
                    delta, self._pending = self._pending, None
                    error = self._error
                if delta is not None:
                    yield delta
                    if delta.finish_reason is not None:
                        return
                if error is not None:
                    raise error
        finally:
            self.cancel()

    # -- the engine's side ---------------------------------------------------------------------------------------

    def _offer(self, delta: Delta | None, error: AiodisaggError | None, needed: tuple[int, ...]) -> None:
        """Any thread; neither delta nor error says that the request is admitted, and which items it needs.

        The reader sees it after :meth:`Outbox.wake`. A request that is over does not change any more.
        """
        with self._lock:
            if self._over:
                return
            self._has_pages |= delta is None and error is None
            self._needed += needed
            if delta is not None:
                self._pending = merge(self._pending, delta)
                self.tokens += len(delta.token_ids)
            self._error = error
            self._over = error is not None or (delta is not None and delta.finish_reason is not None)

    def _wake(self) -> None:
        """The reader first: what it does with a first token that is the last one, too, comes before the end."""
        if self._pending is not None or self._error is not None:
            self._changed.set()
        if self._has_pages or self._over:
            self._settled.set()
        if self._needed or self._over:
            self._asks.set()


@dataclass(frozen=True, slots=True)
class News:
    """For the reader of a request; neither delta nor error: it is admitted, and needs these items."""

    handle: RequestHandle
    delta: Delta | None = None
    error: AiodisaggError | None = None
    needed: tuple[int, ...] = ()


class Outbox:
    """Wakes the readers of many handles with one call into the loop, from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._touched: set[RequestHandle] = set()
        self._scheduled = False

    def give(self, news: Sequence[News]) -> None:
        """Its readers run soon. A loop that has not come round since the last call is not called again."""
        for one in news:
            one.handle._offer(one.delta, one.error, one.needed)
        with self._lock:
            self._touched.update(one.handle for one in news)
            if not self._touched or self._scheduled:
                return
            self._scheduled = True
        self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        with self._lock:
            touched, self._touched = self._touched, set()
            self._scheduled = False
        for handle in touched:
            handle._wake()
