"""``bench control``: what scheduling, protocol and ipc cost by themselves, for items of a model that does nothing.

One process holds a receiver of rows, another all encode peers; each has a core. A request is one item of a few tiny
rows: placed, asked for, "encoded", offered, granted, written into shared memory, committed, taken and delivered to
nobody. Throughput is measured in a closed loop, and then, in open loops at ``STEADY_PER_S`` and at half of the measured
throughput, the time that each request takes: all of it is added by us.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from random import Random

import msgspec
import psutil

from aiodisagg.bench.chat_client import Clock
from aiodisagg.bench.serve_metrics import Spread
from aiodisagg.bench.synthetic import item_of, synthetic_model
from aiodisagg.bench.workload import Gamma, check
from aiodisagg.demo.cluster import Cluster
from aiodisagg.errors import AiodisaggError, ConfigError
from aiodisagg.language.rows import RowReceiver
from aiodisagg.peer.config import LanguageConfig, MiB
from aiodisagg.peer.garbage import settle
from aiodisagg.protocol.events import Fail
from aiodisagg.protocol.messages import ItemKey

HIDDEN, LEVELS = 16, 3
TIMEOUT_S = 60.0
STEADY_PER_S = 1000.0
"""Half of the 2,000 requests/s that are asked of any machine. Half of what one can do is a harder load, and a harder
one the better the machine is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlOptions:
    """``peers``: how many encode peers, one measurement each. ``cores``: of the receiver and of the encode peers."""

    peers: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    requests: int = 10_000
    concurrency: int = 64
    rows: int = 4
    transport: str = "ipc"
    cores: tuple[int, int] = (0, 1)
    seed: int = 0
    verbose: int = 0

    def __post_init__(self) -> None:
        if not self.peers:
            raise ConfigError("peers", "at least one is needed")
        check("peers", self.peers, least=1)
        check("requests", (self.requests,), least=2)  # half of them come in each open loop
        check("concurrency", (self.concurrency,), least=1)
        check("rows", (self.rows,), least=1)


class ItemFailed(AiodisaggError):
    """An item did not arrive, although nothing is in its way."""


class Controlled(msgspec.Struct, frozen=True):
    """With so many encode peers. CPU times are of the closed loop, in microseconds a request."""

    peers: int
    requests_per_s: float
    latency_ms: Spread
    """In the closed loop."""
    steady_latency_ms: Spread
    """In an open loop at ``STEADY_PER_S``."""
    half_per_s: float
    half_latency_ms: Spread
    """In an open loop at half the rate."""
    receiver_cpu_us: float
    encoders_cpu_us: float


class ControlReport(msgspec.Struct, frozen=True):
    transport: str
    requests: int
    concurrency: int
    rows: int
    measured: list[Controlled]

    @property
    def growth(self) -> str:
        """What more encode peers cost, from the fewest to the most; empty if there was one number of them only."""
        few, many = (choose(self.measured, key=lambda one: one.peers) for choose in (min, max))
        if few.peers == many.peers:
            return ""
        peers = many.peers - few.peers
        receiver_us = many.receiver_cpu_us - few.receiver_cpu_us
        encoders_us = many.encoders_cpu_us - few.encoders_cpu_us
        return (
            f"from {few.peers} to {many.peers} encode peers: {many.requests_per_s / few.requests_per_s:.2f} times the "
            f"requests/s; CPU of a request {receiver_us:+.0f} us at the receiver ({receiver_us / peers:+.1f} us a "
            f"peer), {encoders_us:+.0f} us at the encoders ({encoders_us / peers:+.1f} us a peer)"
        )


async def bench_control(options: ControlOptions, say: Callable[[str], None] = lambda text: None) -> ControlReport:
    """Measures. Raises ItemFailed, ProcessEnded."""
    found = []
    settle()  # as every peer does when it is ready
    with pinned(options.cores[0]):
        for peers in options.peers:
            found.append(await _with(peers, options))
            one = found[-1]
            say(
                f"{peers} peers: {one.requests_per_s:.0f}/s; p99 {one.steady_latency_ms.p99:.2f} ms at "
                f"{STEADY_PER_S:.0f}/s, {one.half_latency_ms.p99:.2f} ms at {one.half_per_s:.0f}/s"
            )
    return ControlReport(options.transport, options.requests, options.concurrency, options.rows, found)


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """This thread and those it starts run on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def _with(peers: int, options: ControlOptions) -> Controlled:
    model = synthetic_model(HIDDEN, LEVELS)
    async with Cluster(verbose=options.verbose) as cluster:
        source = await cluster.start(
            "source", "bench", "source", "--null", "--peers", str(peers), "--hidden", str(HIDDEN), "--levels",
            str(LEVELS), "--transports", options.transport, "--source-mib", "8",
            prefix=("taskset", "-c", str(options.cores[1])),
        )  # fmt: skip
        config = LanguageConfig(
            model=Path.cwd(), transports=(options.transport,), pool_bytes=MiB, block_rows=options.rows,
            stall_s=TIMEOUT_S,
        )  # fmt: skip
        caller = _Caller(options.rows)
        receiver = RowReceiver(config, model, name="control", deliver=lambda *_: None, ended=caller.ended)
        async with receiver:
            caller.receiver = receiver
            addresses = source.facts["address"].split()
            for address in addresses:
                receiver.peers.add(address)
            await _linked(receiver, len(addresses))
            await caller.closed(options.requests // 10, options.concurrency)
            process = psutil.Process(source.process.pid)
            own_cpu, other_cpu, began = time.process_time(), _cpu(process), time.perf_counter()
            full = await caller.closed(options.requests, options.concurrency)
            seconds = time.perf_counter() - began
            own_cpu, other_cpu = time.process_time() - own_cpu, _cpu(process) - other_cpu
            rate = options.requests / seconds
            steady = await caller.opened(options.requests // 2, STEADY_PER_S, options.seed)
            half = await caller.opened(options.requests // 2, rate / 2, options.seed)
    full_ms, steady_ms, half_ms = Spread.of(full), Spread.of(steady), Spread.of(half)
    assert full_ms is not None and steady_ms is not None and half_ms is not None
    each = 1e6 / options.requests
    return Controlled(peers, rate, full_ms, steady_ms, rate / 2, half_ms, own_cpu * each, other_cpu * each)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _linked(receiver: RowReceiver, count: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while len(receiver.peers.linked) < count:  # noqa: ASYNC110 - only the first link is announced
            await asyncio.sleep(0.01)


class _Caller:
    """Asks for items that nobody has asked for before."""

    def __init__(self, rows: int) -> None:
        self.receiver: RowReceiver
        self._rows = rows
        self._numbers = count(1)
        self._done: dict[ItemKey, asyncio.Future[None]] = {}

    def ended(self, key: ItemKey, failed: Fail | None) -> None:
        done = self._done.pop(key)
        if failed is None:
            done.set_result(None)
        else:
            done.set_exception(ItemFailed(f"{failed.code}: {failed.message}"))

    async def _ask(self, due: float | None = None) -> float:
        """Seconds until an item is here: since ``due``, on ``perf_counter``, or from now."""
        number = next(self._numbers)
        key, done = ItemKey(number, 0), asyncio.get_running_loop().create_future()
        self._done[key] = done
        began = time.perf_counter() if due is None else due
        self.receiver.request([(key, item_of(number, self._rows))], TIMEOUT_S)
        await done
        return time.perf_counter() - began

    async def closed(self, requests: int, concurrency: int) -> list[float]:
        """Latencies in seconds with ``concurrency`` requests at a time."""
        found: list[float] = []
        work = iter(range(requests))

        async def in_turn() -> None:
            for _ in work:
                found.append(await self._ask())

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(in_turn())
        return found

    async def opened(self, requests: int, rate_per_s: float, seed: int) -> list[float]:
        """Latencies in seconds of Poisson arrivals, from when each was due, also if this loop was late."""
        clock, asked = Clock(), []
        began, due = clock.now(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for at in islice(Gamma(rate_per_s).arrivals(Random(seed)), requests):
                await clock.until(began + at)
                asked.append(group.create_task(self._ask(due + at)))
        return [task.result() for task in asked]
