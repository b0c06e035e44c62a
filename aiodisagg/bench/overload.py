"""What the line before the engine is worth: more load than can be served, and text beside images. In virtual time.

The policy is the real one (:mod:`aiodisagg.scheduler.admission`); the service behind it is a model, so that a run is
exact, the same for every policy, and takes seconds: encoders that take images one by one, and an engine that computes
steps of decodes and chunks of prefill. Its times are those of a 30B-A3B model on H200s, each drawn with a spread that
the policy does not know. :mod:`aiodisagg.bench.overload_real` does the same with real services.

Policies:

* ``line``: this package's; sheds what cannot have its first token within the limit.
* ``engine``: no line; the engine takes whoever comes, in order, and lets short prefills go beside a long one.
* ``fcfs``: no line, and every prefill in the order of arrival.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec
from rich.table import Table

from aiodisagg.bench.serve_metrics import percentile
from aiodisagg.bench.view import table
from aiodisagg.scheduler.admission import (
    AdmissionConfig,
    AdmissionQueue,
    Arrived,
    Ended,
    Event,
    FirstToken,
    Measured,
    Release,
    Shed,
    TimerFired,
)
from aiodisagg.scheduler.prices import Work
from aiodisagg.scheduler.shares import Tenant

POLICIES = ("line", "engine", "fcfs")
IMAGES = ((3_600, 900), (8_160, 2_040))
"""720p and 1080p: patches, tokens."""
ENCODERS, MAX_RUNNING, TOKEN_BUDGET = 1, 64, 2048
_SPREAD = 0.15
_TENANT = Tenant()


def tower_s(patches: int) -> float:
    """Seconds of the tower for one image: linear, and quadratic for its attention."""
    return 2.3e-6 * patches + 2.5e-10 * patches**2


def step_s(decodes: int, tokens: int) -> float:
    """Seconds of an engine step."""
    return 4e-3 + 0.22e-3 * decodes + 17e-6 * tokens


@dataclass(slots=True, eq=False)
class Request:
    """One request and what became of it; times are virtual seconds, -1 if it never came to that."""

    arrived: float
    text_tokens: int
    images: tuple[tuple[int, int], ...]
    output_tokens: int
    released: float = -1.0
    first_token: float = -1.0
    missing: int = 0
    encoding: int = 0
    decoded: int = 0

    @property
    def tokens(self) -> int:
        return self.text_tokens + sum(tokens for _, tokens in self.images)

    @property
    def work(self) -> Work:
        return Work(self.tokens, sum(patches for patches, _ in self.images))

    @property
    def ttft_s(self) -> float:
        return self.first_token - self.arrived


class Measurement(msgspec.Struct, frozen=True):
    """A policy at a load. Times in seconds; rates a second, over the time in which requests came."""

    policy: str
    load: float
    requests: int
    goodput: float
    """Requests whose first token was in time."""
    goodput_images: float
    """Of them, those with images."""
    goodput_tokens: float
    """Their prompt tokens."""
    served: int
    shed: dict[str, int]
    text_p50_s: float
    text_p99_s: float
    image_p50_s: float
    image_p99_s: float
    image_longest_wait_s: float
    """In the line; 0 without one."""
    error_s: float
    """Mean distance of first tokens from their predictions."""


class Played(Protocol):
    """A request that was played: its time to a first token, below 0 if it has none."""

    @property
    def ttft_s(self) -> float: ...
    @property
    def tokens(self) -> int: ...
    @property
    def images(self) -> object: ...


def measurement(
    policy: str, load: float, requests: Sequence[Played], span_s: float, slo_s: float, shed: Iterable[str],
    longest_wait_s: float = math.nan, error_s: float = math.nan,
) -> Measurement:  # fmt: skip
    """``span_s``: in which they came. ``shed``: why, for each that was."""
    served = [one for one in requests if one.ttft_s >= 0]
    good = [one for one in served if one.ttft_s <= slo_s]
    text = [one.ttft_s for one in served if not one.images]
    image = [one.ttft_s for one in served if one.images]
    return Measurement(
        policy, load, len(requests),
        goodput=len(good) / span_s,
        goodput_images=sum(bool(one.images) for one in good) / span_s,
        goodput_tokens=sum(one.tokens for one in good) / span_s,
        served=len(served),
        shed=dict(Counter(shed)),
        text_p50_s=at(text, 50), text_p99_s=at(text, 99),
        image_p50_s=at(image, 50), image_p99_s=at(image, 99),
        image_longest_wait_s=longest_wait_s, error_s=error_s,
    )  # fmt: skip


class OverloadReport(msgspec.Struct, frozen=True):
    """``slo_s``: ten times the mean time to a first token in an idle service."""

    capacity: float
    slo_s: float
    max_wait_s: float
    seed: int
    measured: list[Measurement]

    def of(self, policy: str) -> list[Measurement]:
        return [one for one in self.measured if one.policy == policy]

    def kept(self, policy: str) -> float:
        """Goodput beyond capacity over the best at that load or less, where that is least."""
        own = sorted(self.of(policy), key=lambda one: one.load)
        best = [max(one.goodput for one in own[: n + 1]) for n in range(len(own))]
        return min(one.goodput / most for one, most in zip(own, best, strict=True) if one.load > 1)


def workload(count: int, rate: float, seed: int) -> list[Request]:
    """Poisson arrivals; half of text only, the others with one to eight images; 32-128 tokens of text."""
    rng = random.Random(seed)
    found, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        count_of_images = 0 if rng.random() < 0.5 else rng.randint(1, 8)
        images = tuple(rng.choice(IMAGES) for _ in range(count_of_images))
        found.append(Request(now, rng.randint(32, 128), images, rng.randint(64, 192)))
    return found


@dataclass(eq=False)
class _Model:
    """The service behind the line, driven by an agenda of (when, order, what to do)."""

    in_order: bool
    rng: random.Random
    first_token: Callable[[Request, float], None]
    ended: Callable[[Request, float], None]
    agenda: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _free_at: list[float] = field(default_factory=lambda: [0.0] * ENCODERS)
    _waiting: list[Request] = field(default_factory=list)
    _running: list[Request] = field(default_factory=list)
    _stepping: bool = False

    def at(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self.agenda, (when, next(self._order), what))

    def submit(self, request: Request, now: float) -> None:
        request.released, request.missing = now, request.tokens
        self._waiting.append(request)
        self._admit(now)

    def _admit(self, now: float) -> None:
        while self._waiting and len(self._running) < MAX_RUNNING:
            request = self._waiting.pop(0)
            self._running.append(request)
            for patches, _ in request.images:
                first = min(range(ENCODERS), key=self._free_at.__getitem__)
                self._free_at[first] = max(now, self._free_at[first]) + self._spread(tower_s(patches))
                request.encoding += 1
                self.at(self._free_at[first], partial(self._encoded, request))
        self._step(now)

    def _spread(self, seconds: float) -> float:
        return seconds * self.rng.lognormvariate(0.0, _SPREAD)

    def _encoded(self, request: Request, now: float) -> None:
        request.encoding -= 1
        self._step(now)

    def _step(self, now: float) -> None:
        if self._stepping:
            return
        decodes = [request for request in self._running if not request.missing]
        prefills = self._prefills(TOKEN_BUDGET - len(decodes))
        if decodes or prefills:
            self._stepping = True
            took_s = self._spread(step_s(len(decodes), sum(tokens for _, tokens in prefills)))
            self.at(now + took_s, partial(self._stepped, decodes, prefills))

    def _prefills(self, budget: int) -> list[tuple[Request, int]]:
        ready = [request for request in self._running if request.missing]
        if self.in_order:
            ready = list(itertools.takewhile(lambda request: not request.encoding, ready))
        else:
            ready = [request for request in ready if not request.encoding]
            if ready:  # the oldest gets half, the rest goes to who needs least
                half = Request(0.0, 0, (), 0, missing=min(ready[0].missing, budget // 2))
                rest = sorted(ready, key=lambda request: request.missing)
                return self._fill(rest, budget - half.missing, {id(ready[0]): half.missing})
        return self._fill(ready, budget, {})

    @staticmethod
    def _fill(ready: Sequence[Request], budget: int, granted: dict[int, int]) -> list[tuple[Request, int]]:
        found = []
        for request in ready:
            has = granted.get(id(request), 0)
            more = min(request.missing - has, budget)
            budget -= more
            if has + more:
                found.append((request, has + more))
        return found

    def _stepped(self, decodes: list[Request], prefills: list[tuple[Request, int]], now: float) -> None:
        for request, tokens in prefills:
            request.missing -= tokens
            if not request.missing:
                request.first_token = now
                self.first_token(request, now)
        for request in decodes:
            request.decoded += 1
            if request.decoded >= request.output_tokens:
                self._running.remove(request)
                self.ended(request, now)
        self._stepping = False
        self._admit(now)


def run(requests: list[Request], policy: str, *, slo_s: float, max_wait_s: float, seed: int) -> list[object]:
    """Plays ``requests`` through a policy; they say afterwards what became of them. Returns the line's decisions."""
    queue = AdmissionQueue(AdmissionConfig(max_ttft_s=slo_s, max_wait_s=max_wait_s), MAX_RUNNING)
    by_name = {str(n): request for n, request in enumerate(requests)}
    names = {id(request): name for name, request in by_name.items()}
    said: list[object] = []
    armed = float("inf")

    def tell(event: Event, now: float) -> None:
        nonlocal armed
        for decision in queue.handle(event, now):
            said.append(decision)
            if isinstance(decision, Release):
                model.submit(by_name[decision.request_id], now)
        timer = queue.next_timer()
        if timer is not None and timer != armed:
            armed = timer
            model.at(max(timer, now), partial(tell, TimerFired()))

    lined = policy == "line"

    def first_token(request: Request, now: float) -> None:
        if lined:
            tell(FirstToken(names[id(request)]), now)

    def ended(request: Request, now: float) -> None:
        if lined:
            tell(Ended(names[id(request)], request.output_tokens), now)

    model = _Model(policy == "fcfs", random.Random(seed), first_token, ended)
    for name, request in by_name.items():
        if lined:
            arrived = Arrived(name, request.work, _TENANT)
            model.at(request.arrived, partial(tell, arrived))
        else:
            model.at(request.arrived, partial(model.submit, request))
    while model.agenda:
        now, _, what = heapq.heappop(model.agenda)
        what(now)
    return said


def at(values: Sequence[float], percent: float) -> float:
    """A percentile; of no values: nan."""
    return percentile(sorted(values), percent) if values else math.nan


def measure(
    policy: str, load: float, capacity: float, count: int, slo_s: float, max_wait_s: float, seed: int
) -> Measurement:
    """One policy at ``load`` times ``capacity``."""
    requests = workload(count, load * capacity, seed)
    said = run(requests, policy, slo_s=slo_s, max_wait_s=max_wait_s, seed=seed)
    waits = [request.released - request.arrived for request in requests if request.images and request.ttft_s >= 0]
    errors = [
        abs(one.ttft_s - one.predicted_s) for one in said if isinstance(one, Measured) and one.predicted_s is not None
    ]
    return measurement(
        policy, load, requests, requests[-1].arrived, slo_s, (one.reason for one in said if isinstance(one, Shed)),
        max(waits, default=0.0), sum(errors) / len(errors) if errors else math.nan,
    )  # fmt: skip


def bench_overload(loads: Sequence[float], count: int, seed: int, max_wait_s: float = 10.0) -> OverloadReport:
    """All policies at all loads, each with the same requests."""
    idle = workload(100, 0.05, seed)
    run(idle, "engine", slo_s=1e9, max_wait_s=max_wait_s, seed=seed)
    slo_s = 10 * sum(request.ttft_s for request in idle) / len(idle)
    burst = workload(max(400, count // 4), 1e6, seed)
    run(burst, "engine", slo_s=1e9, max_wait_s=max_wait_s, seed=seed)
    capacity = len(burst) / max(request.first_token for request in burst)
    found = [measure(policy, load, capacity, count, slo_s, max_wait_s, seed) for load in loads for policy in POLICIES]
    return OverloadReport(capacity, slo_s, max_wait_s, seed, found)


def overload_table(report: OverloadReport) -> Table:
    """For a terminal."""
    title = f"Capacity {report.capacity:.2f} requests/s; first tokens wanted within {report.slo_s:.2f} s"
    columns = (
        "load", "", "in time/s", "with images", "tokens/s", "served", "shed", "text p50", "p99", "image p50", "p99",
        "longest in line", "prediction off by",
    )  # fmt: skip
    rows = []
    for one in report.measured:
        times = (one.text_p50_s, one.text_p99_s, one.image_p50_s, one.image_p99_s, one.image_longest_wait_s)
        rows.append((
            f"{one.load:g}", one.policy, f"{one.goodput:.2f}", f"{one.goodput_images:.2f}",
            f"{one.goodput_tokens:,.0f}", f"{one.served}/{one.requests}", str(sum(one.shed.values())),
            *("-" if math.isnan(seconds) else f"{seconds:.2f} s" for seconds in (*times, one.error_s)),
        ))  # fmt: skip
    return table(title, columns, rows)
