"""From encoded files to packed rows, off the event loop: prepare (CPU threads), then the tower (one thread, batched).

What follows, copying out and sending, is the sessions' and the hand-off's; all of these run at the same time. Between
preparing and the tower lie at most ``prepared_patches``: at that bound preparing waits, and what waits before it is
bounded by the source table, which admits jobs only as memory allows.

Batches are small where a large one gains nothing, so rows leave soon: a finished image does not wait for those behind
it, and a long video's rows come by groups of frame pairs. What is cancelled is not begun, and left at the next batch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from aiodisagg.device.copies import DeviceBytes
from aiodisagg.device.vitals import Vitals
from aiodisagg.encode.gate import Gate, OpenGate
from aiodisagg.encode.prepare import Misnamed, Preparer, check_name
from aiodisagg.encode.queue import Piece
from aiodisagg.encode.selftest import small_picture
from aiodisagg.encode.tower import Made, NotFinite, Tower, WrongRows
from aiodisagg.errors import AiodisaggError, MediaError
from aiodisagg.models.base import ItemKind, Patches, VisionEncoder
from aiodisagg.protocol.events import ChangeEncode, EncodeStopped, RowsReady, StageEntered, StartEncode
from aiodisagg.protocol.patience import NOT_FINITE
from aiodisagg.scheduler.order import Claim

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

BATCH_PATCHES = {"cpu": 256, "cuda": 4096}
"""Budget of a batch by kind of device, where none is given: a CPU's tower is as fast with one small image as with many,
an accelerator's from about a thousand patches on."""
PREPARED_PATCHES = 32768
"""Bound between the stages, unless a batch is larger: 192 MiB of pixels."""

PipelineEvent = StageEntered | RowsReady | EncodeStopped


@dataclass(slots=True)
class _Job:
    start: StartEncode
    claim: Claim
    alone: bool
    since: float
    """When its stage began."""
    stage: str = "queued"
    """As it was told."""
    prepared: int = 0
    """Patches of it that are prepared and not yet encoded; a preparing thread's, until the stage is ``prepared``."""
    prepare_s: float = 0.0
    prepared_at: float = 0.0
    end: EncodeStopped | None = None
    """It will stop as soon as no piece of it is in the tower."""


class EncodePipeline:
    """Encodes jobs and holds their rows until ``drop``. An async context manager; methods belong to the loop's thread.

    Args:
        encoder: the encode half; ``encode`` is called on one thread only.
        tell: gets StageEntered as :class:`~aiodisagg.protocol.messages.Progress` has them, RowsReady for growing fronts
            of rows up to all of them, or EncodeStopped.
        batch_patches: patch budget of a tower batch; None: by device. An image with more goes alone.
        keep_on_device: leave the rows where the tower made them; else they are brought to the host at once.
        device: where the tower is, as torch names it.
        gate: asked before each batch; None: nothing shares the device.
        broke: gets ``broken`` as soon as there is a reason.
    """

    def __init__(
        self, encoder: VisionEncoder, tell: Callable[[PipelineEvent], None], *, batch_patches: int | None = None,
        prepare_threads: int, keep_on_device: bool = False, device: str = "cpu", gate: Gate | None = None,
        broke: Callable[[str], None] = lambda why: None,
    ) -> None:  # fmt: skip
        self._keep_on_device = keep_on_device
        self.encoder, self._tell = encoder, tell
        self.batch_patches = batch_patches or BATCH_PATCHES.get(device.partition(":")[0], BATCH_PATCHES["cuda"])
        self.batch_sizes: Counter[int] = Counter()
        """Tower batches by how many items had a part in them."""
        self.items_encoded = 0
        self.tower_s = 0.0
        self.prepare_s = 0.0
        self._jobs: dict[str, _Job] = {}
        self._started = 0
        self._rows: dict[str, torch.Tensor] = {}
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._preparer = Preparer(
            self._prepare,
            began=lambda job: self._on_loop(self._preparing, job.digest, time.monotonic()),
            done=self._prepared_on_thread,
            threads=prepare_threads,
            room_patches=max(PREPARED_PATCHES, 2 * self.batch_patches),
        )
        self._vitals = Vitals(lambda why: self._on_loop(broke, why))
        self._tower = Tower(
            encoder,
            batch_patches=self.batch_patches,
            began=lambda pieces: self._on_loop(self._began, pieces, time.monotonic()),
            made=lambda made: self._on_loop(self._made, made, time.monotonic()),
            gate=gate or OpenGate(),
            to_host=not keep_on_device,
            device=device,
            vitals=self._vitals,
            picture=lambda: small_picture(encoder),
        )

    async def __aenter__(self) -> EncodePipeline:
        self._preparer.start()
        self._tower.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed = True
        self._preparer.stop()  # both before any is waited for: who is cancelled meanwhile leaves no thread behind
        self._tower.stop()
        try:
            await asyncio.to_thread(self._preparer.close)
            await asyncio.to_thread(self._tower.close)
        finally:
            self._rows.clear()
            del self.encoder  # a service that is closed is garbage in cycles, or kept; its weights shall not be

    @property
    def broken(self) -> str:
        """Why the tower is not to be expected to encode anything any more, or empty."""
        return self._vitals.why

    @property
    def waiting(self) -> int:
        """Jobs whose rows are not complete."""
        return len(self._jobs)

    @property
    def prepared_patches(self) -> int:
        """Patches that wait for the tower or are in it."""
        return self._preparer.prepared_patches

    def start(self, job: StartEncode) -> None:
        self._started += 1
        now, urgency = time.monotonic(), job.urgency
        claim = Claim(self._started, now + urgency.due_s, urgency.priority, urgency.work)
        self._jobs[job.digest] = _Job(job, claim, job.alone, now)
        self._preparer.add(job, claim)

    def change(self, change: ChangeEncode) -> None:
        """The job goes by this as far as it has not begun. It keeps its place among those that came."""
        entry, urgency = self._jobs.get(change.digest), change.urgency
        if entry is None or entry.end is not None:
            return
        claim, due = entry.claim, min(entry.claim.due, time.monotonic() + urgency.due_s)
        entry.claim, entry.alone = Claim(claim.arrived, due, urgency.priority, urgency.work), change.alone
        self._preparer.change(change.digest, entry.claim)
        self._tower.change(change.digest, entry.claim, alone=entry.alone)

    def cancel(self, digest: str) -> None:
        """Stops a job at once while it waits; one that is on a thread when that is done with it, unless the rows are
        complete by then."""
        entry = self._jobs.get(digest)
        if entry is None:
            return
        entry.end = entry.end or EncodeStopped(digest, "cancelled", "nobody wants it any more", True)
        if self._preparer.cancel(entry.start):
            self._stop(entry)
        elif entry.stage in ("prepared", "encoding"):
            self._leave_tower(entry)
        else:  # on a thread, or in the tower's line, as the loop will hear
            self._tower.cancel(digest)

    def rows(self, digest: str, start: int, stop: int) -> memoryview | DeviceBytes:
        """Bytes of packed rows ``[start, stop)``. Valid until ``drop``. Raises KeyError before any are ready."""
        import torch

        rows = self._rows[digest][start:stop]
        if self._keep_on_device:
            return DeviceBytes(rows.data_ptr(), rows.nbytes, rows)
        return rows.view(torch.uint8).numpy().data.cast("B")

    def drop(self, digest: str) -> None:
        self._rows.pop(digest, None)

    # -- prepare -------------------------------------------------------------------------------------------------

    def _prepare(self, job: StartEncode) -> Patches:
        check_name(job)
        return self.encoder.prepare(ItemKind(job.kind), job.media, job.grid_thw, job.fps)

    def _prepared_on_thread(self, job: StartEncode, outcome: Patches | Exception, seconds: float) -> None:
        """From here to the tower without a turn of the loop, which is told what happened."""
        entry = self._jobs[job.digest]
        entry.prepare_s, entry.prepared_at = seconds, time.monotonic()
        if isinstance(outcome, Patches):
            entry.prepared = outcome.room
            claim, alone = entry.claim, entry.alone
            if entry.end is None:
                self._tower.add(job.digest, claim, outcome, job.rows, alone=alone)
            if entry.end is not None and self._jobs.get(job.digest) is entry:  # cancelled, perhaps in this very moment
                self._tower.cancel(job.digest)
            self._on_loop(self._prepared, entry, claim, alone)
        else:
            self._on_loop(self._not_prepared, entry, outcome)

    def _preparing(self, digest: str, at: float) -> None:
        entry = self._jobs.get(digest)
        if entry is not None and not entry.prepare_s:  # else it is over already, and so short that nobody has to know
            self._enter(entry, "preparing", at - entry.since, at)

    def _prepared(self, entry: _Job, claim: Claim, alone: bool) -> None:
        """The tower has it, by this claim, and may have begun already."""
        if self._jobs.get(entry.start.digest) is not entry:
            return
        if (entry.claim, entry.alone) != (claim, alone):  # since it was given to the tower
            self._tower.change(entry.start.digest, entry.claim, alone=entry.alone)
        if entry.stage != "encoding" and self._tower.waits(entry.start.digest):  # else one word does for both, soon
            self.prepare_s += entry.prepare_s
            self._enter(entry, "prepared", entry.prepare_s, entry.prepared_at)
        if entry.end is not None:  # no piece of it is begun from now on
            self._leave_tower(entry)

    def _not_prepared(self, entry: _Job, error: Exception) -> None:
        if self._closed:
            return
        self.prepare_s += entry.prepare_s
        digest = entry.start.digest
        if isinstance(error, MediaError):
            # Whoever shares what somebody else misnamed has files of its own to send.
            misnamed = isinstance(error, Misnamed)
            entry.end = EncodeStopped(digest, "misnamed" if misnamed else "invalid_media", str(error), misnamed)
        else:
            logger.error("item %s: preparing failed", digest, exc_info=error)
            entry.end = EncodeStopped(digest, "prepare_failed", f"{type(error).__name__}: {error}", True)
        self._stop(entry)

    def _make_room(self, entry: _Job, patches: int) -> None:
        entry.prepared -= patches
        self._preparer.free(patches)

    # -- the tower -----------------------------------------------------------------------------------------------

    def _on_loop(self, call: Callable[..., None], *what: object) -> None:
        self._loop.call_soon_threadsafe(call, *what)

    def _began(self, pieces: list[Piece], at: float) -> None:
        for piece in pieces:
            entry = self._jobs[piece.digest]
            if entry.stage == "encoding":
                continue
            if entry.stage == "prepared":
                elapsed_s = at - entry.since
            else:  # the tower was faster than the loop, and one word does for both
                elapsed_s = entry.prepare_s
                self.prepare_s += elapsed_s
            self._enter(entry, "encoding", elapsed_s, at)

    def _made(self, made: Made, at: float) -> None:
        if self._closed:
            return
        self.tower_s += made.seconds
        self.batch_sizes[len(made.pieces)] += 1
        for piece, rows in zip(made.pieces, made.rows, strict=True):
            entry = self._jobs[piece.digest]
            self._make_room(entry, entry.prepared if piece.last else piece.patches)
            if isinstance(rows, Exception):
                self._failed(entry, rows)
            elif entry.end is None or (piece.last and entry.end.code == "cancelled"):
                self._publish(entry, piece, rows, at)
            self._tower.brought(piece)  # now that it was told: what is to be alone may follow at once
            if entry.end is not None and self._jobs.get(piece.digest) is entry:
                self._leave_tower(entry)

    def _failed(self, entry: _Job, error: Exception) -> None:
        digest = entry.start.digest
        logger.error("item %s: the tower failed", digest, exc_info=error)
        what = str(error) if isinstance(error, AiodisaggError) else f"{type(error).__name__}: {error}"
        wrong = isinstance(error, WrongRows)
        code = "wrong_shape" if wrong else NOT_FINITE if isinstance(error, NotFinite) else "encode_failed"
        if entry.end is None or entry.end.code == "cancelled":  # its later pieces do not make it complete
            entry.end = EncodeStopped(digest, code, what, retryable=not wrong)

    def _publish(self, entry: _Job, piece: Piece, rows: torch.Tensor, at: float) -> None:
        """The rows up to the end of this piece exist now."""
        job = entry.start
        self._rows[job.digest] = rows
        if not piece.last:
            self._tell_of(RowsReady(job.digest, job.rows // job.grid_thw[0] * piece.stop))
            return
        self.items_encoded += 1
        del self._jobs[job.digest]
        self._tell_of(RowsReady(job.digest, job.rows, at - entry.since))

    # -- ends and words ------------------------------------------------------------------------------------------

    def _leave_tower(self, entry: _Job) -> None:
        """Takes out what has not begun; stops at once unless a piece is in the tower."""
        if not self._tower.cancel(entry.start.digest):
            self._stop(entry)

    def _stop(self, entry: _Job) -> None:
        assert entry.end is not None
        if entry.prepared:
            self._make_room(entry, entry.prepared)
        del self._jobs[entry.start.digest]
        self._tell_of(entry.end)

    def _enter(self, entry: _Job, stage: str, elapsed_s: float, at: float) -> None:
        entry.stage, entry.since = stage, at
        self._tell_of(StageEntered(entry.start.digest, stage, elapsed_s))

    def _tell_of(self, event: PipelineEvent) -> None:
        """A job that the listener has no place for must not stop the others."""
        if self._closed:
            return
        try:
            self._tell(event)
        except Exception:
            logger.exception("%r was refused", event)
