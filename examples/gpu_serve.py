"""From JPEG bytes to the first token through the services: an encode peer in its own process, a language peer here.

Or both in one process, or, to compare with, the tower inside of the engine's loop. Used by ``gpu_engine.py``. Every
picture is a new one, so no cache helps.
"""

from __future__ import annotations

import asyncio
import gc
import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvloop
from gpu_model import Random
from PIL import Image

from aiodisagg import (
    BothService,
    ChatMessage,
    EncodeConfig,
    EncodeService,
    LanguageConfig,
    LanguageService,
    SamplingParams,
)
from aiodisagg.models.base import ImagePart, TextPart

MiB = 1 << 20
THREADS = min(8, os.cpu_count() or 1)
"""That prepare pictures, in every shape."""


def picture(seed: int, height: int, width: int) -> bytes:
    """A JPEG with the detail of a photograph: smooth shapes and some grain."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (max(2, height // 40), max(2, width // 40), 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-6, 7, (height, width, 1), dtype=np.int16)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def encode_config(model: Random, encoder: Any, device: str) -> EncodeConfig:
    return EncodeConfig(
        model=model.folder,
        device=device,
        row_dtype=encoder.layout.dtype,
        prepare_threads=THREADS,
        source_bytes=2048 * MiB if device != "cpu" else 64 * MiB,
    )


def encode_peer(folder: Path, device: str) -> None:
    """A process: an encode peer with a random tower; says its address, and ends with its stdin."""

    async def run() -> None:
        model = Random.read(folder)
        encoder = await asyncio.to_thread(model.encoder, device)
        async with EncodeService(encode_config(model, encoder, device), encoder=encoder) as peer:
            print(peer.address, flush=True)
            await asyncio.to_thread(sys.stdin.read)

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    uvloop.run(run())


@dataclass(frozen=True, slots=True)
class Answered:
    """Of one request, in seconds from when it was due."""

    first_s: float
    end_s: float
    tokens: int
    gaps_s: Sequence[float] = ()
    """Between pieces of its answer, as ``aiodisagg bench serve`` counts them; a piece may hold several tokens."""


def text_of(service_planner: Any, tokens: int) -> str:
    """A text that the planner makes about ``tokens`` tokens of."""
    words, text = ["the", "harbour", "wakes", "before", "the", "town", "does", "and", "nobody", "saw", "it"], ""
    count = 0
    while True:
        step = max(1, (tokens - count) // 8)
        text += " ".join(words[(count + i) % len(words)] for i in range(step)) + " "
        count = service_planner.plan([ChatMessage("user", (TextPart(text),))]).tokens
        if count >= tokens:
            return text


async def ask(
    service: LanguageService, text: str, images: Sequence[bytes], tokens: int, due_s: float | None = None
) -> Answered:
    """``due_s``: by ``time.perf_counter``; now unless given."""
    due_s, count, pieces = time.perf_counter() if due_s is None else due_s, 0, list[float]()
    message = ChatMessage("user", (*(ImagePart(data) for data in images), TextPart(text)))
    async with aclosing(service.generate([message], SamplingParams(max_tokens=tokens, ignore_eos=True))) as deltas:
        async for delta in deltas:
            if delta.token_ids:
                pieces.append(time.perf_counter() - due_s)
                count += len(delta.token_ids)
    return Answered(pieces[0], time.perf_counter() - due_s, count, [b - a for a, b in pairwise(pieces)])


def serve(bench: Any, found: dict[str, Any]) -> None:
    """The tower in a process of its own."""
    _run(bench, found, "apart")


def both(bench: Any, found: dict[str, Any]) -> None:
    """Tower and engine in one process, side by side."""
    _run(bench, found, "both")


def inside(bench: Any, found: dict[str, Any]) -> None:
    """What the others are held against: the tower inside of the engine's loop, all images before the prefill."""
    _run(bench, found, "inside")


def _run(bench: Any, found: dict[str, Any], shape: str) -> None:
    for pace in bench.options.paces.split(","):
        bench.options.itl_budget_ms = float(pace) if pace else bench.options.itl_budget_ms
        free_runner(bench)
        uvloop.run(_serve(bench, found.setdefault(f"{pace} ms", {}) if pace else found, shape))


def free_runner(bench: Any) -> None:
    """It was measured, and its pool's memory is needed."""
    if bench.runner is not None:
        bench.runner.release()
        bench.stepper = bench.runner = None
    gc.collect()
    if bench.gpu:
        torch.cuda.empty_cache()


async def _serve(bench: Any, found: dict[str, Any], shape: str) -> None:
    height, width = (64, 96) if bench.options.tiny else (1080, 1920)
    planner = bench.model.planner()
    async with AsyncExitStack() as stack:
        service, _ = await start(bench, stack, shape, planner)
        await _cases(bench, found, service, planner, height, width)


async def start(bench: Any, stack: AsyncExitStack, shape: str, planner: Any) -> tuple[LanguageService, str]:
    """The services of a shape until ``stack`` ends: who answers, and the address of its own tower or nothing."""
    tiny, model, address = bench.options.tiny, bench.model, ""
    apart = shape not in ("both", "inside") and not tiny
    there = f"cuda:{bench.options.devices - 1}" if apart else bench.device
    config = LanguageConfig(
        model=model.folder,
        device=bench.device,
        dtype=bench.half.layout.dtype,
        row_dtype=bench.half.layout.dtype,
        pool_bytes=8 * MiB if tiny else None,
        kv_bytes=16 * MiB if tiny else None,
        token_budget=256 if tiny else 8192,
        cache_bytes=0,
        overlap=not bench.options.wait,
        itl_budget_ms=bench.options.itl_budget_ms,
    )
    loaded = planner, bench.half, model.fingerprint
    if shape in ("both", "inside"):
        encoder = await asyncio.to_thread(model.encoder, there)
        settings = encode_config(model, encoder, there)
        peer = BothService(config, settings, inline=shape == "inside", encoder=encoder, loaded=loaded)
        service = (await stack.enter_async_context(peer)).language
        address = peer.address if shape == "both" else ""
    else:
        encoding = asyncio.ensure_future(_encode_process(stack, tiny, model.folder, there))
        service = await stack.enter_async_context(LanguageService(config, loaded=loaded))
        service.add_peer(await encoding)
    await service.peers.wait_any(60)
    bench.say(f"{shape}: encode peer on {there} linked")
    return service, address


async def _encode_process(stack: AsyncExitStack, tiny: bool, folder: Path, device: str) -> str:
    """Starts it, and gives its address."""
    script = str(Path(__file__).with_name("gpu_engine.py"))
    command = [sys.executable, script, *(["--tiny"] if tiny else []), "encode", str(folder), device]
    child = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    async def end() -> None:
        assert child.stdin is not None
        child.stdin.close()
        try:
            await asyncio.wait_for(child.wait(), 15)
        except TimeoutError:
            child.kill()
            await child.wait()

    stack.push_async_callback(end)
    assert child.stdout is not None
    return (await asyncio.wait_for(child.stdout.readline(), 120)).decode().strip()


def stages(service: LanguageService) -> str:
    """When what happened to the last request, in milliseconds from its start."""
    trace = service.traces.recent()[-1]

    def ms(seconds: float) -> str:
        return f"{seconds * 1e3:.0f}"

    items = " ".join(f"{ms(item.encoded_s)}/{ms(item.complete_s)}" for item in trace.items)
    return f"planned {ms(trace.planned_s)}, admitted {ms(trace.admitted_s)}, encoded/here {items or '-'}"


def timeline(service: LanguageService, count: int) -> list[list[int]]:
    """Of the last requests that ended, in milliseconds from each one's start: planned, admitted, last item's rows made,
    last item's rows here, first token."""
    lines = []
    for trace in service.traces.recent()[-count:]:
        made, here = (max((getattr(i, at) for i in trace.items), default=0.0) for at in ("encoded_s", "complete_s"))
        stages = trace.planned_s, trace.admitted_s, made, here, trace.first_token_s
        lines.append([round(seconds * 1e3) for seconds in stages])
    return sorted(lines, key=lambda line: line[-1])


async def _cases(
    bench: Any, found: dict[str, Any], service: LanguageService, planner: Any, height: int, width: int
) -> None:
    tiny, made = bench.options.tiny, iter(range(1, 1 << 20))
    text = text_of(planner, 16 if tiny else 128)
    long = text_of(planner, 64 if tiny else 9000)

    def pictures(count: int) -> list[bytes]:
        return [picture(next(made), height, width) for _ in range(count)]

    async def alone(name: str, said: str, images: int, times: int, tokens: int = 4) -> None:
        answers = []
        for i in range(times + 1):  # the first one warms up
            # Another beginning each time: no pages of an earlier prompt are used again.
            answers.append(await ask(service, f"{name} {i}: {said}", pictures(images), tokens))
            bench.say(f"{name}, {i or 'warming'}: first token {answers[-1].first_s * 1e3:.1f} ms, {stages(service)}")
        firsts, ends = [a.first_s for a in answers[1:]], [a.end_s for a in answers[1:]]
        found[name] = {
            "ttft_ms": statistics.median(firsts) * 1e3,
            "end_ms": statistics.median(ends) * 1e3,
            "all_ms": [round(f * 1e3, 1) for f in firsts],
            "stages": stages(service),
        }
        bench.save()

    async def together(name: str, count: int, tokens: int) -> None:
        asked = pictures(count)
        began = time.perf_counter()
        answers = await asyncio.gather(*(ask(service, text, [data], tokens) for data in asked))
        whole = time.perf_counter() - began
        found[name] = {
            "mean_ttft_ms": statistics.mean(a.first_s for a in answers) * 1e3,
            "max_ttft_ms": max(a.first_s for a in answers) * 1e3,
            "req_s": count / whole,
            "tpot_ms": statistics.mean((a.end_s - a.first_s) / max(1, a.tokens - 1) for a in answers) * 1e3,
            "steps": service.engine.stats().steps,
        }
        bench.say(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in found[name].items()))
        found[name]["timeline_ms"] = timeline(service, count)
        bench.save()

    await alone("text only", text, 0, 3)
    await alone("one image", text, 1, 2 if tiny else 5)
    await alone("four images", text, 4, 1 if tiny else 3)
    count = 4 if tiny else 32
    await together(f"{count} at once", count, 8 if tiny else 128)
    if bench.left_s() > 20:
        await together(f"{count} at once again", count, 8 if tiny else 128)
    if bench.left_s() > 20:
        await alone("five images, 9,000 text", long, 5, 1 if tiny else 2, 8 if tiny else 128)
