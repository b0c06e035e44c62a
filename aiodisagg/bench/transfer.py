"""A receiver of synthetic items in this process, and its sender in another: what ``bench resume`` measures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np

from aiodisagg.bench.counters import row_bytes
from aiodisagg.bench.synthetic import fill, item_of, stamps, synthetic_model
from aiodisagg.demo.cluster import Cluster
from aiodisagg.errors import AiodisaggError
from aiodisagg.language.rows import RowReceiver
from aiodisagg.peer.config import LanguageConfig
from aiodisagg.protocol.events import Fail
from aiodisagg.protocol.messages import ItemKey
from aiodisagg.protocol.rows import RowLayout

TIMEOUT_S = 300.0


class WrongRows(AiodisaggError):
    """What arrived is not what was sent."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One transfer, and what the sender counted as sent again."""

    seconds: float
    resent_bytes: int


@dataclass(slots=True)
class _Run:
    """A transfer under way; ``marks``: rows after whose arrival the link is cut, in falling order."""

    seed: int
    rows: int
    done: asyncio.Future[None]
    at: int
    marks: list[int]
    arrived: int = 0


class Transfers:
    """Fetches items whose rows are ready at the sender and cuts the link on the way.

    ``found``: uint8 [max_rows, row_bytes], where rows arrive. Items side by side lie one behind the other.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, metrics_url: str, max_rows: int, row_bytes: int) -> None:
        self.found = np.ones((max_rows, row_bytes), np.uint8)  # ones: every page is there before it is timed
        self.receiver: RowReceiver
        self.peak_blocks = 0
        self._metrics_url = metrics_url
        self._runs: dict[ItemKey, _Run] = {}
        self._rooms = 0
        self._loop = loop

    def deliver(self, key: ItemKey, start: int, data: object) -> None:
        """On a thread."""
        assert isinstance(data, memoryview)  # the pool is memory of this host
        run, row_bytes = self._runs[key], self.found.shape[1]
        rows = data.nbytes // row_bytes
        np.copyto(self.found[run.at + start : run.at + start + rows], np.frombuffer(data, np.uint8).reshape(rows, -1))
        self._loop.call_soon_threadsafe(self._arrived, run, rows)

    def _arrived(self, run: _Run, rows: int) -> None:
        run.arrived += rows
        pool = self.receiver.pool
        self.peak_blocks = max(self.peak_blocks, pool.blocks - pool.free)
        if run.marks and run.arrived >= run.marks[-1]:
            run.marks.pop()
            for peer in self.receiver.peers.linked:
                if peer.link is not None:
                    peer.link.abort()

    def ended(self, key: ItemKey, failed: Fail | None) -> None:
        done = self._runs[key].done
        if failed is None:
            done.set_result(None)
        else:
            done.set_exception(WrongRows(f"{failed.code}: {failed.message} ({'; '.join(failed.story)})"))

    async def fetch(self, rows: int, *, cuts: int = 0, items: int = 1, whole: bool = False) -> Timed:
        """Transfers ``items`` of ``rows`` rows; the link is cut ``cuts`` times, evenly spread over the first.

        The stamp of every row is checked, all bytes of ``whole`` items. Raises WrongRows.
        """
        self.found[: items * rows, :8] = 0
        self._rooms += 1
        marks = [rows * i // (cuts + 1) for i in range(cuts, 0, -1)]
        runs = {
            ItemKey(self._rooms, i): _Run(i + 1, rows, self._loop.create_future(), i * rows, marks if not i else [])
            for i in range(items)
        }
        self._runs |= runs
        resent = await self._resent()
        began = time.perf_counter()
        for key, run in runs.items():
            self.receiver.request([(key, item_of(run.seed, rows))], TIMEOUT_S)
        await asyncio.gather(*(run.done for run in runs.values()))
        seconds = time.perf_counter() - began
        for key, run in runs.items():
            del self._runs[key]
            await asyncio.to_thread(self._check, run, whole)
        if marks:
            raise WrongRows(f"{len(marks)} cuts were never made")
        return Timed(seconds, await self._resent() - resent)

    def _check(self, run: _Run, whole: bool) -> None:
        rows = self.found[run.at : run.at + run.rows]
        wrong = np.flatnonzero((rows[:, :8] != stamps(run.seed, run.rows)).any(1))
        if wrong.size:
            raise WrongRows(f"{wrong.size} of {run.rows} rows are wrong, the first is {wrong[0]}")
        if whole:
            right = np.empty_like(rows)
            fill(right, run.seed)
            if not np.array_equal(rows, right):
                raise WrongRows("bytes differ")

    async def _resent(self) -> int:
        async with aiohttp.ClientSession() as session, session.get(f"{self._metrics_url}/metrics") as response:
            return int(row_bytes(await response.text(), "resent"))

    def copy(self, rows: int) -> float:
        """Seconds of one bare copy of as many bytes on one thread; the limit of anything that copies."""
        source = np.ones_like(self.found[:rows])
        began = time.perf_counter()
        np.copyto(self.found[:rows], source)
        return time.perf_counter() - began


@asynccontextmanager
async def transfers(
    transport: str, *, max_rows: int, hidden: int, levels: int, pool_rows: int, block_rows: int, window_blocks: int,
    cluster: Cluster, name: str = "source",
) -> AsyncIterator[Transfers]:  # fmt: skip
    """A sender in a process of its own, started in ``cluster``, and a receiver here, linked.

    ``max_rows``: of what is fetched at once; the sender keeps as much.
    """
    model = synthetic_model(hidden, levels)
    row_bytes = RowLayout.of(model).row_bytes
    options = ("--hidden", str(hidden), "--levels", str(levels), "--transports", transport)
    source_mib = str((max_rows * row_bytes >> 20) + 1)
    source = await cluster.start(name, "bench", "source", *options, "--source-mib", source_mib)
    made = await asyncio.to_thread(Transfers, asyncio.get_running_loop(), source.facts["url"], max_rows, row_bytes)
    config = LanguageConfig(
        model=Path.cwd(),
        transports=(transport,),
        pool_bytes=pool_rows * row_bytes,
        block_rows=block_rows,
        window_blocks=window_blocks,
        failover_s=TIMEOUT_S,
        cache_bytes=0,
    )
    async with RowReceiver(config, model, name="bench", deliver=made.deliver, ended=made.ended) as made.receiver:
        made.receiver.peers.add(source.facts["address"])
        await made.receiver.peers.wait_any(TIMEOUT_S)
        yield made
