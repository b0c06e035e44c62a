"""What a simulated (or measured) run says: times to first token, between tokens, goodput, utilisation."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from aiodisagg.bench.workload import WorkloadRequest
from aiodisagg.simulate.cluster import Cluster
from aiodisagg.simulate.request import SimRequest

Floats = npt.NDArray[np.float64]


class Spread(msgspec.Struct, frozen=True):
    """Milliseconds; zeros if nothing was counted."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


class RoleUse(msgspec.Struct, frozen=True):
    """Shares of the time: devices with work, and the two kinds of work on them."""

    role: str
    devices: int
    busy: float
    engine: float
    tower: float


class Report(msgspec.Struct, frozen=True):
    """One run. Rates are per second of the time in which requests arrived, and 0 if all came at once; an SLO is a
    multiple of the latency of an unloaded monolith, for the time to first token of each request and for its mean time
    per token after that. Latencies but ``itl``, and what meets the SLO, are of the ``judged`` requests."""

    system: str
    devices: int
    seed: int
    rate_per_s: float
    """Requests offered."""
    requests: int
    ok: int
    shed: int
    refused: int
    span_s: float
    """From the first arrival to the last; ``makespan_s`` to the last end."""
    makespan_s: float
    ttft: Spread
    ttft_text: Spread
    """Of requests without images."""
    itl: Spread
    tpot: Spread
    e2e: Spread
    output_tokens_per_s: float
    slo: float
    judged: int
    """All, but those that came while the run settled or shortly before its end; of a run that was left before its end,
    those that have ended or are late."""
    attained: float
    """Share of the judged requests that were answered within the SLO."""
    goodput_per_s: float
    use: tuple[RoleUse, ...]
    items_encoded: int
    items_held: int
    tower_batches: int
    steps: int
    preemptions: int
    events: int


def steady(workload: Sequence[WorkloadRequest], settle_s: float) -> range:
    """Numbers of the requests that are judged: they came at least ``settle_s`` after the first and before the last;
    all, if there is none."""
    arrivals = [request.arrival_s for request in workload] or [0.0]
    middle = range(bisect_left(arrivals, arrivals[0] + settle_s), bisect_right(arrivals, arrivals[-1] - settle_s))
    return middle or range(len(workload))


def report(cluster: Cluster, *, seed: int, slo: float = 5.0, settle_s: float = 0.0) -> Report:
    """Of a cluster that has run. ``settle_s``: see :func:`steady`."""
    requests = cluster.requests
    middle = steady([request.source for request in requests], settle_s)
    known = requests[middle.start : middle.stop]
    judged = [request for request in known if request.outcome or late(request, slo, cluster.clock.now)]
    ok = [request for request in judged if request.outcome == "ok"]
    arrivals = [request.source.arrival_s for request in requests]
    span = arrivals[-1] - arrivals[0] if arrivals else 0.0
    makespan = max((request.end_s for request in requests), default=0.0)
    good = sum(meets(request, slo) for request in ok)
    tokens = sum(request.generated for request in requests if request.outcome == "ok")
    towers = [peer.tower for peer in cluster.peers if peer.tower is not None]
    engines = [peer.engine for peer in cluster.peers if peer.engine is not None]
    return Report(
        system=cluster.system.name,
        devices=cluster.system.devices,
        seed=seed,
        rate_per_s=len(requests) / span if span else 0.0,
        requests=len(requests),
        ok=sum(request.outcome == "ok" for request in requests),
        shed=sum(request.outcome == "shed" for request in requests),
        refused=sum(request.outcome == "refused" for request in requests),
        span_s=span,
        makespan_s=makespan,
        ttft=spread(request.first_s - request.source.arrival_s for request in ok),
        ttft_text=spread(r.first_s - r.source.arrival_s for r in ok if not r.items),
        itl=weighted(cluster.gaps.seconds, cluster.gaps.tokens),
        tpot=spread(tpot_s(request) for request in ok if request.output > 1),
        e2e=spread(request.end_s - request.source.arrival_s for request in ok),
        output_tokens_per_s=tokens / max(makespan, 1e-9),
        slo=slo,
        judged=len(judged),
        attained=good / max(len(judged), 1),
        goodput_per_s=good / (span - 2 * settle_s) if span > 2 * settle_s else 0.0,
        use=tuple(_uses(cluster, makespan)),
        items_encoded=sum(tower.encoded for tower in towers),
        items_held=sum(tower.hits for tower in towers),
        tower_batches=sum(tower.batches for tower in towers),
        steps=sum(engine.steps for engine in engines),
        preemptions=sum(engine.preemptions for engine in engines),
        events=cluster.clock.calls,
    )


def tpot_s(request: SimRequest) -> float:
    return (request.end_s - request.first_s) / (request.output - 1)


def late(request: SimRequest, slo: float, now: float) -> bool:
    """Whether its first token came after ``slo`` times its unloaded latency, or has not come by then."""
    first_s = request.first_s if request.first_s >= 0 else now
    return first_s - request.source.arrival_s > slo * request.unloaded_s


def meets(request: SimRequest, slo: float) -> bool:
    """Whether an answered request was so within ``slo`` times its unloaded latency."""
    if late(request, slo, request.end_s):
        return False
    return request.output == 1 or tpot_s(request) <= slo * request.unloaded_tpot_s


def spread(seconds: Iterable[float]) -> Spread:
    values = np.fromiter(seconds, dtype=np.float64) * 1e3
    if not values.size:
        return Spread(0, 0.0, 0.0, 0.0, 0.0)
    p50, p90, p99 = (float(v) for v in np.percentile(values, (50, 90, 99)))
    return Spread(int(values.size), float(values.mean()), p50, p90, p99)


def weighted(seconds: Sequence[float], counts: Sequence[int]) -> Spread:
    """As :func:`spread` of values of which each counts so many times."""
    values: Floats = np.asarray(seconds, dtype=np.float64) * 1e3
    if not values.size:
        return Spread(0, 0.0, 0.0, 0.0, 0.0)
    weights = np.asarray(counts, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order]
    below, total = np.cumsum(weights), int(weights.sum())
    at = np.minimum(np.searchsorted(below, np.array((0.5, 0.9, 0.99)) * total), values.size - 1)
    p50, p90, p99 = (float(values[i]) for i in at)
    return Spread(total, float((values * weights).sum() / total), p50, p90, p99)


def _uses(cluster: Cluster, makespan: float) -> Iterable[RoleUse]:
    for role in dict.fromkeys(peer.role for peer in cluster.peers):
        devices = [peer.device for peer in cluster.peers if peer.role == role]
        whole = max(makespan, 1e-9) * len(devices)
        busy = sum(device.busy_s for device in devices) / whole
        engine = sum(device.engine.busy_s for device in devices) / whole
        tower = sum(device.tower.busy_s for device in devices) / whole
        yield RoleUse(role, len(devices), busy, engine, tower)
