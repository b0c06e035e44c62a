"""Pretended services behind an AdmissionQueue, in virtual time."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from aiodisagg.scheduler.admission import (
    AdmissionConfig,
    AdmissionQueue,
    Arrived,
    Charged,
    Decision,
    Ended,
    Expire,
    FirstToken,
    Release,
    Shed,
    TimerFired,
)
from aiodisagg.scheduler.prices import Work
from aiodisagg.scheduler.shares import Tenant
from tests.scheduler.lines import ALICE, PICTURE

Serve = Callable[["Service", str, float], None]
"""Called when a request is released: sees to it that ``service.done`` is called later."""


@dataclass
class Service:
    """A queue and what is behind it.

    ``fates``: how many were served, shed (by reason) and expired, since ``since``; ``lates``: whose first token came
    later after the arrival than the queue's limit; ``in_flight``: seconds in flight since then, of all together.
    """

    queue: AdmissionQueue
    serve: Serve
    now: float = 0.0
    since: float = 0.0
    fates: Counter[str] = field(default_factory=Counter)
    lates: int = 0
    in_flight_s: float = 0.0
    charged_s: Counter[str] = field(default_factory=Counter)
    arrived: dict[str, tuple[float, Work, Tenant]] = field(default_factory=dict)
    after: Callable[[str], None] = lambda name: None
    """Called when a request is over."""
    _agenda: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (when, next(self._order), what))

    def arrive(self, work: Work = PICTURE, tenant: Tenant = ALICE) -> None:
        name = f"r{next(self._order)}"
        self.arrived[name] = self.now, work, tenant
        self._act(self.queue.handle(Arrived(name, work, tenant), self.now))

    def done(self, name: str) -> None:
        """Its first token is here, and the rest at once."""
        self._count("served")
        self.lates += self.now - self.arrived[name][0] > self.queue.config.max_ttft_s
        self._act(self.queue.handle(FirstToken(name), self.now))
        self._act(self.queue.handle(Ended(name, 1), self.now))
        self.after(name)

    def run(self, until: float) -> None:
        while self._agenda and self._agenda[0][0] <= until:
            when, _, what = heapq.heappop(self._agenda)
            timer = self.queue.next_timer()
            while timer is not None and timer <= when:
                self._act(self.queue.handle(TimerFired(), timer))
                timer = self.queue.next_timer()
            self.in_flight_s += (when - self.now) * sum(map(len, self.queue.lanes))
            self.now = when
            what()
        self.in_flight_s += (until - self.now) * sum(map(len, self.queue.lanes))
        self.now = until

    def forget(self) -> None:
        """Counts from now on."""
        self.since, self.lates, self.in_flight_s = self.now, 0, 0.0
        self.fates.clear()
        self.charged_s.clear()

    @property
    def rate(self) -> float:
        return self.fates["served"] / (self.now - self.since)

    @property
    def number(self) -> float:
        """Requests in flight, on the average."""
        return self.in_flight_s / (self.now - self.since)

    def _count(self, fate: str) -> None:
        self.fates[fate] += 1

    def _act(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Release(name):
                    self.serve(self, name, self.now)
                case Shed(name, reason):
                    self._count(reason)
                    self.at(self.now, lambda name=name: self.after(name))  # type: ignore[misc]
                case Expire(name):
                    self._count("expired")
                case Charged(tenant, cost_s):
                    self.charged_s[tenant] += cost_s
                case _:
                    pass


@dataclass
class Towers:
    """Each takes one request after another, for ``item_s``, more or less: a normal deviation of ``spread`` of it."""

    count: int
    item_s: float
    spread: float = 0.1
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    free_at: list[float] = field(default_factory=list)

    def __call__(self, service: Service, name: str, now: float) -> None:
        self.free_at = sorted(max(now, at) for at in [*self.free_at, *[now] * self.count][: self.count])
        self.free_at[0] += self.item_s * max(0.1, self.rng.gauss(1.0, self.spread))
        service.at(self.free_at[0], lambda: service.done(name))


@dataclass
class Steps:
    """An engine that takes up to ``per_step`` requests into a step of ``step_s``; their first tokens come ``gap_s``
    apart, and then the next step begins."""

    per_step: int
    step_s: float
    gap_s: float
    waiting: list[str] = field(default_factory=list)
    busy: bool = False

    def __call__(self, service: Service, name: str, now: float) -> None:
        self.waiting.append(name)
        if not self.busy:
            self.busy = True
            service.at(now, lambda: self._step(service))

    def _step(self, service: Service) -> None:
        batch, self.waiting = self.waiting[: self.per_step], self.waiting[self.per_step :]
        self.busy = bool(batch)
        if not batch:
            return
        at = service.now + self.step_s
        for number, name in enumerate(batch):
            service.at(at + number * self.gap_s, lambda name=name: service.done(name))  # type: ignore[misc]
        service.at(at + len(batch) * self.gap_s, lambda: self._step(service))


def closed(serve: Serve, clients: int, work: Work = PICTURE, **config: float) -> Service:
    """As many clients, each of which asks again when its request is over."""
    service = Service(AdmissionQueue(AdmissionConfig(**config), 64), serve)  # type: ignore[arg-type]
    service.after = lambda name: service.arrive(work)
    for _ in range(clients):
        service.arrive(work)
    return service


def open_loop(serve: Serve, rate: float, work: Work = PICTURE, seed: int = 1, **config: float) -> Service:
    """Clients come by chance, ``rate`` a second."""
    service = Service(AdmissionQueue(AdmissionConfig(**config), 64), serve)  # type: ignore[arg-type]
    rng = random.Random(seed)

    def come() -> None:
        service.arrive(work)
        service.at(service.now + rng.expovariate(rate), come)

    service.at(0.0, come)
    return service
