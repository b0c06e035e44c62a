"""How much is let through ahead: work on its way to a first token, of the requests with media to be encoded or of all
others.

Too little starves what works in batches and on several peers; too much makes a queue behind the queue, in which
whoever comes late waits for all. A lane has room while less than ``window_s`` of predicted work is in flight in it, or
fewer requests than :mod:`~aiodisagg.scheduler.lanes_breadth` has found to be worth it. Where a first token must come
within ``max_ttft_s``, the window is at most a quarter of that, and the number fills half of it at first: the rest is
for the queue, where order counts.
"""

from __future__ import annotations

from aiodisagg.scheduler.lanes_breadth import Breadth
from aiodisagg.scheduler.prices import NOTHING, Prices, Round, Work
from aiodisagg.scheduler.shares import Entry

_LATENCY_GAIN = 0.1
_SLACK = 0.1
"""Part of a lesson's time without anybody waiting, and of its work given up, that does not spoil it."""


class Lane:
    """What is under way to its first token, and what that costs. ``prices``, ``latency_s`` and ``breadth`` are learned.

    Args:
        min_in_flight, max_in_flight: requests that are let through whatever they cost, to begin with and at most.
    """

    def __init__(
        self, has_media: bool, window_s: float, min_in_flight: int, max_in_flight: int, max_ttft_s: float
    ) -> None:
        self.has_media = has_media
        self._window_s = min(window_s, max_ttft_s / 4)
        self.breadth = Breadth(min_in_flight, max_in_flight, self._window_s, max_ttft_s / 2)
        self.prices = Prices()
        self.latency_s = 0.0
        """By how much a first token comes later after the release than the work in flight says, on the average of
        recent ones: the latency of an idle service beyond its price. Below 0 if it comes earlier, as in batches."""
        self._flight: dict[str, Entry] = {}
        self._work = NOTHING
        self._began = 0.0
        """Since when the oldest in flight is the oldest, or works alone."""
        self.somebody_waits = False
        """Whether the lane's queue is not empty."""
        self._seen_at = 0.0
        self._round, self._waited_s = Round(), 0.0
        """Whatever is done, and the part of its time with somebody waiting."""
        self._lesson: Round | None = None
        """Since a first token with somebody waiting, as long as somebody does; ``_idle_s`` and ``_lost``: except."""
        self._idle_s, self._lost = 0.0, NOTHING

    def __repr__(self) -> str:
        kind = "media" if self.has_media else "text"
        return f"<Lane {kind} {len(self)} in flight, {self.breadth!r}, {self.prices!r}>"

    def __len__(self) -> int:
        return len(self._flight)

    def in_flight_s(self, now: float) -> float:
        """Work let through that is not done, in seconds; what the oldest has had by now is done."""
        if not self._flight:
            return 0.0
        oldest = self.prices.of(next(iter(self._flight.values())).work)
        return self.prices.of(self._work) - min(oldest, max(0.0, now - self._began))

    def has_room(self, now: float) -> bool:
        if len(self._flight) < self.breadth.limit:
            return True
        return self.prices.known and self.in_flight_s(now) < self._window_s

    def predicted_s(self, ahead_s: float, work: Work) -> float:
        """Until the first token of a request that is released when ``ahead_s`` of work is in flight."""
        return max(0.0, ahead_s + self.latency_s) + self.prices.of(work)

    def line(self, somebody_waits: bool, now: float) -> None:
        """Whether somebody waits in the lane's queue from now on."""
        if somebody_waits is not self.somebody_waits:
            self._pass(now)
            self.somebody_waits = somebody_waits

    def enter(self, entry: Entry, now: float) -> None:
        """The request is released."""
        self._pass(now)
        if not self._flight:
            self._began = now
        entry.cost_s = self.prices.of(entry.work)
        entry.ahead_s = self.in_flight_s(now) + entry.cost_s
        entry.released = now
        self._flight[entry.request_id] = entry
        self._work += entry.work
        if self.prices.known:
            self.breadth.guess(self.prices.of(self._work) / len(self._flight))

    def finish(self, entry: Entry, now: float) -> None:
        """The request's first token is here."""
        self._pass(now)
        seen = Round(0.0, entry.work, now - entry.released)
        self._round += seen
        if self._lesson is not None:
            self._lesson += seen
            price, slack_s = self.prices.of, _SLACK * self._lesson.took_s
            if self._idle_s > slack_s or price(self._lost) > _SLACK * price(self._lesson.done):
                self._lesson = None
        self._learn()
        if self._lesson is None and self.somebody_waits:
            self._lesson, self._idle_s, self._lost = Round(), 0.0, NOTHING
        if self.prices.known:
            self.latency_s += _LATENCY_GAIN * (seen.latency_s - entry.ahead_s - self.latency_s)
        self._leave(entry, now)

    def abandon(self, entry: Entry, now: float) -> None:
        """The request ended before. How much of it was done, nobody knows."""
        self._pass(now)
        self._lost += entry.work
        self._leave(entry, now)

    def _leave(self, entry: Entry, now: float) -> None:
        del self._flight[entry.request_id]
        self._work -= entry.work
        self._began = now

    # -- what it teaches --------------------------------------------------------------------------------------------

    def _pass(self, now: float) -> None:
        """Time goes by."""
        if now == self._seen_at:
            return
        passed, self._seen_at = Round(now - self._seen_at), now
        if self._flight or self.somebody_waits:
            self._round += passed
        if self.somebody_waits:
            self._waited_s += passed.took_s
        if self._lesson is not None:
            self._lesson += passed
            if not self.somebody_waits:
                self._idle_s += passed.took_s

    def _learn(self) -> None:
        if self._lesson is not None and self._lesson.is_whole:
            self.prices.observe(self._lesson, saturated=True)
            self._lesson = None
        if self._round.is_whole:
            if self._waited_s < (1 - _SLACK) * self._round.took_s:
                self.prices.observe(self._round, saturated=False)
            if self.prices.known:
                self.breadth.ended(self._round, self.prices.of)
            self._round, self._waited_s = Round(), 0.0
