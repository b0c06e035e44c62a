"""A replica, or a split pair, under load: closed loops of clients, and open loops of Poisson arrivals.

Two replicas are two processes that wait for each other before each loop. Used by ``gpu_engine.py``.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import uvloop
from gpu_serve import Answered, ask, free_runner, picture, start, text_of, timeline

from aiodisagg import LanguageService
from aiodisagg.bench.mixes import named_mix
from aiodisagg.bench.serve_metrics import percentile
from aiodisagg.bench.workload import Gamma, generate

WARMING, WARMING_RATE = 24, 4.0
"""Requests before those that are measured, and how many of them a second."""


def load(bench: Any, found: dict[str, Any]) -> None:
    """This process is a replica, or the language half."""
    free_runner(bench)
    uvloop.run(_load(bench, found))


async def _load(bench: Any, found: dict[str, Any]) -> None:
    planner = bench.model.planner()
    async with AsyncExitStack() as stack:
        service, address = await start(bench, stack, bench.options.shape, planner)
        await meet(bench, stack, service, address)
        if bench.options.closed:
            await closed_loops(bench, found, service, planner)
        if bench.options.open:
            await open_loops(bench, found, service, planner)


async def meet(bench: Any, stack: AsyncExitStack, service: LanguageService, address: str) -> None:
    """Waits for the other replica, and links to its tower if ``--share``; leaves together with it."""
    place, name, other = bench.options.meet, bench.options.name, {"a": "b", "b": "a"}.get(bench.options.name)
    if place is None or other is None:
        return

    async def both_said(word: str, text: str = "-") -> str:
        (place / f"{name}.{word}").write_text(text)
        path = place / f"{other}.{word}"
        while not (path.exists() and path.read_text()):  # noqa: ASYNC110 - another process, which announces nothing
            await asyncio.sleep(0.01)
        return path.read_text()

    theirs = await both_said("address", address or "-")
    if bench.options.share:
        service.add_peer(theirs)
        while len(service.peers.linked) < 2:  # noqa: ASYNC110 - peers announce the first only
            await asyncio.sleep(0.01)
    stack.push_async_callback(both_said, "done")
    bench.meeting = both_said


async def closed_loops(bench: Any, found: dict[str, Any], service: LanguageService, planner: Any) -> None:
    """Closed loops: mean and p99 of the time to a first token, between tokens, and requests a second."""
    tiny = bench.options.tiny
    height, width = (64, 96) if tiny else (720, 1280)
    text, draw = text_of(planner, 16 if tiny else 64), np.random.default_rng(7 + ord(bench.options.name[0]))
    made = iter(range(1000 * ord(bench.options.name[0]), 1 << 30))
    warm = [picture(next(made), height, width) for _ in range(4)]
    await asyncio.gather(*(ask(service, f"{i} {text}", warm[i : i + 1], 8) for i in range(4)))
    for concurrency in map(int, bench.options.closed.split(",")):
        count = max(6, bench.options.each * concurrency)
        images = draw.integers(1, 9, count).tolist()
        asked = await pictures([[(next(made), height, width) for _ in range(n)] for n in images])
        if bench.meeting is not None:
            await bench.meeting(f"loop{concurrency}")
        answers: list[Answered] = []
        work, began = iter(enumerate(asked)), time.perf_counter()

        async def client() -> None:
            for i, pictures in work:  # noqa: B023 - ends before the next one begins
                answers.append(await ask(service, f"{i} {text}", pictures, 8 if tiny else 128))  # noqa: B023

        await asyncio.gather(*(client() for _ in range(concurrency)))
        whole = time.perf_counter() - began
        firsts = sorted(a.first_s * 1e3 for a in answers)
        tpots = sorted((a.end_s - a.first_s) / max(1, a.tokens - 1) * 1e3 for a in answers)
        found[str(concurrency)] = {
            "requests": count,
            "images": sum(images),
            "seconds": whole,
            "req_s": count / whole,
            "ttft_ms": statistics.mean(firsts),
            "ttft_p99_ms": percentile(firsts, 99),
            "tpot_ms": statistics.mean(tpots),
            "all_ttft_ms": [round(f, 1) for f in firsts],
        }
        shown = {k: v for k, v in found[str(concurrency)].items() if k != "all_ttft_ms"}
        bench.say(f"loop of {concurrency}: " + ", ".join(f"{k} {v:.1f}" for k, v in shown.items()))
        bench.save()


async def pictures(wanted: list[list[tuple[int, int, int]]]) -> list[list[bytes]]:
    """JPEG bytes of (seed, height, width), by requests; on threads, as links have to be answered meanwhile."""
    with ThreadPoolExecutor(8) as pool:
        making = [[pool.submit(picture, *one) for one in request] for request in wanted]
        return [[await asyncio.wrap_future(one) for one in request] for request in making]


async def open_loops(bench: Any, found: dict[str, Any], service: LanguageService, planner: Any) -> None:
    """Poisson arrivals of one sequence that both replicas know, of which each answers every other request; or all.

    Times run from when a request was due, also if a busy loop was late to send it."""
    tiny, options = bench.options.tiny, bench.options
    replicas, own = 2 if options.meet is not None else 1, ord(options.name[0]) - ord("a")
    loops = list(planned(options))
    warming = (loops[0][0], -1, WARMING_RATE)  # what peers learn of themselves and of each other is not measured
    for turn, (name, seed, rate) in enumerate([warming, *loops]):
        mix = named_mix(name).scaled(visual=1 / 150, text=1 / 8, output=1 / 16) if tiny else named_mix(name)
        count = WARMING if seed < 0 else max(8, round(rate * options.loop_s))
        requests = generate(mix, Gamma(rate), count, seed & 0xFFFF)
        ours = [i for i in range(len(requests)) if replicas == 1 or i % replicas == own]
        texts = {i: f"{turn} {i} {text_of(planner, requests[i].text_tokens)}" for i in ours}
        wanted = [[(turn << 24 | s.identity, s.height, s.width) for s in requests[i].images] for i in ours]
        made = dict(zip(ours, await pictures(wanted), strict=True))
        if bench.meeting is not None:
            await bench.meeting(f"rate{turn}")
        began = time.perf_counter() + 0.2

        async def one(i: int) -> Answered:
            due_s = began + requests[i].arrival_s  # noqa: B023 - ends before the next one
            await asyncio.sleep(due_s - time.perf_counter())
            return await ask(service, texts[i], made[i], requests[i].output_tokens, due_s)  # noqa: B023

        answers = await asyncio.gather(*map(one, ours))
        seconds = time.perf_counter() - began
        if seed < 0:
            continue
        gaps = sorted(g * 1e3 for a in answers for g in a.gaps_s)
        found.setdefault(name, {})[f"{rate} {seed}"] = {
            "rate": rate,
            "seed": seed,
            "seconds": seconds,
            "images": [len(requests[i].images) for i in ours],
            "tokens": [a.tokens for a in answers],
            "ttft_ms": [round(a.first_s * 1e3, 1) for a in answers],
            "end_ms": [round(a.end_s * 1e3, 1) for a in answers],
            "gaps_ms": [round(g, 1) for g in gaps],
            "timeline_ms": timeline(service, len(ours)),
        }
        ttft = sorted(a.first_s for a in answers)
        bench.say(
            f"{name}, {rate}/s, seed {seed}: {len(ours)} requests, TTFT {statistics.mean(ttft):.3f} s, {ttft[-1]:.3f} "
            f"most, between tokens {percentile(gaps, 99) if gaps else 0:.0f} ms p99"
        )
        bench.save()
    found["metrics"] = service.metrics()


def planned(options: Any) -> Iterator[tuple[str, int, float]]:
    """Mix, seed and requests a second of each open loop, one seed after the other."""
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for loops in options.open:
            name, _, rates = loops.partition(":")
            for rate in rates.split(","):
                yield name, seed, float(rate)
