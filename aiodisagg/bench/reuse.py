"""``bench reuse``: what the caches are worth when pictures come again, and that none is encoded twice while it is held.

An encode and a language peer, each with a core to itself, are started with their caches and without, in turn; both get
the same requests: the mix ``reuse``, scaled down for CPU cores. With caches a picture that comes again is in pages of
the KV, in the language peer's row cache, on its way for somebody else, or among the encode peer's sources. Without, the
language peer keeps nothing and the encode peer little more than what it is sending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from aiodisagg.bench.chat_client import ChatClient, Clock, open_session
from aiodisagg.bench.mixes import named_mix
from aiodisagg.bench.serve import Bench, Run, Say, ServeOptions
from aiodisagg.bench.serve_metrics import Outcome, Summary, summarize
from aiodisagg.bench.shapes import Setting, modelled, started
from aiodisagg.bench.workload import Closed, Mix, check, generate

ENCODE_WITHOUT, LANGUAGE_WITHOUT = ("--source-mib", "8"), ("--cache-mib", "0", "--no-prefix-cache")
"""Options of the peers that make them keep next to nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseOptions:
    """``setting.model`` empty: a synthetic one of ``size`` is made. ``rounds``: each starts both systems afresh and has
    requests of its own."""

    setting: Setting
    size: str = "115m"
    requests: int = 1000
    """Of each run: some times as many as pictures in the pool, or few come again."""
    concurrency: int = 64
    rounds: int = 3
    pool: int = 200
    reuse: float = 0.8
    scale: float = 1 / 9
    """Visual tokens of a picture, texts and answers, as shares of those of the mix ``reuse``."""

    def __post_init__(self) -> None:
        check("scale", (self.scale,), above=0)
        self.mix  # noqa: B018 - whether it is one

    @property
    def mix(self) -> Mix:
        mix = named_mix("reuse").scaled(visual=self.scale, text=self.scale, output=self.scale)
        return replace(mix, pool=self.pool, reuse=self.reuse)


class Reused(msgspec.Struct, frozen=True):
    """All rounds with caches, or all without. ``unique``: different pictures, counted in each round."""

    caches: bool
    all: Summary
    items: int
    unique: int
    encoded: int
    twice: int
    """How often a picture was encoded that had been in the same round: must be 0 while the caches hold all of them."""
    cached: int
    shared: int
    saved_bytes: int
    evicted: int
    runs: list[Run]


class ReuseReport(msgspec.Struct, frozen=True):
    model: str
    concurrency: int
    pool: int
    reuse: float
    found: list[Reused]
    """With caches, then without."""

    @property
    def throughput_gain(self) -> float:
        on, off = (one.all.requests_per_s for one in self.found)
        return on / off if off else 0.0


async def bench_reuse(options: ReuseOptions, say: Say = lambda what, done, total: None) -> ReuseReport:
    """Measures. Raises ConfigError, ProcessEnded, ServerError."""
    runs: dict[bool, list[tuple[Run, list[Outcome]]]] = {True: [], False: []}
    with modelled(options.setting, options.size) as (setting, model):
        for number in range(options.rounds):
            for caches in (True, False):
                what = f"round {number + 1} of {options.rounds}, {'with' if caches else 'without'} caches"
                runs[caches].append(await _measure(options, setting, caches, number, what, say))
    found = [_together(options, caches, made) for caches, made in runs.items()]
    return ReuseReport(model, options.concurrency, options.pool, options.reuse, found)


async def _measure(
    options: ReuseOptions, setting: Setting, caches: bool, seed: int, what: str, say: Say
) -> tuple[Run, list[Outcome]]:
    if not caches:
        setting = replace(setting, encode_options=ENCODE_WITHOUT, language_options=LANGUAGE_WITHOUT)
    setting = replace(setting, encode_options=("--http-port", "0", *setting.encode_options))  # for its counters
    async with started("1+1", setting) as (encode, language), open_session(None) as session:
        serve = ServeOptions(
            urls=(language,), mix=options.mix, concurrencies=(options.concurrency,), requests=options.requests,
            seeds=(seed,), probes=0, metrics=(f"{encode}/metrics", f"{language}/metrics"),
        )  # fmt: skip
        clock = Clock()
        tell = lambda step, done, total: say(f"{what}, {step}", done, total)  # noqa: E731
        bench = Bench(serve, ChatClient(session, clock), clock, tell)
        await bench.meet()
        await bench.warm()
        return await bench.measure(Closed(options.concurrency), seed, {})


def _together(options: ReuseOptions, caches: bool, runs: Sequence[tuple[Run, list[Outcome]]]) -> Reused:
    def grew(name: str) -> int:
        return sum(counted(run, name) for run, _ in runs)

    items = unique = twice = 0
    for run, _ in runs:
        asked = [
            image.identity
            for request in generate(options.mix, Closed(options.concurrency), options.requests, run.seed)
            for image in request.images
        ]
        different = len(set(asked))
        items, unique = items + len(asked), unique + different
        twice += max(0, counted(run, "items_encoded") - different)
    outcomes = [one for _, ended in runs for one in ended]
    return Reused(
        caches=caches, all=summarize(outcomes, seconds=sum(run.all.seconds for run, _ in runs)), items=items,
        unique=unique, encoded=grew("items_encoded"), twice=twice, cached=grew("row_cache_hits"),
        shared=grew("fetches_shared"), saved_bytes=grew("row_cache_saved_bytes"), evicted=grew("row_cache_evictions"),
        runs=[run for run, _ in runs],
    )  # fmt: skip


def counted(run: Run, name: str) -> int:
    """By how much a counter of the peers grew."""
    return round(run.counters.get(f"aiodisagg_{name}_total", 0.0))
