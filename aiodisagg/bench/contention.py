"""Transfers that are not alone: a small one beside a huge one, a receiver whose GIL is wanted, a network that loses."""

from __future__ import annotations

import asyncio
import statistics

import msgspec

from aiodisagg.bench.network import Namespace
from aiodisagg.bench.partner import Done, Hog, Partner
from aiodisagg.bench.paths import Paths
from aiodisagg.bench.serve_metrics import percentile
from aiodisagg.peer.config import MiB
from aiodisagg.transport import chunks, copying, mooncake, stream

CHUNK_BYTES = {
    "ipc": copying.PIECE_BYTES,
    "stream": stream.CHUNK_BYTES,
    "zmq": chunks.CHUNK_BYTES,
    "mooncake-tcp": mooncake.TCP_CHUNK_BYTES,
    "mooncake": mooncake.RDMA_CHUNK_BYTES,
}
SMALL_BYTES = MiB
DELAY_MS, LOSS_PERCENT = 20, 1


class Fair(msgspec.Struct, frozen=True):
    """Writes of 1 MiB alone and beside writes of ``huge_bytes``, in milliseconds."""

    path: str
    huge_bytes: int
    alone_p50_ms: float
    alone_p99_ms: float
    beside_p50_ms: float
    beside_p99_ms: float
    chunk_ms: float
    """One chunk of the huge write, at the speed it has alone."""

    @property
    def limit_ms(self) -> float:
        """Three times its time alone, and one chunk."""
        return 3 * self.alone_p50_ms + self.chunk_ms


class Hogged(msgspec.Struct, frozen=True):
    """Rates in GiB/s, medians, while the receiver's GIL is free and while a thread in pure Python wants it, too."""

    path: str
    size_bytes: int
    free_gib_s: float
    hogged_gib_s: float


class Crossed(msgspec.Struct, frozen=True):
    """A transfer between two namespaces, whose bytes were compared."""

    path: str
    size_bytes: int
    delay_ms: int
    loss_percent: int
    seconds: float


async def fairness(paths: Paths, runs: int, count: int) -> list[Fair]:
    """``count`` small writes alone and as many beside, in ``runs`` turns of both."""
    huge_bytes = paths.pool_bytes // 2
    each = max(2, count // runs)
    found = []
    for name, path in paths.transports.items():
        at = paths.pool_bytes - SMALL_BYTES
        await path.run([(0, huge_bytes)], 1)
        huge_s = await path.run([(0, huge_bytes)], 1)
        alone: list[float] = []
        beside: list[float] = []
        for _ in range(runs):
            alone += [1000 * await path.run([(at, SMALL_BYTES)], 1) for _ in range(each)]
            huge = asyncio.ensure_future(path.run([(0, huge_bytes)], 1_000_000))
            try:
                beside += [1000 * await path.run([(at, SMALL_BYTES)], 1) for _ in range(each)]
            finally:
                huge.cancel()
                await asyncio.wait([huge])
            await path.transport.fence(path.remote)
        found.append(
            Fair(
                name, huge_bytes, statistics.median(alone), percentile(sorted(alone), 99), statistics.median(beside),
                percentile(sorted(beside), 99),
                1000 * huge_s * min(1.0, CHUNK_BYTES[name] / huge_bytes),
            )
        )  # fmt: skip
    return found


async def hogged(paths: Paths, sizes: tuple[int, ...], runs: int, budget_bytes: int) -> list[Hogged]:
    """One thread of the receiving process computes, or none, in turns."""
    found = []
    for size in sizes:
        times = max(1, min(64, budget_bytes // size))
        rates: dict[tuple[str, int], list[float]] = {}
        for _ in range(runs):
            for threads in (0, 1):
                await paths.partner.ask(Hog(threads), Done)
                for name, path in paths.transports.items():
                    seconds = await path.run([(0, size)], times)
                    rates.setdefault((name, threads), []).append(size * times / seconds / 2**30)
        await paths.partner.ask(Hog(0), Done)
        found += [
            Hogged(name, size, statistics.median(rates[name, 0]), statistics.median(rates[name, 1]))
            for name in paths.transports
        ]
    return found


async def two_hosts(size_bytes: int, congestion: str) -> list[Crossed]:
    """Namespaces stand for hosts. Raises NetworkUnavailable where they cannot be made, WrongBytes if a byte differs."""
    names = ("stream", "zmq", "mooncake-tcp")
    async with Namespace(congestion=congestion) as network, Partner(network.exec) as partner:
        await network.spoil(DELAY_MS, LOSS_PERCENT)
        async with Paths(
            partner, size_bytes, names=names, here=network.here, there=network.there, limits=False
        ) as paths:
            return [
                Crossed(name, size_bytes, DELAY_MS, LOSS_PERCENT, await paths.check(name, size_bytes))
                for name in paths.transports
            ]
