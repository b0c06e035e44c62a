"""How much is let through ahead: work on its way to a first token, of the requests with media or of those without.

Too little starves what works in batches and on several peers; too much makes a queue behind the queue, in which
whoever comes late waits for all. A lane has room while less than ``window_s`` of predicted work is in flight in it, or
fewer than ``min_in_flight`` requests. Where a first token must come within ``max_ttft_s``, the window is at most a
quarter of that, and the count fills at most half of it: the rest is for the queue, where order counts.
"""

from __future__ import annotations

from aiodisagg.scheduler.prices import NOTHING, Prices
from aiodisagg.scheduler.shares import Entry

_LATENCY_GAIN = 0.1


class Lane:
    """What is under way to its first token, and what that costs. ``prices`` and ``latency_s`` are learned."""

    def __init__(self, has_media: bool, window_s: float, min_in_flight: int, max_ttft_s: float) -> None:
        self.has_media = has_media
        self._window_s, self._min_in_flight, self._most_s = min(window_s, max_ttft_s / 4), min_in_flight, max_ttft_s / 2
        self.prices = Prices()
        self.latency_s = 0.0
        """By how much a first token comes later after the release than the work in flight says, on the average of
        recent ones: the latency of an idle service beyond its price."""
        self._flight: dict[str, Entry] = {}
        self._work = NOTHING
        self._began = 0.0
        """Since when the oldest in flight is the oldest, or works alone."""
        self._last = 0.0
        """When the last first token came."""
        self._somebody_waits = False
        self._saturated = False
        """Somebody has waited ever since then, and nobody gave up."""
        self._teaches = True
        """Nobody gave up since ``_began``: how much of that one was done, nobody knows."""

    def __repr__(self) -> str:
        return f"<Lane {'media' if self.has_media else 'text'} {len(self)} in flight, {self.prices!r}>"

    def __len__(self) -> int:
        return len(self._flight)

    @property
    def somebody_waits(self) -> bool:
        """Whether the lane's queue is not empty; the owner says so after each event."""
        return self._somebody_waits

    @somebody_waits.setter
    def somebody_waits(self, value: bool) -> None:
        self._somebody_waits = value
        self._saturated &= value

    def in_flight_s(self, now: float) -> float:
        """Work let through that is not done, in seconds; what the oldest has had by now is done."""
        if not self._flight:
            return 0.0
        oldest = self.prices.of(next(iter(self._flight.values())).work)
        return self.prices.of(self._work) - min(oldest, max(0.0, now - self._began))

    def has_room(self, now: float) -> bool:
        few = len(self._flight) < self._min_in_flight
        if not self.prices.known:
            return few
        return self.in_flight_s(now) < (max(self._window_s, self._most_s) if few else self._window_s)

    def enter(self, entry: Entry, now: float) -> None:
        """The request is released."""
        if not self._flight:
            self._began, self._teaches = now, True
        entry.cost_s = self.prices.of(entry.work)
        entry.ahead_s = self.in_flight_s(now) + entry.cost_s
        entry.released = now
        self._flight[entry.request_id] = entry
        self._work += entry.work

    def finish(self, entry: Entry, now: float) -> None:
        """The request's first token is here."""
        if self._teaches:
            since = self._last if self._saturated else self._began
            self.prices.observe(now - since, entry.work, saturated=self._saturated)
        self._last, self._teaches, self._saturated = now, True, self._somebody_waits
        if self.prices.known:
            late_s = now - entry.released - entry.ahead_s
            self.latency_s += _LATENCY_GAIN * (late_s - self.latency_s)
        self._leave(entry, now)

    def abandon(self, entry: Entry, now: float) -> None:
        """The request ended before."""
        self._teaches = self._saturated = False
        self._leave(entry, now)

    def _leave(self, entry: Entry, now: float) -> None:
        del self._flight[entry.request_id]
        self._work -= entry.work
        self._began = now
