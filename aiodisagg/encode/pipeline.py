"""From encoded files to packed rows, off the event loop: prepare (CPU threads), then the tower (one thread, batched).

The stages run at the same time. Between them lie at most ``2 * batch_patches`` prepared patches: at that bound
preparing waits, and what waits before it is bounded by the source table, which admits jobs only as memory allows.
An item of more than ``batch_patches`` patches runs in a batch of its own. A batch that fails is run again item by
item, so that one bad item fails alone.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from aiodisagg.device.copies import DeviceBytes
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
    waiting: asyncio.Task[None] | None = None
    """Its preparing, until that runs on a thread: so far it may simply be cancelled."""


class EncodePipeline:
    """Encodes jobs and holds their rows until ``drop``. An async context manager; methods belong to the loop's thread.

    Args:
        encoder: the encode half; ``encode`` is called on one thread only.
        tell: gets StageEntered (``preparing``, ``prepared``, ``encoding``, ``encoded``), then RowsReady with all
            rows, or EncodeStopped.
        batch_patches: patch budget of a tower batch.
        keep_on_device: leave the rows where the tower made them; else they are brought to the host at once.
    """

    def __init__(
        self, encoder: VisionEncoder, tell: Callable[[PipelineEvent], None], *, batch_patches: int,
        prepare_threads: int, keep_on_device: bool = False,
    ) -> None:  # fmt: skip
        self._keep_on_device = keep_on_device
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
        entry.waiting = self._tasks.start(self._prepare(entry), f"prepare {job.digest}")

    def cancel(self, digest: str) -> None:
        """Stops a job at once while it waits; one that is on a thread when that is done with it."""
        entry = self._jobs.get(digest)
        if entry is None:
            return
        entry.cancelled = True
        if entry.waiting is not None:
            entry.waiting.cancel()
            self._still_wanted(entry)
        elif entry in self._prepared:
            self._prepared.remove(entry)
            assert entry.patches is not None
            self._prepared_patches -= entry.patches.count
            self._still_wanted(entry)
            self._tasks.start(self._wake(), "room")

    def rows(self, digest: str, start: int, stop: int) -> memoryview | DeviceBytes:
        """Bytes of packed rows ``[start, stop)``. Valid until ``drop``. Raises KeyError before they are ready."""
        import torch

        rows = self._rows[digest][start:stop]
        if self._keep_on_device:
            return DeviceBytes(rows.data_ptr(), rows.nbytes, rows)
        return rows.view(torch.uint8).numpy().data.cast("B")

    def drop(self, digest: str) -> None:
        self._rows.pop(digest, None)

    async def _prepare(self, entry: _Job) -> None:
        async with self._slots:
            async with self._room:
                await self._room.wait_for(lambda: self._prepared_patches < 2 * self._budget)
            entry.waiting = None
            self._enter(entry, "preparing")
            try:
                patches = await self._call_prepare(entry.start)
            except MediaError as error:
                self._stop(entry, "invalid_media", str(error), retryable=False)
                return
            except Exception as error:
                logger.exception("item %s: preparing failed", entry.start.digest)
                self._stop(entry, "prepare_failed", f"{type(error).__name__}: {error}", retryable=True)
                return
        if self._still_wanted(entry):
            self._enter(entry, "prepared")
            entry.patches = patches
            self._prepared.append(entry)
            self._prepared_patches += patches.count
        await self._wake()

    async def _call_prepare(self, job: StartEncode) -> Patches:
        call = functools.partial(self.encoder.prepare, ItemKind(job.kind), job.media, job.grid_thw, job.fps)
        return await asyncio.get_running_loop().run_in_executor(self._prepare_pool, call)

    async def _wake(self) -> None:
        """There are prepared patches, or there is room for more."""
        async with self._room:
            self._room.notify_all()

    def _tell_of(self, event: PipelineEvent) -> None:
        """A job that the listener has no place for must not stop the others."""
        try:
            self._tell(event)
        except Exception:
            logger.exception("%r was refused", event)

    def _still_wanted(self, entry: _Job) -> bool:
        if entry.cancelled:
            self._stop(entry, "cancelled", "nobody wants it any more", retryable=True)
        return not entry.cancelled

    def _enter(self, entry: _Job, stage: str) -> None:
        now = time.monotonic()
        self._tell_of(StageEntered(entry.start.digest, stage, now - entry.since))
        entry.since = now

    def _stop(self, entry: _Job, code: str, message: str, *, retryable: bool) -> None:
        del self._jobs[entry.start.digest]
        self._tell_of(EncodeStopped(entry.start.digest, code, message, retryable))

    async def _run_tower(self) -> None:
        while True:
            async with self._room:
                await self._room.wait_for(lambda: bool(self._prepared))
            batch = self._next_batch()
            for entry in batch:
                self._enter(entry, "encoding")
            await self._wake()
            await self._encode(batch)

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
            if len(results) != len(batch):
                raise RuntimeError(f"the encoder made {len(results)} tensors of {len(batch)} items")
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
        return await asyncio.get_running_loop().run_in_executor(self._tower_pool, self._encode_rows, patches)

    def _encode_rows(self, patches: list[Patches]) -> list[torch.Tensor]:
        """On the tower's thread. The rows exist when this returns: copies on other streams need not wait for them."""
        import torch

        if not self._keep_on_device:
            return [_alone(rows.to("cpu")) for rows in self.encoder.encode(patches)]
        made = [_alone(rows) for rows in self.encoder.encode(patches)]
        if made and made[0].is_cuda:
            torch.cuda.current_stream(made[0].device).synchronize()
        return made

    def _finish(self, entry: _Job, rows: torch.Tensor) -> None:
        job, layout = entry.start, self.encoder.layout
        entry.patches = None
        found, planned = (*rows.shape, str(rows.dtype).removeprefix("torch.")), (job.rows, layout.width, layout.dtype)
        if found != planned:
            self._stop(entry, "wrong_shape", f"the encoder made {found}, the plan says {planned}", retryable=False)
            return
        del self._jobs[job.digest]
        self._rows[job.digest] = rows
        self._tell_of(StageEntered(job.digest, "encoded", time.monotonic() - entry.since))
        self._tell_of(RowsReady(job.digest, job.rows))


def _alone(rows: torch.Tensor) -> torch.Tensor:
    """Contiguous rows in memory of their own: a piece of a batch would keep all of the batch's rows alive."""
    own = rows.contiguous()
    return own.clone() if own.untyped_storage().nbytes() > own.nbytes else own
