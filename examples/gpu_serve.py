"""From JPEG bytes to the first token through the services: an encode peer in its own process, a language peer here.

Or both in one process, or, to compare with, the tower inside of the engine's loop. Used by ``gpu_engine.py``. Every
picture is a new one, so no cache helps.
"""

from __future__ import annotations

import asyncio
import gc
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
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
from aiodisagg.bench.mixes import named_mix
from aiodisagg.bench.workload import Gamma, generate
from aiodisagg.models.base import ImagePart, TextPart

MiB = 1 << 20


def picture(seed: int, height: int, width: int) -> bytes:
    """A JPEG with the detail of a photograph: smooth shapes and some grain."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (max(2, height // 40), max(2, width // 40), 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-6, 7, (height, width, 1), dtype=np.int16)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def encode_config(model: Random, encoder: Any, device: str, *, prepare_threads: int = 8) -> EncodeConfig:
    return EncodeConfig(
        model=model.folder,
        device=device,
        row_dtype=encoder.layout.dtype,
        prepare_threads=prepare_threads,
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
    """Of one request, in seconds from its start."""

    first_s: float
    end_s: float
    tokens: int
    gaps_s: Sequence[float] = ()
    """Between its tokens."""


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


async def ask(service: LanguageService, text: str, images: Sequence[bytes], tokens: int) -> Answered:
    began, first, count, gaps, last = time.perf_counter(), 0.0, 0, list[float](), 0.0
    message = ChatMessage("user", (*(ImagePart(data) for data in images), TextPart(text)))
    async with aclosing(service.generate([message], SamplingParams(max_tokens=tokens, ignore_eos=True))) as deltas:
        async for delta in deltas:
            if delta.token_ids:
                now = time.perf_counter() - began
                if count:
                    gaps += [now - last, *[0.0] * (len(delta.token_ids) - 1)]
                else:
                    first = now
                last, count = now, count + len(delta.token_ids)
    return Answered(first, time.perf_counter() - began, count, gaps)


def serve(bench: Any, found: dict[str, Any]) -> None:
    """The tower in a process of its own."""
    _run(bench, found, "apart")


def both(bench: Any, found: dict[str, Any]) -> None:
    """Tower and engine in one process, side by side."""
    _run(bench, found, "both")


def inside(bench: Any, found: dict[str, Any]) -> None:
    """What the others are held against: the tower inside of the engine's loop, all images before the prefill."""
    _run(bench, found, "inside")


def load(bench: Any, found: dict[str, Any]) -> None:
    """A closed loop of requests with one to eight pictures: this process is a replica, or the language half."""
    _run(bench, found, bench.options.shape)


def _run(bench: Any, found: dict[str, Any], shape: str) -> None:
    free_runner(bench)
    uvloop.run(_serve(bench, found, shape))


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
        service, address = await start(bench, stack, shape, planner)
        if bench.options.concurrency and not bench.options.rates:
            await _meet(bench, stack, service, address)
            await _loops(bench, found, service, planner)
        elif bench.options.rates:
            await _meet(bench, stack, service, address)
            await open_loops(bench, found, service, planner)
        else:
            await _cases(bench, found, service, planner, height, width)


async def start(bench: Any, stack: AsyncExitStack, shape: str, planner: Any) -> tuple[LanguageService, str]:
    """The services of a shape until ``stack`` ends: who answers, and the address of its own tower or nothing."""
    tiny, model, address = bench.options.tiny, bench.model, ""
    there = "cpu" if tiny else f"cuda:{bench.options.devices - 1}"
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
        encoder = await asyncio.to_thread(model.encoder, bench.device)
        threads = 8 if shape == "both" or bench.options.concurrency or bench.options.rates else 1
        settings = encode_config(model, encoder, there, prepare_threads=threads)
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


async def _meet(bench: Any, stack: AsyncExitStack, service: LanguageService, address: str) -> None:
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


async def _loops(bench: Any, found: dict[str, Any], service: LanguageService, planner: Any) -> None:
    """Closed loops: mean and p99 of the time to a first token, between tokens, and requests a second."""
    tiny = bench.options.tiny
    height, width = (64, 96) if tiny else (720, 1280)
    text, draw = text_of(planner, 16 if tiny else 64), np.random.default_rng(7 + ord(bench.options.name[0]))
    made = iter(range(1000 * ord(bench.options.name[0]), 1 << 30))
    warm = [picture(next(made), height, width) for _ in range(4)]
    await asyncio.gather(*(ask(service, f"{i} {text}", warm[i : i + 1], 8) for i in range(4)))
    for concurrency in map(int, bench.options.concurrency.split(",")):
        count = max(6, bench.options.each * concurrency)
        images = draw.integers(1, 9, count).tolist()
        asked = [[picture(next(made), height, width) for _ in range(n)] for n in images]
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
            "ttft_p99_ms": firsts[min(count - 1, int(0.99 * count))],
            "tpot_ms": statistics.mean(tpots),
            "all_ttft_ms": [round(f, 1) for f in firsts],
        }
        shown = {k: v for k, v in found[str(concurrency)].items() if k != "all_ttft_ms"}
        bench.say(f"loop of {concurrency}: " + ", ".join(f"{k} {v:.1f}" for k, v in shown.items()))
        bench.save()


async def open_loops(bench: Any, found: dict[str, Any], service: LanguageService, planner: Any) -> None:
    """Poisson arrivals of one sequence that both replicas know, of which each answers every other request; or all."""
    tiny, options = bench.options.tiny, bench.options
    mix = named_mix(options.mix).scaled(visual=1 / 150, text=1 / 8, output=1 / 16) if tiny else named_mix(options.mix)
    replicas, own = 2 if options.meet is not None else 1, ord(options.name[0]) - ord("a")
    text = text_of(planner, 16)
    warm = [picture(1 << 20 | own << 10 | i, *((64, 96) if tiny else (720, 1280))) for i in range(4)]
    await asyncio.gather(*(ask(service, f"{i} {text}", warm[i : i + 1], 8) for i in range(4)))
    loop = asyncio.get_running_loop()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for turn, (seed, rate) in enumerate((s, float(r)) for s in seeds for r in options.rates.split(",")):
        requests = generate(mix, Gamma(rate), max(8, round(rate * options.loop_s)), seed)
        ours = [i for i in range(len(requests)) if replicas == 1 or i % replicas == own]
        texts = {i: f"{i} {text_of(planner, requests[i].text_tokens)}" for i in ours}
        with ThreadPoolExecutor(8) as pool:
            making = {
                i: [pool.submit(picture, turn << 24 | s.identity, s.height, s.width) for s in requests[i].images]
                for i in ours
            }
            made = {i: [await asyncio.wrap_future(one) for one in its] for i, its in making.items()}
        if bench.meeting is not None:
            await bench.meeting(f"rate{turn}")
        began = loop.time() + 0.2

        async def one(i: int) -> Answered:
            await asyncio.sleep(began + requests[i].arrival_s - loop.time())  # noqa: B023 - ends before the next one
            return await ask(service, texts[i], made[i], requests[i].output_tokens)  # noqa: B023

        answers = await asyncio.gather(*map(one, ours))
        found[f"{rate} {seed}"] = {
            "rate": rate,
            "seed": seed,
            "seconds": loop.time() - began,
            "images": [len(requests[i].images) for i in ours],
            "tokens": [a.tokens for a in answers],
            "ttft_ms": [round(a.first_s * 1e3, 1) for a in answers],
            "end_ms": [round(a.end_s * 1e3, 1) for a in answers],
            "gaps_ms": [round(g * 1e3, 1) for a in answers for g in a.gaps_s],
        }
        ttft = sorted(a.first_s for a in answers)
        bench.say(
            f"{rate}/s, seed {seed}: {len(ours)} requests, TTFT {statistics.mean(ttft):.3f} s, {ttft[-1]:.3f} most"
        )
        bench.save()
    found["metrics"] = service.metrics()


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
