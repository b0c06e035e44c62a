"""What an interruption costs, and what blocks save: transfers that are cut, each beside one that is not.

The sender is a process of its own and has the rows ready before anything is timed, so what is timed is the exchange,
the copies and the checksums. Every interruption cuts the control link, evenly spread over the transfer; the receiver
dials again and states its ledger. Runs of all kinds take turns, so that what else the machine does hits all of them.
"""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import psutil

from aiodisagg.bench.transfer import Timed, Transfers, transfers
from aiodisagg.demo.cluster import Cluster
from aiodisagg.peer.config import MiB
from aiodisagg.transport.arena import POOL_NAME

INTERRUPTED = (20_000, 50_000, 100_000)
SIZES = (1_024, 4_096, 16_384, 32_768, 65_536)
CUTS = (1, 2, 5)


@dataclass(frozen=True, slots=True)
class ResumeOptions:
    """Rows of 16 KiB: the (1+3) * 2048 bf16 elements of Qwen3-VL-30B-A3B."""

    transport: str = "ipc"
    repeats: int = 5
    quick: bool = False
    hidden: int = 2048
    levels: int = 3
    block_rows: int = 256
    pool_mib: int = 64
    window_blocks: int = 4

    @property
    def row_bytes(self) -> int:
        return (1 + self.levels) * self.hidden * 2

    @property
    def scale(self) -> int:
        """Quick runs move a fiftieth of the rows, in blocks of eight."""
        return 50 if self.quick else 1


class Resumed(msgspec.Struct, frozen=True):
    """Transfers of one size with some interruptions. Seconds are medians; overheads are of pairs of one round."""

    rows: int
    size_bytes: int
    interruptions: int
    seconds: float
    undisturbed_s: float
    bare_copy_s: float
    overhead_s: float
    overhead_percent: float
    resent_bytes: int
    """The most of any round."""
    chunk_bytes: int
    runs_s: list[float]
    undisturbed_runs_s: list[float]


class Memory(msgspec.Struct, frozen=True):
    """Memory for rows on their way when ``requests`` items of ``rows`` rows arrive at once."""

    kind: str
    requests: int
    rows: int
    pool_bytes: int
    resident_bytes: int | None
    """Of the pool; None: computed, not run."""
    peak_bytes: int | None
    """Most that was lent at one moment."""
    seconds: float | None


class ResumeReport(msgspec.Struct, frozen=True):
    transport: str
    repeats: int
    row_bytes: int
    block_rows: int
    pool_bytes: int
    machine: str
    resumed: list[Resumed]
    memory: list[Memory]


async def bench_resume(options: ResumeOptions, say: Callable[[str], None] = lambda text: None) -> ResumeReport:
    """Runs everything. Raises WrongRows if a single row is not what was sent, ProcessEnded if the sender ends."""
    scale = options.scale
    block_rows = max(8, options.block_rows // scale)
    pool_rows = options.pool_mib * MiB // options.row_bytes // (4 if options.quick else 1)
    plan = [(rows // scale, (0, *CUTS)) for rows in INTERRUPTED] + [(rows // scale, (0, 1)) for rows in SIZES]
    resumed: list[Resumed] = []
    async with Cluster() as cluster:
        async with transfers(
            options.transport, max_rows=max(rows for rows, _ in plan), hidden=options.hidden, levels=options.levels,
            pool_rows=pool_rows, block_rows=block_rows, window_blocks=options.window_blocks, cluster=cluster,
        ) as made:  # fmt: skip
            for rows, cuts in plan:
                resumed += await _measure(made, rows, cuts, options, block_rows)
                for one in resumed[1 - len(cuts) :]:
                    say(f"{one.rows} rows, {one.interruptions} cuts: {one.seconds:.3f} s, {one.overhead_s:+.3f} s")
        memory = await _memory(options, cluster, block_rows, pool_rows)
    machine = (
        f"{os.cpu_count()} CPUs {platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}"
    )
    return ResumeReport(
        options.transport, options.repeats, options.row_bytes, block_rows, pool_rows * options.row_bytes, machine,
        resumed, memory,
    )  # fmt: skip


async def _measure(
    made: Transfers, rows: int, cuts: tuple[int, ...], options: ResumeOptions, block_rows: int
) -> list[Resumed]:
    await made.fetch(rows, whole=True)  # encodes; the source stays
    runs: dict[int, list[Timed]] = {n: [] for n in cuts}
    copies = []
    for turn in range(options.repeats):
        copies.append(await asyncio.to_thread(made.copy, rows))
        for n in cuts[turn % len(cuts) :] + cuts[: turn % len(cuts)]:
            runs[n].append(await made.fetch(rows, cuts=n))
    await made.fetch(rows, cuts=max(cuts), whole=True)
    plain = [run.seconds for run in runs[0]]
    found = []
    for n in cuts:
        if not n:
            continue
        seconds = [run.seconds for run in runs[n]]
        over = statistics.median(a - b for a, b in zip(seconds, plain, strict=True))
        found.append(
            Resumed(
                rows, rows * options.row_bytes, n, statistics.median(seconds), statistics.median(plain),
                statistics.median(copies), over, 100 * over / statistics.median(plain),
                max(run.resent_bytes for run in runs[n]), block_rows * options.row_bytes, seconds, plain,
            )
        )  # fmt: skip
    return found


async def _memory(options: ResumeOptions, cluster: Cluster, block_rows: int, pool_rows: int) -> list[Memory]:
    """Eight requests at once, with a buffer of the largest size for each, and through the pool of blocks."""
    row_bytes, scale = options.row_bytes, options.scale
    requests, rows, largest = 8, 2_048 // min(scale, 16), 16_384 // scale
    found = []
    kinds = (
        ("fixed buffers", requests * largest, largest, 1),
        ("blocks", pool_rows, block_rows, options.window_blocks),
    )
    for kind, rows_of_pool, rows_of_block, window in kinds:
        async with transfers(
            options.transport, max_rows=requests * rows, hidden=options.hidden, levels=options.levels,
            pool_rows=rows_of_pool, block_rows=rows_of_block, window_blocks=window, cluster=cluster, name=kind,
        ) as made:  # fmt: skip
            await made.fetch(rows, items=requests, whole=True)
            runs = [await made.fetch(rows, items=requests) for _ in range(options.repeats)]
            grown = sum(m.rss for m in psutil.Process().memory_maps() if POOL_NAME in m.path)
            seconds = statistics.median(run.seconds for run in runs)
            peak = made.peak_blocks * rows_of_block * row_bytes
            found.append(Memory(kind, requests, rows, rows_of_pool * row_bytes, grown, peak, seconds))
    for many in (8, 64, 200):
        found.append(Memory("fixed buffers", many, 100_000, many * 100_000 * row_bytes, None, None, None))
        found.append(Memory("blocks", many, 100_000, options.pool_mib * MiB, None, None, None))
    return found
