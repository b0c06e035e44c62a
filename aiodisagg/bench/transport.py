"""What every transport of this machine reaches, beside what its bytes would cost with nothing else done to them.

Two processes. In each round every transport and its bare limit move the same bytes once, one after the other in
changing order, so that what else the machine does hits all of them; ratios are taken within a round.
"""

from __future__ import annotations

import asyncio
import gc
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as File

import msgspec

from aiodisagg.bench.contention import Crossed, Fair, Hogged, fairness, hogged, two_hosts
from aiodisagg.bench.exchange import Latency, hand_offs, round_trips
from aiodisagg.bench.network import CONGESTION, NetworkUnavailable
from aiodisagg.bench.partner import Ask, Partner
from aiodisagg.bench.paths import LIMITS, Path, Paths
from aiodisagg.bench.watch import QUIET, Held, LoopWatch
from aiodisagg.errors import ConfigError
from aiodisagg.peer.config import MiB
from aiodisagg.transport import past_caches

HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
SECTIONS = ("sizes", "handoff", "link", "fairness", "gil", "hosts")
CONCURRENT = (1, 8)


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """``only``: which sections to run. ``quick``: shows that it works, not how fast."""

    only: tuple[str, ...] = SECTIONS
    runs: int = 5
    quick: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size << 10 for size in ((64, 1024, 16384) if self.quick else (64, 1024, 16384, 262144, 1048576)))

    @property
    def pool_bytes(self) -> int:
        """Concurrent writes of more than that share ranges, and bring the same bytes there."""
        return 128 * MiB if self.quick else 2048 * MiB

    @property
    def sample_bytes(self) -> int:
        """Small sizes are repeated until a sample moves so much, at most 64 times."""
        return 16 * MiB if self.quick else 256 * MiB


class Moved(msgspec.Struct, frozen=True):
    """Transfers of one size by one path; seconds are of one round of ``concurrent`` transfers, rates are medians."""

    path: str
    limit: str
    size_bytes: int
    concurrent: int
    runs_s: list[float]
    limit_runs_s: list[float]
    gib_s: float
    limit_gib_s: float
    of_limit: float
    """Median of the rounds' ratios."""


class Loop(msgspec.Struct, frozen=True):
    """How long the loops were held at worst while a path moved bytes. ``path`` "idle": nothing moved; the control."""

    path: str
    writer: Held
    receiver: Held


class TransportReport(msgspec.Struct, frozen=True):
    machine: str
    congestion: str
    runs: int
    missing: dict[str, str] = {}
    """Transports that do not work here, and why."""
    moved: list[Moved] = []
    loops: list[Loop] = []
    latencies: list[Latency] = []
    fair: list[Fair] = []
    hogged: list[Hogged] = []
    crossed: list[Crossed] = []


async def bench_transport(options: TransportOptions, say: Callable[[str], None]) -> TransportReport:
    """Runs the sections asked for.

    Raises:
        WrongBytes: a byte is not what was sent.
        PartnerEnded: the receiving process ended.
        NetworkUnavailable: ``hosts`` is the only section asked for and namespaces or netem are not there.
    """
    machine, congestion = _machine()
    say(machine)
    found = TransportReport(machine, congestion, options.runs)
    loops: dict[str, Loop] = {}
    only = set(options.only)
    if only - {"hosts"}:
        async with Partner() as partner, Paths(partner, options.pool_bytes, limits="sizes" in only) as paths:
            found.missing.update(paths.missing)
            if "link" in only:
                say("link")
                found.latencies.extend(await round_trips(partner, 500 if options.quick else 5000))
            if "handoff" in only:
                say("handoff")
                sizes = tuple(size for size in options.sizes if size <= paths.pool_bytes)
                count = 50 if options.quick else 300
                found.latencies.extend(await hand_offs(partner, paths.transports["ipc"], sizes, count))
            if "sizes" in only:
                for size in options.sizes:
                    for concurrent in CONCURRENT:
                        say(f"{size >> 10} KiB, {concurrent} at once")
                        found.moved.extend(await _measure(paths, size, concurrent, options, loops))
                for name in paths.transports:
                    await paths.check(name, paths.pool_bytes // 2)
                found.loops.extend(loops.values())
            if "fairness" in only:
                say("fairness")
                found.fair.extend(await fairness(paths, options.runs, 50 if options.quick else 300))
            if "gil" in only:
                say("gil")
                sizes = tuple(size * MiB for size in ((1, 16) if options.quick else (1, 16, 256)))
                found.hogged.extend(await hogged(paths, sizes, options.runs, options.sample_bytes))
    if "hosts" in only:
        say("hosts")
        try:
            found.crossed.extend(await two_hosts((1 if options.quick else 16) * MiB, congestion))
        except NetworkUnavailable as error:
            if only == {"hosts"}:
                raise
            found.missing["hosts"] = str(error)
    return found


def _machine() -> tuple[str, str]:
    """This machine in words, and TCP's congestion control."""
    congestion = File(CONGESTION).read_text().strip()
    load = f"load {os.getloadavg()[0]:.1f} before"
    software = f"Linux {platform.release()}, Python {platform.python_version()}, TCP {congestion}"
    huge = File(HUGE_PAGES).read_text() if File(HUGE_PAGES).exists() else "[none]"
    memory = f"huge pages {huge.partition('[')[2].partition(']')[0]}"
    if tunables := os.environ.get("GLIBC_TUNABLES"):
        memory += f", {tunables}"
    memory += ", libpmem" if past_caches.load() else ", no libpmem"
    return f"{os.cpu_count()} CPUs {platform.machine()}, {software}, {memory}, {load}", congestion


async def _measure(
    paths: Paths, size: int, concurrent: int, options: TransportOptions, loops: dict[str, Loop]
) -> list[Moved]:
    ranges = [(i * size % paths.pool_bytes, size) for i in range(concurrent)]
    warm = [(0, min(size, paths.pool_bytes, 64 * MiB))]
    times = max(1, min(64, options.sample_bytes // (size * concurrent)))
    turns: list[tuple[str, Path, bool]] = []
    for name in paths.transports:
        turns += [(name, paths.limits[name], True), (name, paths.transports[name], False)]
    runs: dict[tuple[str, bool], list[float]] = {}
    gc.collect()  # a source of an earlier section that went in the middle would hold the loop for 0.1 s
    watch = LoopWatch()
    try:
        for turn in range(options.runs):
            at = turn * 2 % len(turns)
            for name, path, bare in turns[at:] + turns[:at]:
                await path.run(warm, 1)
                watch.take()
                await paths.partner.ask(Ask(), Held)
                seconds = await path.run(ranges, times)
                runs.setdefault((name, bare), []).append(seconds / times)
                if not bare:
                    await _note(loops, name, paths, watch)
            watch.take()
            await paths.partner.ask(Ask(), Held)
            await asyncio.sleep(0.1)
            await _note(loops, "idle", paths, watch)
    finally:
        watch.close()
    total = size * concurrent
    found = []
    for name in paths.transports:
        mine, limit = runs[name, False], runs[name, True]
        found.append(
            Moved(
                name, LIMITS[name], size, concurrent, mine, limit,
                total / statistics.median(mine) / 2**30, total / statistics.median(limit) / 2**30,
                statistics.median(b / a for a, b in zip(mine, limit, strict=True)),
            )
        )  # fmt: skip
    return found


async def _note(loops: dict[str, Loop], name: str, paths: Paths, watch: LoopWatch) -> None:
    """Both loops' worst since they were asked last."""
    writer = watch.take()
    receiver = await paths.partner.ask(Ask(), Held)
    before = loops.get(name, Loop(name, QUIET, QUIET))
    loops[name] = Loop(name, before.writer.worse(writer), before.receiver.worse(receiver))


def read_report(file: File) -> TransportReport:
    """What ``--json`` wrote. Raises ConfigError."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=TransportReport)
    except msgspec.MsgspecError as error:
        raise ConfigError("read", f"{file} is no report of bench transport: {error}") from error
