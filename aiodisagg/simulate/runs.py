"""Runs: a system, a workload at a load, a seed; and what several seeds say together."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import msgspec

from aiodisagg.bench.serve_metrics import percentile
from aiodisagg.bench.workload import Gamma, Mix, WorkloadRequest, generate
from aiodisagg.simulate.cluster import Cluster, System
from aiodisagg.simulate.record import Report, late, meets, report, steady
from aiodisagg.simulate.request import SimRequest
from aiodisagg.simulate.times import PATCHES_PER_TOKEN, Costs, ServiceTimes

Say = Callable[[str], None]
"""Told how far it is."""
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t at 95 %, two sides, for one degree of freedom and more."""
CAPACITY_BATCH = 16
"""Streams that decode together where nothing else says how many: for capacities only."""

UNSEEN = 3.0
"""Requests that may do what none of those that were judged did (the "rule of three", at 95 %)."""

LEAST_S = 60.0
"""Of a run that says what a load comes to, from the first arrival to the last."""
SPANS = 4
"""The same in times of long answers."""


class Offered(msgspec.Struct, frozen=True):
    """What is sent. ``cv``: of the gaps between requests; 1 is Poisson."""

    mix: Mix
    requests: int
    cv: float = 1.0

    def at(self, rate_per_s: float, seed: int) -> tuple[WorkloadRequest, ...]:
        """The requests of a seed; at another rate they are the same ones, closer together."""
        return generate(self.mix, Gamma(rate_per_s, self.cv), self.requests, seed)

    def lasting(self, rate_per_s: float, answers_s: float) -> Offered:
        """With more requests where these would all have come before a minute and a few answers are over."""
        wanted = math.ceil(rate_per_s * max(LEAST_S, SPANS * answers_s))
        return msgspec.structs.replace(self, requests=max(self.requests, wanted))


class Work(msgspec.Struct, frozen=True):
    """Mean device seconds of a request, by what they are spent on; without waiting."""

    tower_s: float
    prefill_s: float
    decode_s: float
    """At ``CAPACITY_BATCH`` streams a step."""

    @property
    def ttft_s(self) -> float:
        return self.tower_s + self.prefill_s

    @property
    def total_s(self) -> float:
        return self.ttft_s + self.decode_s


def run(
    system: System, times: ServiceTimes, workload: Sequence[WorkloadRequest], *, seed: int = 0, slo: float = 5.0,
    protocol: bool = False, settle_s: float = 0.0, goal: float = 0.0,
) -> Report:  # fmt: skip
    """One run until all requests have ended; with ``settle_s``, until the judged ones have, or until fewer than
    ``goal`` of these can be within the SLO."""
    cluster = Cluster(system, times, seed=seed, protocol=protocol)
    cluster.run(workload, _decided(cluster, steady(workload, settle_s), slo, goal) if settle_s else None)
    return report(cluster, seed=seed, slo=slo, settle_s=settle_s)


def _decided(cluster: Cluster, judged: range, slo: float, goal: float) -> Callable[[SimRequest], bool]:
    left, may_miss = len(judged), (1 - goal) * len(judged) + 1e-9
    missed, awaited = set[int](), deque(judged)

    def look(request: SimRequest) -> bool:
        nonlocal left
        if request.number in judged:
            left -= 1
            if request.outcome != "ok" or not meets(request, slo):
                missed.add(request.number)
        while awaited:  # who waits for ever does not end either
            first = cluster.requests[awaited[0]]
            if late(first, slo, cluster.clock.now):
                missed.add(first.number)
            elif first.first_s < 0 and not first.outcome:
                break
            awaited.popleft()
        return not left or len(missed) > may_miss

    return look


def longest_s(times: ServiceTimes, workload: Sequence[WorkloadRequest], slo: float) -> float:
    """Seconds within which 99 % of the answers must be over to meet the SLO: as long as a load needs to build up."""
    requests = Cluster(System("", replicas=1), times).requests_of(workload)
    wanted = [one.unloaded_s + (one.output - 1) * one.unloaded_tpot_s for one in requests]
    return slo * percentile(sorted(wanted), 99)


def alone(system: System, times: ServiceTimes, workload: Sequence[WorkloadRequest], slo: float) -> Mean:
    """The share within the SLO if each request has the system for itself; the interval is of which these are."""
    gap_s = 2 * longest_s(times, workload, slo)
    apart = [replace(one, arrival_s=place * gap_s) for place, one in enumerate(workload)]
    share, count = run(system, times, apart, slo=slo).attained, len(apart)
    half = 2 * math.sqrt(share * (1 - share) / count) + UNSEEN / count
    return Mean(share, half, share, share, 1)


def first_tokens(
    system: System, times: ServiceTimes, workload: Sequence[WorkloadRequest], seed: int = 0
) -> list[float]:
    """Seconds to the first token of each request that was answered."""
    cluster = Cluster(system, times, seed=seed)
    cluster.run(workload)
    return [one.first_s - one.source.arrival_s for one in cluster.requests if one.outcome == "ok"]


def work(times: ServiceTimes, workload: Sequence[WorkloadRequest]) -> Work:
    """What the requests of a workload cost on average, each by itself."""
    costs = Costs(times)
    tower = prefill = decode = 0.0
    for request in workload:
        images = [costs.rows(image.visual_tokens) for image in request.images]
        prompt = costs.prompt(images, request.text_tokens)
        tower += costs.tower_s([PATCHES_PER_TOKEN * tokens for tokens in images]) if images else 0.0
        prefill += costs.prefill_s(prompt)
        context = (prompt + request.output_tokens / 2) * CAPACITY_BATCH
        decode += (request.output_tokens - 1) * costs.decode_s(CAPACITY_BATCH, context) / CAPACITY_BATCH
    count = len(workload)
    return Work(tower / count, prefill / count, decode / count)


class Mean(msgspec.Struct, frozen=True):
    """Of several seeds. ``half``: half the width of the 95 % interval of the mean; 0 of one seed says nothing."""

    mean: float
    half: float
    low: float
    high: float
    seeds: int


def mean_of(values: Iterable[float]) -> Mean:
    found = list(values)
    half = 0.0
    if len(found) > 1:
        t = T95[min(len(found) - 1, len(T95)) - 1]
        half = t * statistics.stdev(found) / math.sqrt(len(found))
    return Mean(statistics.fmean(found), half, min(found), max(found), len(found))


def burst(times: ServiceTimes, workload: Sequence[WorkloadRequest], reports: Sequence[Report]) -> str:
    """What to say of runs of one workload that were too short for the load to build up; empty if they were not."""
    one = reports[0]
    taken_s = min((one.e2e.p99 / 1e3 for one in reports if one.e2e.count), default=0.0)
    answers_s = min(taken_s, longest_s(times, workload, one.slo))  # an overload makes them as long as the run
    if one.span_s >= answers_s * (SPANS - 1):
        return ""
    enough = math.ceil(one.rate_per_s * max(LEAST_S, SPANS * answers_s))
    return (
        f"{one.rate_per_s:.4g} requests/s: {one.requests} come within {one.span_s:.1f} s, and long answers take "
        f"{answers_s:.1f} s. That is a burst; --requests {enough} would say what the load comes to"
    )


def most(works: Callable[[float], bool], low: float, high: float) -> float:
    """The largest rate of about ``low`` to ``high`` and beyond that works, to 3 %; 0 if ``low / 16`` does not.
    Bisection: it takes for granted that what works at a rate works at lower ones."""
    while works(high):
        low, high = high, high * 1.5
    for _ in range(5):
        if works(low):
            break
        low, high = low / 2, low
    else:
        return 0.0
    while high / low > 1.03:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def goodput(
    system: System, times: ServiceTimes, offered: Offered, *, slo: float, share: float, seeds: Sequence[int],
    guess: float,
) -> float:  # fmt: skip
    """The highest rate per second at which ``share`` of all requests, over all seeds, meet the SLO."""

    def works(rate: float) -> bool:
        met = [run(system, times, offered.at(rate, seed), seed=seed, slo=slo).attained for seed in seeds]
        return statistics.fmean(met) >= share

    return most(works, guess / 2, guess)
