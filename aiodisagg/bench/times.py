"""What this machine's tower and engine take: the file of ``simulate --times``, measured instead of modelled.

One process, the real classes of both halves, one after the other:

* the tower over batches of equal pictures, preparing included (on a CPU it has the same core), fitted with
  ``base + a * patches + b * squares``;
* engine steps that prefill one prompt, fitted with ``base + a * tokens + b * tokens**2``;
* engine steps that decode for some requests, from the beginning of a step to that of the next one: what happens between
  two steps counts. Twice, with contexts of different lengths.

Numbers are medians; fits are least squares of relative errors, no coefficient below zero.
"""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from aiodisagg.bench.distributions import TOKEN_SIDE
from aiodisagg.bench.pictures import make_picture
from aiodisagg.bench.service_times import Points, ServiceTimes
from aiodisagg.bench.workload import ImageSpec
from aiodisagg.engine.steps import StepWatcher

if TYPE_CHECKING:
    from aiodisagg.engine.engine import Engine
    from aiodisagg.models.plan import Qwen3VLPlanner
    from aiodisagg.models.vision import Qwen3VLVisionEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class TimesOptions:
    """``sides``: of pictures, in pixels. ``batches``: pictures in one tower batch. ``repeat``: runs of each kind."""

    model: Path
    device: str = "cpu"
    row_dtype: str = "float32"
    dtype: str | None = None
    sides: tuple[int, ...] = (64, 96, 160, 224, 320)
    batches: tuple[int, ...] = (1, 2, 4)
    batch_side: int = 160
    prompts: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    decodes: tuple[int, ...] = (1, 2, 4, 8, 16)
    contexts: tuple[int, int] = (64, 512)
    steps: int = 12
    """Decodes of each kind."""
    repeat: int = 5
    busy: int = 0
    """Cores that do the same meanwhile; the caller's business, said in ``source``."""

    def quick(self) -> TimesOptions:
        """The same with few runs of few kinds."""
        return replace(
            self, sides=(64, 96), batches=(1, 2), batch_side=64, prompts=(16, 32), decodes=(1, 2), contexts=(16, 64),
            steps=3, repeat=1,
        )  # fmt: skip


def measure_times(options: TimesOptions, say: Callable[[str], None] = lambda text: None) -> ServiceTimes:
    """Blocking; call it outside of an event loop. Raises CheckpointError, ConfigError."""
    from aiodisagg.models.loading import check_device
    from aiodisagg.models.plan import Qwen3VLPlanner
    from aiodisagg.models.vision import Qwen3VLVisionEncoder

    check_device(options.device)
    planner = Qwen3VLPlanner(options.model)
    encoder = Qwen3VLVisionEncoder(options.model, dtype=options.row_dtype, device=options.device)
    tower, tower_base, tower_off = _tower(encoder, planner, options, say)
    row_bytes = encoder.layout.row_bytes
    del encoder
    engine = asyncio.run(_engine_times(options, say))
    prompt_tokens, image_tokens, least = overheads(planner)
    off = max(tower_off, engine.prefill_off)
    return ServiceTimes(
        name=options.model.name,
        source=f"aiodisagg bench times: {options.model.name}, {_machine(options)}. Medians of {options.repeat}; "
        f"the fits of tower and prefill are off by at most {off:.0%}. Preparing is in the tower's times. "
        "Link: shared memory of one host, assumed.",
        row_bytes=row_bytes,
        tower=tower,
        tower_base_ms=tower_base,
        prefill=engine.prefill,
        prefill_base_ms=engine.prefill_base_ms,
        decode=engine.decode,
        decode_context_us=engine.context_us,
        prompt_tokens=prompt_tokens,
        image_tokens=image_tokens,
        least_rows=least,
        kv_tokens=engine.kv_tokens,
        token_budget=2048,
        max_running=64,
        batch_patches=_batch_patches(options.device),
        inline_patches=_batch_patches(options.device),
        link_bytes_per_s=5e9,
        link_rtt_ms=0.5,
    )


def _batch_patches(device: str) -> int:
    from aiodisagg.encode.pipeline import BATCH_PATCHES

    return BATCH_PATCHES.get(device.partition(":")[0], BATCH_PATCHES["cuda"])


def _machine(options: TimesOptions) -> str:
    import torch

    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    busy = os.getloadavg()[0]
    if options.device != "cpu":
        return f"{torch.cuda.get_device_name(options.device)}, {options.row_dtype}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    beside = f"{options.busy} more core{'s' * (options.busy > 1)} doing the same, " if options.busy else ""
    return (
        f"{threads} thread of {model}, {options.row_dtype}, torch {torch.__version__}, {beside}load average {busy:.1f}"
    )


def overheads(planner: Qwen3VLPlanner) -> tuple[int, int, int]:
    """Tokens of a prompt beside its text and pictures, the same of each picture, and rows of the smallest picture."""
    from aiodisagg.models.base import ChatMessage, ImagePart, TextPart

    picture = ImagePart(make_picture(ImageSpec(0, TOKEN_SIDE, TOKEN_SIDE), "times", "jpeg"))
    plans = [planner.plan([ChatMessage("user", (*[picture] * n, TextPart("the")))]) for n in (0, 1)]
    rows = plans[1].items[0].rows
    return plans[0].tokens - 1, plans[1].tokens - plans[0].tokens - rows, rows


# -- the tower ----------------------------------------------------------------------------------------------------


def _tower(
    encoder: Qwen3VLVisionEncoder, planner: Qwen3VLPlanner, options: TimesOptions, say: Callable[[str], None]
) -> tuple[Points, float, float]:
    """Points of single pictures, milliseconds of a batch without any, and how far the fit is off."""
    from aiodisagg.models.base import ChatMessage, ImagePart, PlannedItem

    kinds = [(side, 1) for side in options.sides] + [(options.batch_side, k) for k in options.batches if k > 1]
    terms: list[tuple[float, ...]] = []
    seen: list[float] = []
    for side, count in kinds:
        files = [make_picture(ImageSpec(n, side, side), f"times/{side}", "jpeg") for n in range(count)]
        plan = planner.plan([ChatMessage("user", tuple(ImagePart(file) for file in files))])

        def encode(items: Sequence[PlannedItem] = plan.items) -> None:
            rows = encoder.encode([encoder.prepare(one.kind, one.media, one.grid_thw, one.fps) for one in items])
            rows[0].cpu()  # on an accelerator: returns when it is computed

        patches = [one.rows * 4 for one in plan.items]
        terms.append((1.0, float(sum(patches)), sum(p * p for p in patches) / 1e3))
        seen.append(_median_ms(encode, options.repeat))
        say(f"tower: {count} of {side} x {side}, {sum(patches)} patches: {seen[-1]:.1f} ms")
    costs, off = fit(terms, seen)
    sizes = sorted({round(term[1]) for term, (_, count) in zip(terms, kinds, strict=True) if count == 1})
    return tuple((size, value_of(costs, (1.0, size, size * size / 1e3))) for size in sizes), costs[0], off


def _median_ms(work: Callable[[], None], repeat: int) -> float:
    work()  # what runs first also allocates and compiles
    spent = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        spent.append(1e3 * (time.perf_counter() - began))
    return statistics.median(spent)


# -- the engine ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _EngineTimes:
    prefill: Points
    prefill_base_ms: float
    prefill_off: float
    decode: Points
    context_us: float
    kv_tokens: int


class _Steps(StepWatcher):
    """A watcher that keeps (began, ended, tokens sampled) of every step."""

    def __init__(self) -> None:
        self._began = 0.0
        self.seen: list[tuple[float, float, int]] = []

    def step_began(self) -> None:
        self._began = time.perf_counter()

    def step_ended(self, decodes: int) -> None:
        if self._began:
            self.seen.append((self._began, time.perf_counter(), decodes))
        self._began = 0.0

    def prefills_ms(self) -> list[float]:
        return [1e3 * (ended - began) for began, ended, _ in self.seen]

    def decodes_ms(self, count: int) -> list[float]:
        """Of steps between two that decode for ``count`` requests, to the beginning of the next."""
        runs = zip(self.seen, self.seen[1:], self.seen[2:], strict=False)
        return [1e3 * (c[0] - b[0]) for a, b, c in runs if a[2] == b[2] == c[2] == count]


async def _engine_times(options: TimesOptions, say: Callable[[str], None]) -> _EngineTimes:
    from aiodisagg.engine.config import EngineConfig
    from aiodisagg.engine.engine import Engine
    from aiodisagg.models.loading import load_language
    from aiodisagg.models.plan import Qwen3VLPlanner

    half = load_language(options.model, dtype=options.dtype, device=options.device, row_dtype=options.row_dtype)
    steps, planner = _Steps(), Qwen3VLPlanner(options.model)
    config = EngineConfig(token_budget=2048, prefix_cache=False)
    async with Engine(half.causal, planner.decode, frozenset(), config, watcher=steps) as engine:
        terms: list[tuple[float, ...]] = []
        seen: list[float] = []
        for tokens in options.prompts:
            await _answer(engine, tokens, 1, 1)  # warm
            steps.seen.clear()
            for _ in range(options.repeat):
                await _answer(engine, tokens, 1, 1)
            terms.append((1.0, float(tokens), tokens * tokens / 1e3))
            seen.append(statistics.median(steps.prefills_ms()))
            say(f"prefill: {tokens} tokens: {seen[-1]:.1f} ms")
        costs, off = fit(terms, seen)
        prefill = tuple((tokens, value_of(costs, term)) for tokens, term in zip(options.prompts, terms, strict=True))
        found: dict[tuple[int, int], float] = {}
        for context in options.contexts:
            for count in options.decodes if context == options.contexts[0] else options.decodes[-1:]:
                steps.seen.clear()
                await _answer(engine, context, options.steps + 4, count)
                found[context, count] = statistics.median(steps.decodes_ms(count))
                say(f"decode: {count} requests of {context} tokens: {found[context, count]:.1f} ms")
        kv_tokens = engine.limit - 1
    short, long = options.contexts
    most = options.decodes[-1]
    grown = max(found[long, most] - found[short, most], 0.0)
    context_ms = grown / (most * (long - short))
    # The context of the shorter ones is taken out: it is paid for token by token.
    lowest = 0.0
    decode = []
    for count in options.decodes:
        lowest = max(lowest, found[short, count] - context_ms * count * (short + options.steps / 2))
        decode.append((count, lowest))
    return _EngineTimes(prefill, costs[0], off, tuple(decode), 1e3 * context_ms, kv_tokens)


async def _answer(engine: Engine, prompt: int, tokens: int, count: int) -> None:
    """``count`` requests at once, all of them to their end."""
    import numpy as np

    from aiodisagg.engine.engine import EngineRequest
    from aiodisagg.engine.types import SamplingParams
    from aiodisagg.models.base import PromptPlan

    async def one(number: int) -> None:
        ids = np.random.default_rng(number).integers(20, 250, prompt)
        plan = PromptPlan(ids, np.tile(np.arange(prompt), (3, 1)), 0, ())
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        async for _ in engine.submit(EngineRequest(f"{number}", plan, sampling)):
            pass

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))


# -- fits ---------------------------------------------------------------------------------------------------------


def fit(terms: Sequence[Sequence[float]], seen: Sequence[float]) -> tuple[tuple[float, ...], float]:
    """Coefficients, none below zero, with the least squares of relative errors; and the largest relative error.

    Coordinate descent: convex, and a bound at zero is one ``max()``.
    """
    count = len(terms[0])
    rows = [[value / target for value in term] for term, target in zip(terms, seen, strict=True)]
    scale = [max(row[i] for row in rows) or 1.0 for i in range(count)]
    rows = [[value / s for value, s in zip(row, scale, strict=True)] for row in rows]
    costs = [0.0] * count
    for _ in range(20_000):
        for i in range(count):
            power = sum(row[i] ** 2 for row in rows)
            rest = sum(row[i] * (1 - sum(costs[j] * row[j] for j in range(count) if j != i)) for row in rows)
            costs[i] = max(0.0, rest / power) if power else 0.0
    off = max(abs(sum(c * v for c, v in zip(costs, row, strict=True)) - 1) for row in rows)
    return tuple(c / s for c, s in zip(costs, scale, strict=True)), off


def value_of(costs: Sequence[float], term: Sequence[float]) -> float:
    return round(sum(c * x for c, x in zip(costs, term, strict=True)), 3)
