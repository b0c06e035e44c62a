"""An AdmissionQueue in front of a pretended service, with everything that came out of it."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field

from aiodisagg.scheduler.admission import (
    AdmissionConfig,
    AdmissionQueue,
    Arrived,
    Charged,
    Decision,
    Ended,
    Event,
    Expire,
    FirstToken,
    Measured,
    Release,
    Shed,
    TimerFired,
)
from aiodisagg.scheduler.lanes import Lane
from aiodisagg.scheduler.order import Order
from aiodisagg.scheduler.prices import Round, Work
from aiodisagg.scheduler.shares import Entry, Tenant

TEXT, PICTURE, BIG = Work(100), Work(1_000, 4_000), Work(8_000, 32_000)
ALICE, BOB = Tenant("alice"), Tenant("bob")


def knows(lane: Lane) -> None:
    """Has the lane's prices count as learned; they stay as they are."""
    work = Work(800, 800 if lane.has_media else 0, requests=8)
    lane.prices.observe(Round(lane.prices.of(work), work), saturated=True)
    assert lane.prices.known


@dataclass
class Front:
    """Feeds a queue and remembers its decisions."""

    queue: AdmissionQueue
    now: float = 0.0
    said: list[tuple[float, Decision]] = field(default_factory=list)
    names: itertools.count[int] = field(default_factory=itertools.count)

    @classmethod
    def of(cls, max_running: int = 1000, *, known: bool = False, **config: float | Order) -> Front:
        front = cls(AdmissionQueue(AdmissionConfig(**config), max_running))  # type: ignore[arg-type]
        if known:
            for lane in front.queue.lanes:
                knows(lane)
        return front

    def price(self, work: Work) -> float:
        return self.queue.lanes[work.patches > 0].prices.of(work)

    def do(self, event: Event, after: float = 0.0) -> list[Decision]:
        self.now += after
        decisions = self.queue.handle(event, self.now)
        self.said += [(self.now, decision) for decision in decisions]
        return [decision for decision in decisions if not isinstance(decision, Charged | Measured)]

    def arrive(
        self, name: str, work: Work = PICTURE, tenant: Tenant = ALICE, *, priority: int = 0, within: float = 1e9
    ) -> list[Decision]:
        return self.do(Arrived(name, work, tenant, priority, self.now + within))

    def token(self, name: str, after: float = 0.0) -> list[str]:
        return released(self.do(FirstToken(name), after))

    def end(self, name: str, after: float = 0.0, output_tokens: int = 0) -> list[str]:
        return released(self.do(Ended(name, output_tokens), after))

    def tick(self, after: float) -> list[Decision]:
        return self.do(TimerFired(), after)

    def order(self, *first: str) -> list[str]:
        """The names in the order in which they are released when one has its first token after another."""
        found = list(first)
        for name in found:
            found += self.token(name)
        return found

    def entry(self, name: str) -> Entry:
        return next(entry for entry in self.queue.waiting if entry.request_id == name)


def released(decisions: list[Decision]) -> list[str]:
    assert all(isinstance(decision, Release) for decision in decisions), decisions
    return [decision.request_id for decision in decisions if isinstance(decision, Release)]


@dataclass
class Asked:
    """A request of a run: when it comes, what it asks, and how it behaves."""

    at: float
    work: Work
    tenant: Tenant = ALICE
    priority: int = 0
    within: float = 1e9
    leaves_after: float | None = None
    """Gives up then, wherever it is; the service goes on with it all the same."""
    only_in_line: bool = False
    """Gives up only if it still waits."""


@dataclass
class Seen:
    """What became of a request of a run."""

    asked: Asked
    entry: Entry | None = None
    """As it was in line; None: it was never."""
    released_at: float | None = None
    fates: list[str] = field(default_factory=list)


class Run:
    """Requests through a queue and a service that works on one released request after another, in each lane.

    ``slowness``: by how much it is slower than the prices say. ``overtaken``: (who, by whom, when) in a line.
    """

    def __init__(self, front: Front, asked: list[Asked], *, slowness: float = 1.0, decodes_s: float = 0.0) -> None:
        self.front, self.slowness, self.decodes_s = front, slowness, decodes_s
        self.seen = {str(i): Seen(one) for i, one in enumerate(asked)}
        self.overtaken: list[tuple[Entry, Entry, float]] = []
        self._busy_until = [0.0, 0.0]
        self._order = itertools.count()
        self._agenda: list[tuple[float, int, str, str]] = []
        for name, seen in self.seen.items():
            self._plan(seen.asked.at, "arrive", name)
        while self._agenda:
            at, _, what, name = heapq.heappop(self._agenda)
            timer = front.queue.next_timer()
            while timer is not None and timer <= at:
                self._take(front.queue.handle(TimerFired(), timer), timer)
                timer = front.queue.next_timer()
            self._happen(what, name, at)

    def _plan(self, at: float, what: str, name: str) -> None:
        heapq.heappush(self._agenda, (at, next(self._order), what, name))

    def _happen(self, what: str, name: str, at: float) -> None:
        queue, seen = self.front.queue, self.seen[name]
        if seen.fates and what != "arrive":
            return  # gave up before
        if what == "leave":
            if seen.released_at is not None and seen.asked.only_in_line:
                return
            what = "end"
        if what == "arrive":
            one = seen.asked
            event: Event = Arrived(name, one.work, one.tenant, one.priority, at + one.within)
            if one.leaves_after is not None:
                self._plan(at + one.leaves_after, "leave", name)
        elif what == "token":
            event = FirstToken(name)
            self._plan(at + self.decodes_s, "end", name)
        else:
            seen.fates.append("ended")
            event = Ended(name)
        decisions = queue.handle(event, at)
        if what == "arrive":
            gone = {entry.request_id: entry for entry in queue.waiting}
            seen.entry = gone.get(name)
        self._take(decisions, at)

    def _take(self, decisions: list[Decision], now: float) -> None:
        queue = self.front.queue
        self.front.said += [(now, decision) for decision in decisions]
        for decision in decisions:
            if isinstance(decision, Release):
                seen = self.seen[decision.request_id]
                assert seen.released_at is None
                seen.released_at = now
                mine = queue._running[decision.request_id]
                self.overtaken += [
                    (other, mine, now)
                    for other in queue.waiting
                    if (other.flow, other.has_media) == (mine.flow, mine.has_media) and other.order < mine.order
                ]
                lane = mine.has_media
                took_s = self.front.price(mine.work) * self.slowness
                self._busy_until[lane] = max(now, self._busy_until[lane]) + took_s
                self._plan(self._busy_until[lane], "token", decision.request_id)
            elif isinstance(decision, Shed):
                self.seen[decision.request_id].fates.append(f"shed {decision.reason}")
            elif isinstance(decision, Expire):
                self.seen[decision.request_id].fates.append("expired")
