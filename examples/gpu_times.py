"""What requests take on this device: the file that ``aiodisagg simulate --times`` reads. Used by ``gpu_engine.py``.

Tower, prefill and decode by themselves; what decodes add to a step with a prompt; and what a request that is alone
takes longer than the simulator says of all that: planning, and the way of rows from the tower to the engine.
"""

from __future__ import annotations

import statistics
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import torch
import uvloop
from gpu_serve import THREADS, ask, free_runner, picture, start, text_of

from aiodisagg.bench.times import fit, overheads, value_of
from aiodisagg.bench.workload import ImageSpec, WorkloadRequest
from aiodisagg.encode.pipeline import BATCH_PATCHES
from aiodisagg.engine.batch import Work
from aiodisagg.engine.schedule import Segment
from aiodisagg.models.base import ItemKind
from aiodisagg.models.preprocessing import image_grid
from aiodisagg.simulate.cluster import Cluster, System
from aiodisagg.simulate.times import ServiceTimes

SIDES = ((192, 256), (360, 640), (480, 854), (720, 1280), (1080, 1920))
"""Height and width of pictures that are encoded alone."""
TOGETHER = (2, 4)
"""Pictures of 720p in one batch."""
PROMPTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
DECODES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (64, 2048)
BESIDE, PROMPT = (1, 4, 16, 32), 512
"""Decodes in a step with a prompt of so many tokens."""
ALONE = ((0, 0, 0), (1, 720, 1280), (2, 720, 1280), (4, 720, 1280), (8, 720, 1280), (1, 360, 640), (1, 1080, 1920))
"""Requests sent one at a time: pictures, their height and width."""
TEXT = 64
Points = tuple[tuple[float, float], ...]


def times(bench: Any, found: dict[str, Any]) -> None:
    """Medians; tower and prefill are fitted with a constant, a slope and a square, none below zero. Of the phases
    before ``serve`` none can follow: the engine's memory is given to a service."""
    tower, tower_base, prepare, row_bytes, tower_off = _tower(bench)
    prefill, prefill_base, prefill_off = _prefill(bench)
    decode, context_us = _decode(bench)
    prompt_tokens, image_tokens, least = overheads(bench.model.planner())
    off = max(tower_off, prefill_off)
    made = ServiceTimes(
        name="gpu",
        source=f"examples/gpu_engine.py --phases times: {bench.results.get('device', 'cpu')}, torch "
        f"{torch.__version__}. Medians; the fits of tower and prefill are off by at most {off:.0%}.",
        row_bytes=row_bytes,
        tower=tower,
        tower_base_ms=tower_base,
        prefill=prefill,
        prefill_base_ms=prefill_base,
        decode=decode,
        beside=_beside(bench),
        decode_context_us=context_us,
        prepare=prepare,
        prepare_threads=THREADS,
        prompt_tokens=prompt_tokens,
        image_tokens=image_tokens,
        least_rows=least,
        reads_ms=1e3 * bench.stepper.reads.all_s,
        reads_part=bench.stepper.reads.of_token,
        batch_patches=BATCH_PATCHES["cuda"],
        inline_patches=BATCH_PATCHES["cuda"],
    )
    found["times"] = msgspec.to_builtins(made)
    bench.save()
    free_runner(bench)
    made = uvloop.run(_alone(bench, made, found))
    found["times"] = msgspec.to_builtins(made)
    for key in (
        "tower",
        "prefill",
        "decode",
        "beside",
        "prepare",
        "request_ms",
        "image_ms",
        "local_bytes_per_s",
        "source",
    ):
        bench.say(f"times: {key} {getattr(made, key)}")


def _tower(bench: Any) -> tuple[Points, float, Points, int, float]:
    """Points of single pictures, a batch without any, points of preparing, bytes of a row, and the fit's error."""
    encoder = bench.model.encoder(bench.device)
    sides = SIDES[:1] if bench.options.tiny else SIDES
    terms, seen, prepare = [], [], []
    kinds = [(side, 1) for side in sides] + [(sides[-2 % len(sides)], n) for n in TOGETHER]
    for (height, width), count in kinds:
        data = picture(height, height, width)
        grid = image_grid(height, width, encoder._image)
        patches = encoder.prepare(ItemKind.IMAGE, (data,), grid, 0.0)
        n = patches.count
        if count == 1:
            ms = bench.times(lambda d=data, g=grid: encoder.prepare(ItemKind.IMAGE, (d,), g, 0.0), 5)
            prepare.append((float(n), ms))
        terms.append((1.0, float(n * count), count * n * n / 1e3))
        seen.append(bench.times(lambda p=patches, c=count: encoder.encode([p] * c), 7))
    costs, off = fit(terms, seen)
    points = tuple(
        (t[1], round(value_of(costs, t), 3)) for t, (_, count) in zip(terms, kinds, strict=True) if count == 1
    )
    return points, costs[0], tuple(prepare), encoder.layout.row_bytes, off


def _prefill(bench: Any) -> tuple[Points, float, float]:
    """Points, a step without any prompt token, and the fit's error."""
    sizes = (16, 32, 64) if bench.options.tiny else PROMPTS
    terms = [(1.0, float(n), n * n / 1e3) for n in sizes]
    seen = []
    for n in sizes:
        sequence = bench.sequence(f"t{n}", n)
        seen.append(bench.times(lambda s=sequence, n=n: bench.prefill(s, 0, n), 7))
    costs, off = fit(terms, seen)
    return tuple((float(n), round(value_of(costs, t), 3)) for n, t in zip(sizes, terms, strict=True)), costs[0], off


def _decode(bench: Any) -> tuple[Points, float]:
    """Points with a short context, and microseconds for each token of all contexts."""
    tiny = bench.options.tiny
    counts, (short, long), steps = ((1, 2), (16, 32), 3) if tiny else (DECODES, CONTEXTS, 20)

    def ms(count: int, context: int) -> float:
        return float(bench.times(bench.decoding(count, context, context + steps + 8), steps, 4))

    most = min(counts[-1], 16)
    found = {n: ms(n, short) for n in counts}
    token_ms = max(ms(most, long) - found[most], 0.0) / (most * (long - short))
    return tuple((n, max(spent - token_ms * n * short, 0.0)) for n, spent in found.items()), 1e3 * token_ms


def _beside(bench: Any) -> Points:
    tiny = bench.options.tiny
    counts, tokens = ((1, 2), 32) if tiny else (BESIDE, PROMPT)
    decodes = [bench.sequence(f"b{i}", 16) for i in range(counts[-1])]
    for i, one in enumerate(decodes):
        one.generated.append(int(bench.prefill(one, i + 1, tokens)[0].argmax()))
    prompt = bench.sequence("b", tokens)

    def ms(count: int) -> float:
        work = [Work(Segment("b", 0, tokens, True), prompt, bench.pages(0, tokens))]
        work += [
            Work(Segment(one.request_id, one.plan.tokens, one.plan.tokens + 1, True), one, bench.pages(i + 1, tokens))
            for i, one in enumerate(decodes[:count])
        ]

        def step() -> None:
            with torch.inference_mode():
                bench.runner.forward(work)

        return float(bench.times(step, 9))

    alone = ms(0)
    return tuple((float(n), max(ms(n) - alone, 0.0)) for n in counts)


async def _alone(bench: Any, made: ServiceTimes, found: dict[str, Any]) -> ServiceTimes:
    """With what requests take that nobody disturbs, beyond what is simulated of one."""
    tiny, planner = bench.options.tiny, bench.model.planner()
    cases = ((0, 0, 0), (1, 64, 96), (2, 64, 96)) if tiny else ALONE
    text, seeds = text_of(planner, TEXT), iter(range(1 << 30, 1 << 31))
    terms, seen = [], []
    async with AsyncExitStack() as stack:
        service, _ = await start(bench, stack, "both", planner)
        for count, height, width in cases:
            firsts = []
            for i in range(3 if tiny else 6):  # the first one warms up
                pictures = [picture(next(seeds), height, width) for _ in range(count)]
                firsts.append(1e3 * (await ask(service, f"{count} {width} {i} {text}", pictures, 4)).first_s)
            predicted = _simulated_ms(made, count, height, width)
            found.setdefault("alone", []).append((count, height, statistics.median(firsts[1:]), predicted))
            bench.say(
                f"times: {count} of {width} x {height} alone: {found['alone'][-1][2]:.1f}, without {predicted:.1f} ms"
            )
            megabytes = made.row_bytes * ImageSpec(0, width, height).visual_tokens / 1e6 if count else 0.0
            terms.append((1.0, float(count), megabytes))
            seen.append(max(statistics.median(firsts[1:]) - predicted, 0.1))
    (request_ms, image_ms, megabyte_ms), _ = fit(terms, seen)
    local = 1e9 / megabyte_ms if megabyte_ms > 0 else 0.0
    return msgspec.structs.replace(  # between devices of one host rows take the same way
        made, request_ms=request_ms, image_ms=image_ms, local_bytes_per_s=local,
        link_bytes_per_s=local or made.link_bytes_per_s,
    )  # fmt: skip


def _simulated_ms(made: ServiceTimes, images: int, height: int, width: int) -> float:
    pictures = tuple(ImageSpec(i, width, height) for i in range(images))
    cluster = Cluster(System("alone", both=1, turns=False, pace_ms=50.0, coalesce_tokens=64), made)
    cluster.run([WorkloadRequest(0.0, pictures, TEXT, 4)])
    return 1e3 * cluster.requests[0].first_s
