"""From encoded files to packed rows, off the event loop: prepare (CPU threads), then the tower (one thread, batched).

The stages run at the same time. Between them lie at most ``2 * batch_patches`` prepared patches: at that bound
preparing waits, and what waits before it is bounded by the source table, which admits jobs only as memory allows.
An item of more than ``batch_patches`` patches runs in a batch of its own. A batch that fails is run again item by
item, so that one bad item fails alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from aiodisagg.errors import AiodisaggError, MediaError
from aiodisagg.models.base import ItemKind, Patches, VisionEncoder
from aiodisagg.peer.driver import Tasks
from aiodisagg.protocol.events import EncodeStopped, RowsReady, StageEntered, StartEncode

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PipelineEvent = StageEntered | RowsReady | EncodeStopped


@dataclass(slots=True)
class _Job:
    start: StartEncode
    since: float
    patches: Patches | None = None
    cancelled: bool = False


class EncodePipeline:
    """Encodes jobs and holds their rows until ``drop``. An async context manager; methods belong to the loop's thread.

    Args:
        encoder: the encode half; ``encode`` is called on one thread only.
        tell: gets StageEntered (``preparing``, ``encoding``), then RowsReady with all rows, or EncodeStopped.
        batch_patches: patch budget of a tower batch.
    """

    def __init__(
        self, encoder: VisionEncoder, tell: Callable[[PipelineEvent], None], *, batch_patches: int, prepare_threads: int
    ) -> None:
        self.encoder, self._tell, self._budget = encoder, tell, batch_patches
        self.batch_sizes: Counter[int] = Counter()
        """Tower batches by how many items were in them."""
        self.items_encoded = 0
        self.tower_s = 0.0
        self._jobs: dict[str, _Job] = {}
        self._rows: dict[str, torch.Tensor] = {}
        self._prepared: deque[_Job] = deque()
        self._prepared_patches = 0
        self._room = asyncio.Condition()
        self._slots = asyncio.Semaphore(prepare_threads)
        self._prepare_pool = ThreadPoolExecutor(prepare_threads, "aiodisagg-prepare")
        self._tower_pool = ThreadPoolExecutor(1, "aiodisagg-tower")
        self._tasks = Tasks("encode")

    async def __aenter__(self) -> EncodePipeline:
        self._tasks.start(self._run_tower(), "tower")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._tasks.aclose()
        await asyncio.to_thread(self._prepare_pool.shutdown, cancel_futures=True)
        await asyncio.to_thread(self._tower_pool.shutdown, cancel_futures=True)
        self._rows.clear()

    @property
    def waiting(self) -> int:
        """Jobs that have no rows yet."""
        return len(self._jobs)

    def start(self, job: StartEncode) -> None:
        self._jobs[job.digest] = entry = _Job(job, time.monotonic())
        self._tasks.start(self._prepare(entry), f"prepare {job.digest}")

    def cancel(self, digest: str) -> None:
        """Stops a job as early as possible; one that is in the tower finishes there."""
        entry = self._jobs.get(digest)
        if entry is not None:
            entry.cancelled = True
            if entry in self._prepared:
                self._prepared.remove(entry)
                assert entry.patches is not None
                self._prepared_patches -= entry.patches.count
                self._stop(entry, "cancelled", "nobody wants it any more", retryable=True)

    def rows(self, digest: str, start: int, stop: int) -> memoryview:
        """Bytes of packed rows ``[start, stop)``. Valid until ``drop``. Raises KeyError before they are ready."""
        import torch

        rows = self._rows[digest][start:stop]
        return rows.view(torch.uint8).numpy().data.cast("B")

    def drop(self, digest: str) -> None:
        self._rows.pop(digest, None)

    async def _prepare(self, entry: _Job) -> None:
        loop, job = asyncio.get_running_loop(), entry.start
        async with self._slots:
            if not self._still_wanted(entry):
                return
            self._enter(entry, "preparing")
            async with self._room:
                await self._room.wait_for(lambda: self._prepared_patches < 2 * self._budget)
            try:
                entry.patches = await loop.run_in_executor(
                    self._prepare_pool, self.encoder.prepare, ItemKind(job.kind), job.media, job.grid_thw, job.fps
                )
            except MediaError as error:
                self._stop(entry, "invalid_media", str(error), retryable=False)
                return
            except Exception as error:
                logger.exception("item %s: preparing failed", job.digest)
                self._stop(entry, "prepare_failed", f"{type(error).__name__}: {error}", retryable=True)
                return
        if self._still_wanted(entry):
            self._prepared.append(entry)
            self._prepared_patches += entry.patches.count
            async with self._room:
                self._room.notify_all()

    def _still_wanted(self, entry: _Job) -> bool:
        if entry.cancelled:
            self._stop(entry, "cancelled", "nobody wants it any more", retryable=True)
        return not entry.cancelled

    def _enter(self, entry: _Job, stage: str) -> None:
        now = time.monotonic()
        self._tell(StageEntered(entry.start.digest, stage, now - entry.since))
        entry.since = now

    def _stop(self, entry: _Job, code: str, message: str, *, retryable: bool) -> None:
        del self._jobs[entry.start.digest]
        self._tell(EncodeStopped(entry.start.digest, code, message, retryable))

    async def _run_tower(self) -> None:
        while True:
            async with self._room:
                await self._room.wait_for(lambda: bool(self._prepared))
            batch = self._next_batch()
            for entry in batch:
                self._enter(entry, "encoding")
            await self._encode(batch)
            async with self._room:
                self._room.notify_all()

    def _next_batch(self) -> list[_Job]:
        batch: list[_Job] = []
        patches = 0
        while self._prepared:
            assert self._prepared[0].patches is not None
            size = self._prepared[0].patches.count
            if batch and patches + size > self._budget:
                break
            batch.append(self._prepared.popleft())
            patches += size
        self._prepared_patches -= patches
        return batch

    async def _encode(self, batch: Sequence[_Job]) -> None:
        began = time.monotonic()
        try:
            results = await self._call_tower([entry.patches for entry in batch if entry.patches is not None])
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    await self._encode([entry])
                return
            logger.exception("item %s: the tower failed", batch[0].start.digest)
            what = str(error) if isinstance(error, AiodisaggError) else f"{type(error).__name__}: {error}"
            self._stop(batch[0], "encode_failed", what, retryable=True)
            return
        self.tower_s += time.monotonic() - began
        self.batch_sizes[len(batch)] += 1
        self.items_encoded += len(batch)
        for entry, rows in zip(batch, results, strict=True):
            self._finish(entry, rows)

    async def _call_tower(self, patches: list[Patches]) -> list[torch.Tensor]:
        return await asyncio.get_running_loop().run_in_executor(self._tower_pool, self._encode_to_host, patches)

    def _encode_to_host(self, patches: list[Patches]) -> list[torch.Tensor]:
        return [rows.to("cpu").contiguous() for rows in self.encoder.encode(patches)]

    def _finish(self, entry: _Job, rows: torch.Tensor) -> None:
        job, width = entry.start, self.encoder.layout.width
        entry.patches = None
        if tuple(rows.shape) != (job.rows, width):
            said = f"the encoder made {tuple(rows.shape)}, the plan says ({job.rows}, {width})"
            self._stop(entry, "wrong_shape", said, retryable=False)
            return
        del self._jobs[job.digest]
        self._rows[job.digest] = rows
        self._tell(StageEntered(job.digest, "encoded", time.monotonic() - entry.since))
        self._tell(RowsReady(job.digest, job.rows))
