"""From requests' items to fetches: what is cached is delivered, what is under way is shared, the rest is fetched.

A fetch is the protocol's item; it bears the key of the request's item that started it and outlives that one while
others share it. An item's deadline is its own: who joins a fetch and has less time leaves it earlier; who has more
time than the fetch continues with another. Who joins and goes before the others hurries the fetch, and the one that
continues begins as urgent as the most urgent of those that are left.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
from prometheus_client.core import Metric

from aiodisagg.device.copies import Accelerator
from aiodisagg.language.fanout import Data, Deliver, FanOut
from aiodisagg.language.trace import Traces
from aiodisagg.peer import metrics
from aiodisagg.peer.driver import Tasks
from aiodisagg.protocol.events import Fail, ItemSpec
from aiodisagg.protocol.messages import ItemKey, Urgency
from aiodisagg.scheduler.flight import Flights, Landing, RowCache
from aiodisagg.scheduler.health import ITEMS_FAULT

logger = logging.getLogger(__name__)

INLINE_BYTES = 64 * 1024
"""Less than this is delivered on the loop."""

Fetch = Callable[[Sequence[tuple[ItemKey, ItemSpec, float]]], None]
Ended = Callable[[ItemKey, Fail | None], None]


@dataclass(slots=True)
class _Wanted:
    """An item of a request, from ``request`` to its end."""

    spec: ItemSpec
    timeout_s: float
    deadline: float
    fan: FanOut | None = None
    timer: asyncio.TimerHandle | None = None

    def urgency(self, now: float) -> Urgency:
        """As it is by now."""
        return self.spec.urgency.later(self.timeout_s - (self.deadline - now))


class Sharing:
    """Methods belong to the loop's thread, but for ``deliver``.

    Args:
        fetch: starts fetches (key, item, seconds left) of one request; each ends in ``landed`` or ``failed``.
        drop: ends a fetch; nothing more is told of it.
        hurry: somebody of this urgency waits for a fetch as well.
        deliver, ended: as ``RowReceiver`` has them.
    """

    def __init__(
        self, fetch: Fetch, drop: Callable[[ItemKey], None], hurry: Callable[[ItemKey, Urgency], None], *,
        deliver: Deliver, ended: Ended, cache_bytes: int, row_bytes: int, tasks: Tasks, traces: Traces,
        accelerator: Accelerator | None,
    ) -> None:  # fmt: skip
        self._fetch, self._drop, self._hurry, self._deliver, self._ended = fetch, drop, hurry, deliver, ended
        self._row_bytes, self._tasks, self._traces, self._accelerator = row_bytes, tasks, traces, accelerator
        self._inline_bytes = INLINE_BYTES if accelerator is None else 0
        self.cache: RowCache[np.ndarray] = RowCache(cache_bytes)
        self.flights: Flights[ItemKey] = Flights()
        self._wanted: dict[ItemKey, _Wanted] = {}
        self._fans: dict[ItemKey, FanOut] = {}
        """By fetch."""
        self._keeping_bytes = 0
        """Of the fans that keep."""
        self._loop = asyncio.get_running_loop()

    def has(self, digest: str) -> bool:
        """Whether the item would be delivered without asking anybody."""
        return digest in self.cache

    def request(self, items: Sequence[tuple[ItemKey, ItemSpec]], timeout_s: float) -> None:
        """Items of one request, in prompt order; each ends in ``ended`` or in ``cancel``."""
        now, fetched = self._loop.time(), []
        for key, spec in items:
            wanted = self._wanted[key] = _Wanted(spec, timeout_s, now + timeout_s)
            if (rows := self.cache.get(spec.digest)) is not None:
                self._traces.cached(key)
                self._from_cache(key, rows)
            elif self._join(key, wanted):
                fetched.append((key, spec, timeout_s))
        if fetched:
            self._fetch(fetched)

    def _join(self, key: ItemKey, wanted: _Wanted) -> bool:
        """Whether a fetch has to be started for it."""
        spec, flight = wanted.spec, self.flights.get(wanted.spec.digest)
        if flight is not None:
            self.flights.join(spec.digest, key, wanted.deadline)
            self._share(key, wanted, self._fans[flight.legs[0]])
            for leg in flight.legs:
                self._hurry(leg, spec.urgency)
            return False
        keeps = self._has_room(spec.rows * self._row_bytes)
        # What is not kept has a name of its own: nobody can share it.
        self.flights.join(spec.digest if keeps else f"{key} {spec.digest}", key, wanted.deadline)
        fan = FanOut(spec.rows, self._row_bytes, self._deliver, keeps=keeps, accelerator=self._accelerator)
        fan.share(key)
        wanted.fan = fan
        self._put(key, fan)
        return True

    def _has_room(self, size_bytes: int) -> bool:
        """Whether the rows may be kept while they come: all that do together are no more than the cache holds."""
        return self._keeping_bytes + size_bytes <= self.cache.capacity_bytes

    def _put(self, leg: ItemKey, fan: FanOut) -> None:
        """The fetch fills the fan."""
        if fan.keeps and not fan.legs:
            self._keeping_bytes += fan.size_bytes
        fan.legs += 1
        self._fans[leg] = fan

    def _pop(self, leg: ItemKey) -> FanOut | None:
        """The fetch is over, or nobody needs it."""
        fan = self._fans.pop(leg, None)
        if fan is not None:
            fan.legs -= 1
            if fan.keeps and not fan.legs:
                self._keeping_bytes -= fan.size_bytes
        return fan

    def _share(self, key: ItemKey, wanted: _Wanted, fan: FanOut) -> None:
        self._traces.shared(key, self.sharers(key)[0], fan.counted)
        wanted.fan = fan
        self._arm([key])
        if spans := fan.share(key):
            self._work(fan.here * self._row_bytes, partial(fan.catch_up, key, spans), f"catch up {key}")

    def _arm(self, keys: Sequence[ItemKey]) -> None:
        """From now on they know by themselves when it is too late."""
        for key in keys:
            wanted = self._wanted.get(key)
            if wanted is not None and wanted.timer is None:
                wanted.timer = self._loop.call_at(wanted.deadline, self._too_late, key)

    def _work(self, size_bytes: int, work: Callable[[], None], name: str) -> None:
        """Small work now, large on a thread."""
        if size_bytes <= self._inline_bytes:
            work()
        else:
            self._tasks.start(asyncio.to_thread(work), name)

    def _from_cache(self, key: ItemKey, rows: np.ndarray) -> None:
        if rows.nbytes <= self._inline_bytes:
            self._deliver(key, 0, rows.data)
            self._loop.call_soon(self._end, key, None)
        else:
            self._tasks.start(self._deliver_cached(key, rows), f"cached {key}")

    async def _deliver_cached(self, key: ItemKey, rows: np.ndarray) -> None:
        try:
            await asyncio.to_thread(self._deliver, key, 0, rows.data)
        except Exception as error:
            logger.exception("item %s: cached rows could not be delivered", key)
            self._end(key, Fail(key, "undelivered", repr(error), ()))
        else:
            self._end(key, None)

    def cancel(self, key: ItemKey) -> None:
        """Nobody waits for this item any more. Does nothing if it has ended."""
        self._leave(key)

    def _leave(self, key: ItemKey) -> None:
        wanted = self._wanted.pop(key, None)
        if wanted is None:
            return
        if wanted.timer is not None:
            wanted.timer.cancel()
        if wanted.fan is not None:
            wanted.fan.leave(key)
        for leg in self.flights.leave(key):
            self._end_leg(leg)

    def _end_leg(self, leg: ItemKey) -> None:
        self._pop(leg)
        self._drop(leg)

    def _too_late(self, key: ItemKey) -> None:
        wanted = self._wanted.get(key)
        if wanted is not None:
            self._end(key, Fail(key, "deadline", f"not complete after {wanted.timeout_s:g} s", ("shared a fetch",)))

    def _end(self, key: ItemKey, failed: Fail | None) -> None:
        """The item's end is told, once, unless it was cancelled."""
        if key in self._wanted:
            self._leave(key)
            self._ended(key, failed if failed is None else dataclasses.replace(failed, key=key))

    def close(self) -> None:
        """Nothing is told any more."""
        for wanted in self._wanted.values():
            if wanted.timer is not None:
                wanted.timer.cancel()
        self._wanted.clear()

    # -- fetches -------------------------------------------------------------------------------------------------

    def hedge(self, leg: ItemKey) -> tuple[ItemKey, ItemSpec, float] | None:
        """A second fetch for what this one fetches, if it has none: its key, the item and the seconds left."""
        flight = self.flights.of(leg)
        if flight is None or len(flight.legs) > 1:
            return None
        wanted = self._wanted[next(iter(flight.sharers))]
        key = ItemKey(secrets.randbits(62), leg.index)
        self.flights.hedge(flight.digest, key)
        self._put(key, self._fans[leg])
        left_s = max(max(flight.sharers.values()) - self._loop.time(), 0.001)
        waited = wanted.spec.urgency.later(math.inf)  # long enough
        return key, dataclasses.replace(wanted.spec, urgency=waited), left_s

    def sharers(self, leg: ItemKey) -> tuple[ItemKey, ...]:
        flight = self.flights.of(leg)
        return () if flight is None else tuple(flight.sharers)

    def fetches(self, leg: ItemKey) -> tuple[ItemKey, ...]:
        """All fetches that are under way for what this one fetches."""
        flight = self.flights.of(leg)
        return () if flight is None else tuple(flight.legs)

    def deliver(self, leg: ItemKey, start: int, data: Data) -> None:
        """Rows of a fetch, on any thread."""
        fan = self._fans.get(leg)
        if fan is not None:
            fan.deliver(start, data)

    def taken(self, leg: ItemKey) -> None:
        """Rows of a fetch were taken: tells the traces of those that nobody had."""
        fan = self._fans.get(leg)
        if fan is None:
            return
        new = fan.here - fan.counted
        for i, key in enumerate(self.sharers(leg) if new else ()):
            self._traces.arrived(key, new, 0 if i else new * self._row_bytes)
        fan.counted += new

    def landed(self, leg: ItemKey) -> None:
        """All rows of a fetch were taken."""
        fan, landing = self._pop(leg), self.flights.landed(leg)
        if fan is None or landing is None:
            return
        for other in landing.cancel:
            self._end_leg(other)
        fan.when_idle(partial(self._complete, leg, fan, landing))

    def _complete(self, leg: ItemKey, fan: FanOut, landing: Landing[ItemKey]) -> None:
        kept = fan.kept()
        if not fan.complete:  # a delivery failed after another fetch had been told that these rows are here
            self._tell(landing.sharers, Fail(leg, "undelivered", "rows could not be delivered", ()))
            return
        if kept is not None:
            self.cache.put(landing.digest, kept, kept.nbytes)
        for key, error in fan.failed.items():
            self._end(key, Fail(key, "undelivered", repr(error), ()))
        self._tell(landing.sharers, None)

    def failed(self, failed: Fail) -> None:
        """A fetch failed. With a second one under way, or time left, nobody has to know, unless it is the item."""
        leg, heir = failed.key, None
        fan = self._pop(leg)
        if failed.code == "deadline":
            landing, heir = self.flights.expired(leg, self._loop.time())
        else:
            self._arm(self.sharers(leg))  # who began the fetch relied on its deadline
            landing = self.flights.failed(leg, for_good=failed.code in ITEMS_FAULT)
        if landing is not None:
            for other in landing.cancel:
                self._end_leg(other)
            self._tell(landing.sharers, failed)
        if heir is not None and fan is not None:
            wanted, now = self._wanted[heir], self._loop.time()
            self._put(heir, fan)
            urgencies = (self._wanted[key].urgency(now) for key in self.sharers(heir))
            urgency = reduce(lambda best, one: one if one.before(best) else best, urgencies)
            spec = dataclasses.replace(wanted.spec, urgency=urgency)
            self._fetch([(heir, spec, max(wanted.deadline - now, 0.001))])

    def _tell(self, sharers: Sequence[ItemKey], failed: Fail | None) -> None:
        for key in sharers:
            self._end(key, failed)

    def metrics(self) -> list[Metric]:
        cache = self.cache
        return [
            metrics.counter("row_cache_hits", "Items whose rows were here.", cache.hits),
            metrics.counter("row_cache_misses", "Items whose rows were not.", cache.misses),
            metrics.counter("row_cache_saved_bytes", "Bytes of rows that were not fetched.", cache.saved_bytes),
            metrics.counter("row_cache_evictions", "Items that were dropped for others.", cache.evicted),
            metrics.gauge("row_cache_bytes", "Bytes of rows kept.", cache.used_bytes),
            metrics.counter("fetches_shared", "Items that shared a fetch under way.", self.flights.shared),
        ]
