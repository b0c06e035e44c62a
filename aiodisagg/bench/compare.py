"""``bench system``: the same workloads on the same machine, laid out in different shapes, at the same loads.

1. Measure what the replicas (the first shape) can do: a closed loop with many requests at a time, and with nothing
   beside it the latency of each group of requests, against which every shape's goodput is measured.
2. For each seed, start each shape afresh and send it each mix at each load, given as a share of that capacity. All
   shapes get the same requests at the same times. Shapes take turns within a seed, so that what else the machine does
   hits all of them.

What is reported of a cell is over the requests of all its seeds together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from aiodisagg.bench.chat_client import ChatClient, Clock, open_session
from aiodisagg.bench.distributions import Ranges, exactly
from aiodisagg.bench.mixes import named_mix, servegen_mix
from aiodisagg.bench.serve import Bench, Run, Say, ServeOptions
from aiodisagg.bench.serve_metrics import Outcome, Summary, Unloaded, summarize
from aiodisagg.bench.shapes import Setting, modelled, started
from aiodisagg.bench.workload import Closed, Gamma, Mix, check
from aiodisagg.errors import ConfigError

SLO = (5.0, 10.0)
_ROUNDS = 4
"""Requests of the loop that measures capacity, relative to how many it sends at a time."""


def small_mixes() -> dict[str, Mix]:
    """For a model of 115 M parameters on CPU cores, where a picture of 160 x 160 pixels takes about 50 ms."""
    return {
        "images-1-8": Mix(Ranges(((1, 8, 1.0),)), ((160, 160),), Ranges(((16, 64, 1.0),)), exactly(16)),
        "mixed": Mix(Ranges(((0, 0, 1.0), (1, 8, 1.0))), ((160, 160),), Ranges(((16, 64, 1.0),)), exactly(16)),
        "servegen": servegen_mix().scaled(visual=1 / 16, text=1 / 8, output=1 / 8),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """``setting.model`` empty: a synthetic one of ``size`` is made. ``capacity``: by mix, if it is known already."""

    setting: Setting
    size: str = "115m"
    shapes: tuple[str, ...] = ("dp2-inline", "dp2", "1+1-waits", "1+1", "2both")
    mixes: tuple[str, ...] = ("images-1-8", "servegen")
    small: bool = True
    """Mixes for CPU cores (:func:`small_mixes`) in place of the named ones."""
    loads: tuple[float, ...] = (0.2, 0.5, 0.7, 0.85)
    seeds: tuple[int, ...] = (0, 1, 2)
    requests: int = 60
    """Of each run."""
    cv: float = 1.0
    concurrency: int = 16
    """At which capacity is measured."""
    warmup: int = 2
    probes: int = 3
    capacity: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("shapes", "mixes", "loads", "seeds"):
            if not getattr(self, key):
                raise ConfigError(key, "at least one is needed")
        check("loads", self.loads, above=0)

    def mix(self, name: str) -> Mix:
        """Raises ConfigError."""
        if not self.small:
            return named_mix(name)
        mixes = small_mixes()
        if name not in mixes:
            raise ConfigError("mixes", f"{name!r} is none of {', '.join(mixes)}")
        return mixes[name]


class Cell(msgspec.Struct, frozen=True):
    """A shape under one mix and load: all seeds together, and each seed's run."""

    shape: str
    mix: str
    load: float
    rate_per_s: float
    all: Summary
    ttft_ms_of_seeds: list[float]
    """Means."""
    runs: list[Run]


class CompareReport(msgspec.Struct, frozen=True):
    """``capacity``: requests per second of the first shape, by mix."""

    model: str
    places: str
    shapes: list[str]
    capacity: dict[str, float]
    unloaded: dict[str, dict[str, Unloaded]]
    cells: list[Cell]

    def cell(self, shape: str, mix: str, load: float) -> Cell:
        return next(one for one in self.cells if (one.shape, one.mix, one.load) == (shape, mix, load))


async def bench_compare(options: CompareOptions, say: Say = lambda what, done, total: None) -> CompareReport:
    """Measures everything. Raises ConfigError, ProcessEnded, ServerError."""
    for name in options.mixes:
        options.mix(name)
    with modelled(options.setting, options.size) as (setting, model):
        comparison = _Comparison(options, setting, say)
        await comparison.measure_replicas()
        for seed in options.seeds:
            for shape in options.shapes:
                await comparison.measure(shape, seed)
    places = f"{options.setting.on} {', '.join(map(str, options.setting.places))}"
    return CompareReport(
        model, places, list(options.shapes), comparison.capacity, comparison.unloaded, comparison.cells()
    )


class _Comparison:
    def __init__(self, options: CompareOptions, setting: Setting, say: Say) -> None:
        self._options, self._setting, self._say = options, setting, say
        self.capacity = dict(options.capacity)
        self.unloaded: dict[str, dict[str, Unloaded]] = {}
        self._runs: dict[tuple[str, str, float], list[tuple[Run, list[Outcome]]]] = {}

    async def measure_replicas(self) -> None:
        options = self._options
        shape = options.shapes[0]
        at_once = options.concurrency
        async with started(shape, self._setting) as urls, open_session(None) as session:
            client = ChatClient(session, Clock())
            for mix in options.mixes:
                bench = self._bench(f"{shape}, {mix}", mix, urls, client)
                await bench.meet()
                await bench.warm()
                self.unloaded[mix] = await bench.alone()
                if mix not in self.capacity:
                    loop = self._bench(f"{shape}, {mix}", mix, urls, client, max(options.requests, _ROUNDS * at_once))
                    await loop.meet()
                    _, outcomes = await loop.measure(Closed(at_once), options.seeds[0], {})
                    self.capacity[mix] = steady_rate(outcomes)

    async def measure(self, shape: str, seed: int) -> None:
        options = self._options
        async with started(shape, self._setting) as urls, open_session(None) as session:
            for mix in options.mixes:
                bench = self._bench(f"seed {seed}, {shape}, {mix}", mix, urls, ChatClient(session, Clock()))
                await bench.meet()
                await bench.warm()
                for load in options.loads:
                    arrivals = Gamma(load * self.capacity[mix], options.cv)
                    found = await bench.measure(arrivals, seed, self.unloaded[mix])
                    self._runs.setdefault((shape, mix, load), []).append(found)

    def _bench(self, what: str, mix: str, urls: tuple[str, ...], client: ChatClient, requests: int = 0) -> Bench:
        options = self._options
        serve = ServeOptions(
            urls=urls, mix=options.mix(mix), concurrencies=(options.concurrency,),
            requests=requests or options.requests, seeds=options.seeds, warmup=options.warmup,
            probes=options.probes, slo=SLO,
        )  # fmt: skip
        return Bench(serve, client, Clock(), lambda step, done, total: self._say(f"{what}, {step}", done, total))

    def cells(self) -> list[Cell]:
        found = []
        for (shape, mix, load), runs in self._runs.items():
            outcomes = [one for _, ended in runs for one in ended]
            seconds = sum(run.all.seconds for run, _ in runs)
            found.append(
                Cell(
                    shape=shape,
                    mix=mix,
                    load=load,
                    rate_per_s=load * self.capacity[mix],
                    all=summarize(outcomes, self.unloaded[mix], SLO, seconds),
                    ttft_ms_of_seeds=[run.all.ttft_ms.mean for run, _ in runs if run.all.ttft_ms is not None],
                    runs=[run for run, _ in runs],
                )
            )
        return found


def steady_rate(outcomes: Sequence[Outcome]) -> float:
    """Requests per second of a closed loop while it was full: from its beginning to the last start.

    From the beginning, since requests of equal answers come together, end together, and so end in waves: from the first
    end on, a wave would be counted that was computed before. A loop so short that nothing ended by the last start is
    taken as a whole. Raises ConfigError if nothing was answered.
    """
    ends = sorted(one.ended_s for one in outcomes if not one.error)
    if not ends:
        errors = ", ".join(sorted({one.error for one in outcomes}))
        raise ConfigError("capacity", f"no request was answered: {errors}")
    began, last = min(one.sent_s for one in outcomes), max(one.sent_s for one in outcomes)
    full = [end for end in ends if end <= last] or ends
    return len(full) / (full[-1] - began)
