"""The line before the engine in a real service of this process: encode and language peer, a synthetic model, real time.

The same comparison as :mod:`aiodisagg.bench.overload`, with what this machine does instead of a model of it. Only
``line`` and ``engine`` (a line so short that it is none) exist here. The clients run on the same loop, so the load of a
small model is partly their own.
"""

from __future__ import annotations

import asyncio
import io
import random
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from aiodisagg.bench.overload import OverloadReport, measurement
from aiodisagg.encode.service import EncodeService
from aiodisagg.engine.types import SamplingParams
from aiodisagg.errors import Overloaded
from aiodisagg.language.service import LanguageService
from aiodisagg.models.base import ChatMessage, ImagePart, Part, TextPart
from aiodisagg.models.synthetic import build_synthetic
from aiodisagg.peer.config import EncodeConfig, LanguageConfig
from aiodisagg.scheduler.admission import AdmissionConfig

SIDE = 256
"""Pixels of an image's side."""
_OUTPUT_TOKENS = 16
_NO_LINE = 1 << 20


@dataclass(slots=True)
class _Asked:
    after_s: float
    messages: list[ChatMessage]
    images: int
    ttft_s: float = -1.0
    tokens: int = 0
    shed: str = ""


def _requests(count: int, rate: float, seed: int) -> list[_Asked]:
    """Half text, half one to four images, none of which was seen before; Poisson arrivals."""
    rng, pixels = random.Random(seed), np.random.default_rng(seed)
    found, now = [], 0.0
    for n in range(count):
        now += rng.expovariate(rate)
        images = 0 if rng.random() < 0.5 else rng.randint(1, 4)
        files = [_png(pixels.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(images)]
        parts: tuple[Part, ...] = (
            *(ImagePart(file) for file in files),
            TextPart(f"Request {n}: what is there to see?"),
        )
        found.append(_Asked(now, [ChatMessage("user", tuple(parts))], images))
    return found


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=0)
    return out.getvalue()


@asynccontextmanager
async def _service(folder: Path, admission: AdmissionConfig) -> AsyncIterator[LanguageService]:
    common = {"model": folder, "transports": ("memory",)}
    async with (
        LanguageService(LanguageConfig(**common, admission=admission)) as language,  # type: ignore[arg-type]
        EncodeService(EncodeConfig(**common)) as encode,  # type: ignore[arg-type]
    ):
        language.add_peer(encode.address)
        await language.peers.wait_any(10.0)
        yield language


async def _ask(service: LanguageService, asked: _Asked, due: float | None = None) -> None:
    """``due``: on the loop's clock, what its time to a first token counts from; None: now."""
    loop = asyncio.get_running_loop()
    began = loop.time() if due is None else due
    sampling = SamplingParams(max_tokens=_OUTPUT_TOKENS, ignore_eos=True)
    try:
        async with aclosing(service.generate(asked.messages, sampling)) as deltas:
            async for delta in deltas:
                if asked.ttft_s < 0:
                    asked.ttft_s = loop.time() - began
                if delta.usage is not None:
                    asked.tokens = delta.usage.prompt_tokens
    except Overloaded as shed:
        asked.shed = str(shed)


async def _play(service: LanguageService, requests: list[_Asked], *, at_once: bool = False) -> float:
    """Returns the seconds until all were answered."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as group:
        for asked in requests:
            if not at_once:
                await asyncio.sleep(began + asked.after_s - loop.time())
            group.create_task(_ask(service, asked, None if at_once else began + asked.after_s))
    return loop.time() - began


async def bench_overload_real(
    loads: Sequence[float], count: int, seed: int, *, size: str, max_wait_s: float = 10.0
) -> OverloadReport:
    """``size``: of the synthetic model, "tiny" or "115m"."""
    with tempfile.TemporaryDirectory(prefix="aiodisagg-bench-") as temporary:
        folder = await asyncio.to_thread(build_synthetic, temporary, size)
        open_line = AdmissionConfig(min_in_flight=_NO_LINE, max_wait_s=max_wait_s)
        async with _service(folder, open_line) as service:
            idle = _requests(12, 1.0, seed)
            for asked in idle:
                await _ask(service, asked)
            slo_s = 10 * sum(asked.ttft_s for asked in idle[2:]) / len(idle[2:])
            burst = _requests(max(40, count // 4), 1.0, seed + 1)
            capacity = len(burst) / await _play(service, burst, at_once=True)
        found = []
        for load in loads:
            for policy in ("line", "engine"):
                line = AdmissionConfig(max_ttft_s=slo_s, max_wait_s=max_wait_s)
                requests = _requests(count, load * capacity, seed + 2)
                async with _service(folder, line if policy == "line" else open_line) as service:
                    await _play(service, requests)
                shed = (asked.shed for asked in requests if asked.shed)
                found.append(measurement(policy, load, requests, requests[-1].after_s, slo_s, shed))
        return OverloadReport(capacity, slo_s, max_wait_s, seed, found)
