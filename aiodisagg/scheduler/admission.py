"""Who of those that wait goes to the engine next, and who is sent away. Pure: events in, decisions out.

Theory. Little is let through to the engine at a time and the rest waits here, where it can still be put in order,
refused, or given up at no cost. What decides:

* **Lanes.** Requests with media to be encoded and all others wait for different things first, the tower and the
  engine. Each lane lets a little through ahead (:mod:`~aiodisagg.scheduler.lanes`). A full lane does not hold up the
  other. ``max_running`` bounds both together. First come, first served knows one lane only.
* **Tenants** share the lanes, and the places behind them, as :mod:`~aiodisagg.scheduler.shares` says: by weights,
  whoever floods the queue. When the queue is full, the tenant with most in it for its weight makes room.
* **Within a tenant** it is :mod:`~aiodisagg.scheduler.order`, the rule of the engine as well. A newcomer passes those
  that it goes before, from the end of the line until it meets one that goes before it.

Nobody starves, because passing spends slack. A request is due at its ``release_by``: ``max_wait_s`` after its arrival,
or the last moment at which its first token still meets its limit (its deadline and ``max_ttft_s``), whichever is first.
Its *start* is predicted from the work in flight, its tenant's requests before it, and what the shares give to others
meanwhile. Whether a newcomer passes it is asked for the moment at which it would then start: who would be due by then
is not passed. So

1. at the predicted rate, while no further tenant comes and ``max_running`` is not reached, a request is released by the
   later of its ``release_by`` and the start that was predicted on its arrival: passing keeps the former, and a release
   or an end before it keeps both;
2. at any rate, of its tenant and lane only those are released before it from ``release_by`` on that stand before it
   then, and all of them arrived before that moment;
3. between a tenant's lanes, which meet only at ``max_running``, the same order decides, as of now.

Nothing is let in that cannot be in time: a newcomer whose first token is predicted after its limit is shed at once.
One that cannot be in time any more (its limit has passed, or will while it is served) leaves the queue unserved. So
nothing is encoded that nobody waits for.

Predictions need prices (:mod:`~aiodisagg.scheduler.prices`). Until the first have been learned only the bound of the
queue sheds, and ``window_s`` does not count. An idle lane takes whoever comes: that is no overload, whatever a
prediction says, and it is how a wrong one is found out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from aiodisagg.errors import ConfigError, InvalidTransition
from aiodisagg.scheduler.lanes import Lane
from aiodisagg.scheduler.order import Claim, Order
from aiodisagg.scheduler.prices import Work
from aiodisagg.scheduler.shares import PLACES, Entry, Shares, Tenant

_OUTPUT_TOKENS = 2
"""Prompt tokens that a generated token is charged as, as in Sheng et al. 2024, "Fairness in serving large language
models"; it is known, and charged to the tenant, when the request ends."""
_RETRY_S = (1.0, 60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """How much waits, how long, and how much is let through. Raises ConfigError."""

    max_queue: int = 1024
    """Requests that wait; at one more, the tenant with most in the queue for its weight loses its last."""
    max_ttft_s: float = math.inf
    """A request whose first token is not expected within this is shed, on arrival or as soon as that is clear."""
    max_wait_s: float = 10.0
    """The aging bound: nobody is passed who would then have to wait longer than this."""
    order: Order = Order.SHORT_FIRST
    """Of requests of one tenant and class."""
    window_s: float = 1.0
    """Predicted work in a lane that is let through ahead. More than the latency of an idle service keeps it busy."""
    min_in_flight: int = 8
    """Requests in a lane that are let through whatever they cost, to begin with. What is learned raises it, at most to
    half of what the engine runs; a limit on first tokens may lower it."""

    def __post_init__(self) -> None:
        for key in ("max_queue", "max_ttft_s", "max_wait_s", "window_s", "min_in_flight"):
            value = getattr(self, key)
            if not value > 0:
                raise ConfigError(key, f"must be above 0, not {value}")
        if self.order not in tuple(Order):
            raise ConfigError("order", f"{self.order!r} is none of {', '.join(Order)}")


# -- events -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request wants in. ``deadline`` is on the clock of ``now``; ``request_id`` is unique among those not ended."""

    request_id: str
    work: Work
    tenant: Tenant
    priority: int = 0
    """Class within its tenant: lower goes first."""
    deadline: float = math.inf


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A released request has its first token."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A request is over, in whatever way: answered, failed, given up; also while it waits."""

    request_id: str
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TimerFired:
    """``next_timer()`` was reached."""


Event = Arrived | FirstToken | Ended | TimerFired


# -- decisions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Release:
    """The request goes to the engine. FirstToken and Ended, or Ended alone, follow."""

    request_id: str
    waited_s: float


@dataclass(frozen=True, slots=True)
class Shed:
    """The request is turned away and forgotten.

    ``reason``: "queue_full"; "displaced", by another tenant or a better class, from a full queue; "predicted", it could
    not be in time; "late", neither any more.
    """

    request_id: str
    reason: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Expire:
    """The request's deadline passed while it waited. It is forgotten."""

    request_id: str
    waited_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What a first token taught. Times are from the arrival; ``predicted_s`` is None if nothing was known then."""

    request_id: str
    ttft_s: float
    predicted_s: float | None


@dataclass(frozen=True, slots=True)
class Charged:
    """A tenant's account grew."""

    tenant: str
    cost_s: float


Decision = Release | Shed | Expire | Measured | Charged


class AdmissionQueue:
    """The queue before an engine that runs ``max_running`` requests at once.

    All times are seconds on one monotonic clock that the caller keeps.
    """

    def __init__(self, config: AdmissionConfig, max_running: int) -> None:
        self.config, self.max_running = config, max_running
        self.lanes = (self._lane(False), self._lane(True))
        """By whether requests have media to be encoded; where all go as they come they are in the first in any case."""
        self._shares = Shares()
        self._waiting: dict[str, Entry] = {}
        self._running: dict[str, Entry] = {}
        self._arrivals = 0
        self._earliest = math.inf
        """No later than the first limit of those that wait."""

    def _lane(self, has_media: bool) -> Lane:
        config = self.config
        return Lane(has_media, config.window_s, config.min_in_flight, self.max_running // 2, config.max_ttft_s)

    def __repr__(self) -> str:
        return f"<AdmissionQueue {len(self._waiting)} waiting, {len(self._running)} running>"

    @property
    def waiting(self) -> Iterable[Entry]:
        return self._waiting.values()

    @property
    def running(self) -> int:
        """Requests released and not ended."""
        return len(self._running)

    def next_timer(self) -> float | None:
        """When to say TimerFired; None: not needed."""
        return self._earliest if self._earliest < math.inf else None

    def handle(self, event: Event, now: float) -> list[Decision]:
        """What follows from ``event``, in order. Raises InvalidTransition, and nothing has changed."""
        match event:
            case Arrived():
                decisions = self._arrive(event, now)
            case FirstToken():
                decisions = self._first_token(event, now)
            case Ended():
                decisions = self._end(event, now)
            case TimerFired():
                decisions = []
        self._expire(now, decisions)
        self._release(now, decisions)
        if len(self._waiting) > self.config.max_queue:  # only now: who goes at once takes no place in the queue
            decisions.append(self._make_room(now))
        if not self._waiting:
            self._earliest = math.inf
        for lane in self.lanes:
            lane.line(bool(self._shares.waiting(lane.has_media)), now)
        return decisions

    # -- events -----------------------------------------------------------------------------------------------------

    def _arrive(self, event: Arrived, now: float) -> list[Decision]:
        request_id = event.request_id
        if request_id in self._waiting or request_id in self._running:
            raise InvalidTransition("known", "Arrived")
        flow = self._shares.enter(event.tenant)
        has_media = event.work.patches > 0 and self.config.order is not Order.FIRST_COME
        limit = min(event.deadline, now + self.config.max_ttft_s)
        entry = Entry(
            request_id, flow, has_media, event.priority, event.work, now, self._arrivals, event.deadline, limit
        )
        self._arrivals += 1
        if event.deadline <= now:
            self._shares.leave(flow)
            return [Expire(request_id, 0.0)]
        if shed := self._line_up(entry, now):
            self._shares.leave(flow)
            return [shed]
        self._waiting[request_id] = entry
        self._earliest = min(self._earliest, limit)
        return []

    def _first_token(self, event: FirstToken, now: float) -> list[Decision]:
        entry = self._running.get(event.request_id)
        if entry is None or entry.streams:
            raise InvalidTransition("streaming" if entry else "unknown or waiting", "FirstToken")
        entry.streams = True
        self.lanes[entry.has_media].finish(entry, now)
        return [Measured(entry.request_id, now - entry.arrived, entry.predicted_s)]

    def _end(self, event: Ended, now: float) -> list[Decision]:
        decisions: list[Decision] = []
        entry = self._waiting.get(event.request_id)
        if entry is not None:
            self._unqueue(entry)
        else:
            entry = self._running.pop(event.request_id, None)
            if entry is None:
                raise InvalidTransition("unknown", "Ended")
            lane = self.lanes[entry.has_media]
            if not entry.streams:
                lane.abandon(entry, now)
            if event.output_tokens > 0:
                cost_s = lane.prices.of(Work(_OUTPUT_TOKENS * event.output_tokens, requests=0))
                self._shares.charge(entry, cost_s, entry.has_media)
                decisions.append(Charged(entry.flow.name, cost_s))
        self._shares.leave(entry.flow)
        return decisions

    # -- the line ---------------------------------------------------------------------------------------------------

    def _line_up(self, entry: Entry, now: float) -> Shed | None:
        """Takes its place in its tenant's line, or says why it must not."""
        flow, lane, rank = entry.flow, self.lanes[entry.has_media], self.config.order.rank
        line, price = flow.lines[entry.has_media], lane.prices.of
        cost_s, in_flight_s = price(entry.work), lane.in_flight_s(now)
        ahead_s = price(line.work)
        # Of the last one; for those before it, it is no less than the truth, which only makes passing harder.
        not_ours_s = in_flight_s + self._shares.others(flow, entry.has_media, ahead_s, price)
        newcomer = Claim(entry.order, math.inf, entry.priority, cost_s)  # it has not waited yet, so it is never due
        at = len(line.entries)
        while at:
            last = line.entries[at - 1]
            last_s = price(last.work)
            starts = now + not_ours_s + (ahead_s - last_s) + cost_s
            if rank(newcomer, starts) > rank(last.claim._replace(service=last_s), starts):
                break
            ahead_s -= last_s
            at -= 1
        if at < len(line.entries):
            not_ours_s = in_flight_s + self._shares.others(flow, entry.has_media, ahead_s, price)
        start_s = ahead_s + not_ours_s
        latest = entry.limit - lane.predicted_s(0.0, entry.work)
        entry.release_by, entry.service_s = min(now + self.config.max_wait_s, latest), cost_s
        if lane.prices.known:
            entry.predicted_s = lane.predicted_s(start_s, entry.work)
            is_idle = not len(lane) and not lane.somebody_waits
            if (late_s := now + entry.predicted_s - entry.limit) > 0 and not is_idle:
                return Shed(entry.request_id, "predicted", self._retry_after(late_s))
        self._shares.line_up(entry, at)
        return None

    def _unqueue(self, entry: Entry) -> None:
        del self._waiting[entry.request_id]
        self._shares.step_out(entry)

    def _make_room(self, now: float) -> Shed:
        newcomer = next(reversed(self._waiting.values()))
        victim = self._victim(newcomer)
        self._unqueue(victim)
        self._shares.leave(victim.flow)
        reason = "queue_full" if victim is newcomer else "displaced"
        return Shed(victim.request_id, reason, self._retry_after(self._backlog_s(now) / 2))

    def _victim(self, newcomer: Entry) -> Entry:
        """Who leaves a queue that is over its bound; the newcomer, if that is its own tenant's affair and no class is
        below its own."""
        longest = max(
            self._shares.waiting(PLACES),
            key=lambda flow: (flow.waiting / flow.weight, flow is newcomer.flow, flow.name),
        )
        last = max(
            (line.entries[-1] for line in longest.lines if line.entries),
            key=lambda entry: (entry.priority, entry.order),
        )
        return newcomer if longest is newcomer.flow and last.priority <= newcomer.priority else last

    def _backlog_s(self, now: float) -> float:
        """What is to be done for all that are here."""
        return sum(lane.in_flight_s(now) + lane.prices.of(self._shares.work[lane.has_media]) for lane in self.lanes)

    @staticmethod
    def _retry_after(seconds: float) -> float:
        least, most = _RETRY_S
        return min(most, max(least, seconds))

    # -- out of the line --------------------------------------------------------------------------------------------

    def _expire(self, now: float, decisions: list[Decision]) -> None:
        if now < self._earliest:
            return
        late = [entry for entry in self._waiting.values() if entry.limit <= now]
        self._earliest = min((entry.limit for entry in self._waiting.values() if entry.limit > now), default=math.inf)
        for entry in late:
            self._unqueue(entry)
            self._shares.leave(entry.flow)
            decisions.append(self._too_late(entry, now))

    def _too_late(self, entry: Entry, now: float) -> Decision:
        if entry.deadline <= now:
            return Expire(entry.request_id, now - entry.arrived)
        return Shed(entry.request_id, "late", self._retry_after(self._backlog_s(now) / 2))

    def _release(self, now: float, decisions: list[Decision]) -> None:
        while self._waiting and len(self._running) < self.max_running:
            found = self._next(now)
            if found is None:
                return
            entry, queue = found
            lane = self.lanes[entry.has_media]
            if now > entry.arrived and now + self._predicted_s(lane, entry, now) > entry.limit:
                self._unqueue(entry)
                self._shares.leave(entry.flow)
                decisions.append(self._too_late(entry, now))
                continue
            lane.enter(entry, now)
            self._shares.serve(entry, queue)
            self._unqueue(entry)
            self._running[entry.request_id] = entry
            decisions.append(Release(entry.request_id, now - entry.arrived))
            decisions.append(Charged(entry.flow.name, entry.cost_s))

    @staticmethod
    def _predicted_s(lane: Lane, entry: Entry, now: float) -> float:
        """To its first token, if it is released now; nothing as long as nothing is known. In an empty lane only the
        price counts: what was learned of the latency is corrected by first tokens alone, and this one's may be."""
        if not lane.prices.known:
            return 0.0
        return lane.predicted_s(lane.in_flight_s(now), entry.work) if len(lane) else lane.prices.of(entry.work)

    def _next(self, now: float) -> tuple[Entry, int] | None:
        """The first of the tenant whose turn it is, and in which queue it is: that of a lane with room, or, if there is
        room in both but only one place behind them, in that for the places."""
        lanes = [lane for lane in self.lanes if self._shares.waiting(lane.has_media) and lane.has_room(now)]
        if not lanes:
            return None
        queue = PLACES if len(lanes) == 2 and len(self._running) + 1 == self.max_running else lanes[0].has_media
        flow = self._shares.queues[queue].first()
        lines = flow.lines if queue == PLACES else (flow.lines[queue],)
        heads = [line.entries[0] for line in lines if line.entries]
        return min(heads, key=lambda entry: self.config.order.rank(entry.claim, now)), queue
