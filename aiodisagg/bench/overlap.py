"""What prefilling while images arrive is worth: a language peer that does, and one that waits for all images.

An encode peer has one core and the language peers another; only one of the two is asked at a time. Model and load are
such that encoding and prefilling a request take about as long: a random model of 115 M parameters in float32, one to
eight images of differing sizes after some text, answers of differing lengths. Both modes get the same load, but for the
pixels: no image is ever seen twice, so that no cache helps. They take turns, and each goes first in every other round.

The load is closed: ``concurrency`` clients, each with the next request as soon as it has the answer to the last. TTFT
is the peer's own (from the parsed request to the first token) of all but each client's first request, which begin
together as nothing in the field does. Throughput is of everything, ramp and drain included.
"""

from __future__ import annotations

import asyncio
import base64
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import msgspec
from PIL import Image

from aiodisagg.demo.cluster import Cluster
from aiodisagg.errors import AiodisaggError, ConfigError

SIDES = (160, 192, 224, 256, 288)
"""Of images, in pixels: 25 to 81 tokens."""
MAX_IMAGES = 8
TEXT_WORDS = 100
MODES = ("overlap", "wait")
REQUEST_S = 600.0
_PIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execvp(sys.argv[2], sys.argv[2:])"


@dataclass(frozen=True, slots=True)
class OverlapOptions:
    """``requests``: measured ones of each client in a round. ``tokens``: of a mean answer. A decode step of eight
    takes about 70 ms on one core, hence ``itl_budget_ms``; it is the same for both modes."""

    concurrency: tuple[int, ...] = (8, 16)
    rounds: int = 5
    requests: int = 2
    tokens: int = 128
    itl_budget_ms: float = 200.0
    transport: str = "ipc"
    quick: bool = False
    verbose: int = 0

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1:
            raise ConfigError("concurrency", f"numbers of clients, at least 1 each, not {self.concurrency}")


@dataclass(frozen=True, slots=True)
class _Request:
    """Sides of its images, tokens of its answer."""

    sides: tuple[int, ...]
    tokens: int
    text: str


class Pass(msgspec.Struct, frozen=True):
    """One mode under one load. Seconds are means over the measured requests."""

    mode: str
    ttft_s: float
    last_row_s: float
    """From the request until its last row is there."""
    after_last_row_s: float
    """From there to the first token."""
    e2e_s: float
    requests_per_s: float
    tokens_per_s: float
    ttfts_s: list[float]


class Compared(msgspec.Struct, frozen=True):
    """Both modes at one concurrency. Ratios are overlap to waiting, medians over rounds."""

    concurrency: int
    ttft_ratio: float
    throughput_ratio: float
    ttft_ratios: list[float]
    throughput_ratios: list[float]
    passes: list[Pass]

    def median(self, mode: str, what: str) -> float:
        return float(statistics.median(getattr(one, what) for one in self.passes if one.mode == mode))


class OverlapReport(msgspec.Struct, frozen=True):
    rounds: int
    requests: int
    tokens: int
    itl_budget_ms: float
    transport: str
    cpus: list[int]
    compared: list[Compared]


class _Peer:
    """A language peer and the client that loads it."""

    def __init__(self, mode: str, url: str, model: str, session: aiohttp.ClientSession) -> None:
        self.mode, self._url, self._model, self._session = mode, url, model, session
        self._count = 0

    async def run(self, load: Sequence[_Request], concurrency: int, draw: Random) -> Pass:
        """All requests of the load, the first ``concurrency`` of them unmeasured."""
        bodies = await asyncio.to_thread(lambda: [self._body(request, draw) for request in load])
        self._count += 1
        names = [f"{self.mode}-{self._count}-{i}" for i in range(len(load))]
        queue = list(reversed(list(zip(names, bodies, strict=True))))
        tokens = 0

        async def client() -> None:
            nonlocal tokens
            while queue:
                got = await self._ask(*queue.pop())
                tokens += got  # not in one line with the await: other clients count meanwhile

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client())
        took = time.perf_counter() - began
        measured = set(names[concurrency:])
        async with self._session.get(f"{self._url}/debug/requests") as response:
            traces = [trace for trace in await response.json() if trace["request_id"] in measured]
        firsts = [trace["first_token_s"] for trace in traces]
        rows = [max(item["complete_s"] for item in trace["items"]) for trace in traces]
        return Pass(
            self.mode, statistics.fmean(firsts), statistics.fmean(rows),
            statistics.fmean(first - row for first, row in zip(firsts, rows, strict=True)),
            statistics.fmean(trace["total_s"] for trace in traces), len(load) / took, tokens / took, firsts,
        )  # fmt: skip

    def _body(self, request: _Request, draw: Random) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": request.text}]
        for side in request.sides:
            url = f"data:image/png;base64,{base64.b64encode(_noise(side, draw)).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        messages = [{"role": "user", "content": content}]
        return {"model": self._model, "messages": messages, "max_tokens": request.tokens, "temperature": 0.0}

    async def _ask(self, name: str, body: dict[str, Any]) -> int:
        url = f"{self._url}/v1/chat/completions"
        async with self._session.post(url, json=body, headers={"x-request-id": name}) as response:
            said = await response.json()
            if response.status != 200:
                raise AiodisaggError(f"{name}: {response.status}: {said['error']['message']}")
            return int(said["usage"]["completion_tokens"])


def _noise(side: int, draw: Random) -> bytes:
    """A small file of random squares; what a picture shows does not change what it costs."""
    squares = Image.frombytes("RGB", (8, 8), draw.randbytes(192)).resize((side, side), Image.Resampling.NEAREST)
    out = BytesIO()
    squares.save(out, "PNG")
    return out.getvalue()


def _load(count: int, tokens: int, draw: Random) -> list[_Request]:
    made = []
    for _ in range(count):
        sides = tuple(draw.choice(SIDES) for _ in range(draw.randint(1, MAX_IMAGES)))
        words = " ".join(draw.choice(("the", "of", "and", "to", "in", "that", "is", "as")) for _ in range(TEXT_WORDS))
        made.append(_Request(sides, draw.randint(tokens // 2, tokens + tokens // 2), words))
    return made


async def bench_overlap(options: OverlapOptions, say: Callable[[str], None] = lambda text: None) -> OverlapReport:
    """Starts the processes and runs every round. Raises ConfigError without two CPUs, ProcessEnded, AiodisaggError."""
    from aiodisagg.models.synthetic import build_synthetic

    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        raise ConfigError("cpus", f"two are needed, this process may use {cpus}")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aiodisagg-bench-")))
        await asyncio.to_thread(build_synthetic, folder, "tiny" if options.quick else "115m")
        # A token that cannot be sampled: answers are as long as they are asked for.
        (folder / "generation_config.json").write_text('{"eos_token_id": 1000000000}', encoding="utf-8")
        cluster = await stack.enter_async_context(Cluster(verbose=options.verbose))
        common = ("--model", str(folder), "--row-dtype", "float32", "--transports", options.transport)
        on_first, on_second = ((sys.executable, "-c", _PIN, str(cpu)) for cpu in cpus)
        # One image a tower batch: on one core a batch takes as long, and its first rows come with its last.
        encode = ("encode", *common, "--prepare-threads", "1", "--batch-patches", "64")
        address = (await cluster.start("encode", *encode, prefix=on_first)).facts["address"]
        pace = ("--itl-budget-ms", str(options.itl_budget_ms))
        language = ("language", *common, *pace, "--peer", address, "--port", "0")
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=REQUEST_S)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=timeout))
        peers = []
        for mode in MODES:
            switch = "--overlap" if mode == "overlap" else "--no-overlap"
            facts = (await cluster.start(mode, *language, switch, "--name", mode, prefix=on_second)).facts
            peers.append(_Peer(mode, facts["url"], facts["model"], session))
        for peer in peers:  # whatever is slow only once
            await peer.run(_load(4, options.tokens // 4, Random(-1)), 2, Random(peer.mode))
        compared = [await _compare(peers, concurrency, options, say) for concurrency in options.concurrency]
    return OverlapReport(
        options.rounds, options.requests, options.tokens, options.itl_budget_ms, options.transport, cpus, compared
    )


async def _compare(
    peers: Sequence[_Peer], concurrency: int, options: OverlapOptions, say: Callable[[str], None]
) -> Compared:
    passes: list[Pass] = []
    for number in range(options.rounds):
        load = _load(concurrency * (1 + options.requests), options.tokens, Random(f"{concurrency} {number}"))
        for peer in peers if number % 2 == 0 else reversed(peers):
            one = await peer.run(load, concurrency, Random(f"{concurrency} {number} {peer.mode}"))
            passes.append(one)
            parts = f"{one.last_row_s:.3f} to the last row, {one.after_last_row_s:.3f} after"
            rate = f"{one.tokens_per_s:.1f} tokens/s"
            say(f"{concurrency} clients, round {number + 1}, {one.mode:7}: TTFT {one.ttft_s:.3f} s ({parts}), {rate}")
    ttfts, rates = [], []
    for a, b in zip(passes[::2], passes[1::2], strict=True):
        ours, theirs = (a, b) if a.mode == "overlap" else (b, a)
        ttfts.append(ours.ttft_s / theirs.ttft_s)
        rates.append(ours.requests_per_s / theirs.requests_per_s)
    return Compared(concurrency, statistics.median(ttfts), statistics.median(rates), ttfts, rates, passes)


def table(report: OverlapReport) -> str:
    """Medians over rounds as text; the ratios are of each round's two."""
    lines = [f"{'clients':>8}{'':>9}{'TTFT s':>8}{'last row s':>12}{'after s':>9}{'e2e s':>8}{'req/s':>8}{'tok/s':>8}"]
    for one in report.compared:
        for mode in MODES:
            columns = ("ttft_s", "last_row_s", "after_last_row_s", "e2e_s", "requests_per_s", "tokens_per_s")
            ttft, row, after, e2e, requests, tokens = (one.median(mode, what) for what in columns)
            lines.append(
                f"{one.concurrency:8}{mode:>9}{ttft:8.3f}{row:12.3f}{after:9.3f}{e2e:8.2f}{requests:8.3f}{tokens:8.1f}"
            )
        lines.append(f"{'':8}{'ratio':>9}{one.ttft_ratio:8.2f}  throughput {one.throughput_ratio:.3f}")
    return "\n".join(lines)
