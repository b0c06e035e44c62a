"""The tower's thread: takes batches from its queue, runs them, and brings what they made to the loop.

It decides when it may start and what to start then, under one lock and at the last moment: what was cancelled, or is
needed sooner, is known by then. On an accelerator a batch is launched while the one before is still computed, on a
stream of the thread's own; a batch's rows exist when they are brought, so that copies on other streams need not wait.

What is to be alone begins when nothing is in the tower and all that was there has been dealt with, and nothing begins
before the same is true of it: if the process dies, it is known whether that was in the tower.

A batch that fails is run again piece by piece, so that one bad item fails alone. Rows that are not finite fail their
item here: in a prompt they would spoil keys and values that other requests share.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiodisagg.device.streams import Priority, own_stream
from aiodisagg.device.vitals import Vitals
from aiodisagg.encode.gate import Gate
from aiodisagg.encode.queue import Piece, TowerQueue
from aiodisagg.encode.selftest import encode_one
from aiodisagg.errors import AiodisaggError, MediaError
from aiodisagg.models.base import Patches, VisionEncoder
from aiodisagg.scheduler.order import Claim

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

LONGEST_S = 1.0
"""An item waits for prompts no longer in all, while it is next or behind others, and not at all once it is due."""


class WrongRows(AiodisaggError):
    """An encoder made other rows than the plan says."""


class NotFinite(AiodisaggError):
    """An encoder made values that are not finite."""


@dataclass(slots=True)
class _Item:
    """An item in the tower's hands. ``waited_s``: by the gate, when it came; it waits for prompts no more once ``due``.
    ``whole``: room for all its rows, filled as its pieces are computed."""

    patches: Patches
    frames: int
    rows: int
    due: float
    waited_s: float
    whole: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a batch: for each piece its item's rows, computed up to and with the piece, or why there are none.

    ``seconds``: how long it kept the tower.
    """

    pieces: Sequence[Piece]
    rows: Sequence[torch.Tensor | Exception]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Launched:
    pieces: list[Piece]
    items: list[_Item]
    rows: list[torch.Tensor]
    finite: torch.Tensor
    """bool [pieces] on the host, valid when the rows exist."""
    event: Any
    """Of the device, behind the rows; None: they exist."""
    began: float


class Tower:
    """Owns the thread. ``add`` and ``cancel`` may be called on any thread.

    Args:
        encoder: ``encode`` is called on this thread only. batch_patches: budget of a batch.
        began: called on the tower's thread with the pieces of a batch, before it runs.
        made: called on the tower's thread with what became of it.
        gate: asked before each batch.
        to_host: bring the rows to the host at once; else they stay where the tower made them.
        device: as torch names it; on an accelerator the thread has a stream of its own.
        vitals: are told of items that were computed, and of those that failed by themselves; what worked before is
        tried then. picture: makes something to try while nothing has worked yet; called on the tower's thread.
    """

    def __init__(
        self, encoder: VisionEncoder, *, batch_patches: int, began: Callable[[list[Piece]], None],
        made: Callable[[Made], None], gate: Gate, to_host: bool, device: str, vitals: Vitals,
        picture: Callable[[], Patches],
    ) -> None:  # fmt: skip
        self._encoder, self._began, self._made, self._gate, self._vitals = encoder, began, made, gate, vitals
        self._to_host, self._device, self._picture = to_host, device, picture
        self._queue = TowerQueue(batch_patches)
        self._items: dict[str, _Item] = {}
        self._running: Counter[str] = Counter()
        self._alone = False
        """What began last is to be alone."""
        self._good: Patches | None = None
        """The smallest that was computed so far."""
        self._wake = threading.Condition()
        self._closing = False
        self._idle_since = 0.0
        self._thread = threading.Thread(target=self._run, name="aiodisagg-tower", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, digest: str, claim: Claim, patches: Patches, rows: int, *, alone: bool = False) -> None:
        """Queues an item of ``rows``; it is cut between frame pairs if they have equally many. ``claim``: on
        ``time.monotonic``. ``alone``: nothing else shall be in the tower with it."""
        t = patches.grid_thw[0]
        frames = t if rows % t == 0 else 1
        item = _Item(patches, frames, rows, claim.due, self._gate.waited_s)
        with self._wake:
            self._items[digest] = item
            self._queue.add(digest, claim, frames, patches.count // frames, alone=alone)
            self._wake.notify()

    def change(self, digest: str, claim: Claim, *, alone: bool) -> None:
        """From now on this counts for what has not begun of an item."""
        with self._wake:
            if (item := self._items.get(digest)) is not None:
                item.due = claim.due
            self._queue.change(digest, claim, alone=alone)
            self._wake.notify()

    def waits(self, digest: str) -> bool:
        """Whether an item is here that will not begin at once: others are before it, or the gate is closed."""
        gate_open = self._gate.open  # before the lock: who holds the gate's asks for this one
        with self._wake:
            return digest in self._items and (len(self._items) > 1 or bool(self._running) or not gate_open)

    def cancel(self, digest: str) -> bool:
        """Takes out what has not begun; whether a piece is in the tower and still to be brought."""
        with self._wake:
            self._items.pop(digest, None)
            self._queue.cancel(digest)
            return digest in self._running

    def brought(self, piece: Piece) -> None:
        """For the receiver of ``made``: this piece has been dealt with."""
        with self._wake:
            self._running[piece.digest] -= 1
            if not self._running[piece.digest]:
                del self._running[piece.digest]
            if self._queue and not self._running:  # else nothing was kept out
                self._wake.notify()

    def stop(self) -> None:
        """The thread ends after the batch it is in; what waits is dropped."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._gate.close()

    def close(self) -> None:
        """Stops it, and returns when it has ended. Blocking."""
        self.stop()
        if self._thread.ident is not None:
            self._thread.join()

    # -- on the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with own_stream(self._device, Priority.TOWER):
                self._work()
        except BaseException as error:
            logger.exception("the tower's thread failed")
            self._vitals.ended(error)
        finally:  # weights and pictures: who refers to this object may be garbage in cycles
            del self._encoder, self._picture, self._good
            self._items.clear()

    def _work(self) -> None:
        launched: _Launched | None = None
        while True:
            if batch := self._next(block=launched is None):
                launched = self._launch(*batch, launched)
                if launched is not None and launched.event is None:
                    self._finish(launched)
                    launched = None
            elif launched is not None:  # nothing to compute beside it, and nobody else brings it
                self._finish(launched)
                launched = None
            elif self._closing:
                return

    def _patience_s(self) -> float:
        """For how much longer all that is here can wait for prompts."""
        waited_s, now = self._gate.waited_s, time.monotonic()
        with self._wake:
            left = (min(item.due - now, item.waited_s + LONGEST_S - waited_s) for item in self._items.values())
            return min(left, default=0.0)

    def _next(self, *, block: bool) -> tuple[list[Piece], list[_Item]] | None:
        """What may begin now, or, to ``block``, as soon as there is work and slack; what is chosen is what is wanted
        most by then."""
        with self._wake:
            if block:
                self._wake.wait_for(lambda: self._may_begin() or self._closing)
            elif not self._may_begin():
                return None
        if not self._gate.wait(self._patience_s, block=block):
            return None
        with self._wake:
            if self._closing:
                return None
            pieces = self._queue.take(time.monotonic()) if self._may_begin() else []
            items = [self._items[piece.digest] for piece in pieces]
            for piece in pieces:
                self._running[piece.digest] += 1
                self._alone = piece.alone
                if piece.last:
                    del self._items[piece.digest]
        if not pieces:  # cancelled meanwhile, or it is to be alone now
            self._gate.gave_up()
            return None
        return pieces, items

    def _may_begin(self) -> bool:
        """Whether something waits, and nothing in the tower keeps it out."""
        if not self._queue:
            return False
        return not self._running or not (self._alone or self._queue.alone(time.monotonic()))

    def _launch(self, pieces: list[Piece], items: list[_Item], before: _Launched | None) -> _Launched | None:
        """Launches a batch and finishes the one ``before``: a video's pieces are brought in order, also if this one
        cannot be launched."""
        self._began(pieces)
        began = time.monotonic()
        made: _Launched | Exception
        try:
            made = self._encode(pieces, items, began)
        except Exception as error:
            made = error
        if before is not None:
            self._finish(before)
        if isinstance(made, Exception):
            self._again(pieces, items, began, made)
            return None
        return made

    def _encode(self, pieces: list[Piece], items: list[_Item], began: float) -> _Launched:
        batch = [item.patches.frame_pairs(piece.start, piece.stop) for piece, item in zip(pieces, items, strict=True)]
        rows = self._encoder.encode(batch)
        if len(rows) != len(batch):
            raise RuntimeError(f"the encoder made {len(rows)} tensors of {len(batch)} items")
        finite = _finite(rows)
        if self._to_host:
            rows = [one.to("cpu") for one in rows]
        placed = [self._place(*each) for each in zip(pieces, items, rows, strict=True)]
        return _Launched(pieces, items, placed, finite, _event_behind(placed), began)

    def _place(self, piece: Piece, item: _Item, rows: torch.Tensor) -> torch.Tensor:
        """Contiguous rows in memory of their item's own: a part of a batch would keep all of the batch's rows alive."""
        layout, per_frame = self._encoder.layout, item.rows // item.frames
        found = (*rows.shape, str(rows.dtype).removeprefix("torch."))
        planned = (per_frame * (piece.stop - piece.start), layout.width, layout.dtype)
        if found != planned:
            raise WrongRows(f"the encoder made {found}, the plan says {planned}")
        if piece.stop - piece.start == item.frames:
            own = rows.contiguous()
            return own.clone() if own.untyped_storage().nbytes() > own.nbytes else own
        if item.whole is None:
            item.whole = rows.new_empty((item.rows, layout.width))
        item.whole[per_frame * piece.start : per_frame * piece.stop] = rows
        return item.whole

    def _finish(self, launched: _Launched) -> None:
        try:
            rows = self._await(launched)
        except Exception as error:
            self._again(launched.pieces, launched.items, launched.began, error)
            return
        self._bring(launched.pieces, launched.items, rows, launched.began)

    def _await(self, launched: _Launched) -> list[torch.Tensor | Exception]:
        """What became of each piece. Raises what the device raises."""
        if launched.event is not None:
            launched.event.synchronize()
        found: list[torch.Tensor | Exception] = list(launched.rows)
        for i, (piece, finite) in enumerate(zip(launched.pieces, launched.finite.tolist(), strict=True)):
            if not finite:
                self.cancel(piece.digest)  # its other pieces
                found[i] = NotFinite("the encoder made values that are not finite")
        return found

    def _again(self, pieces: list[Piece], items: list[_Item], began: float, error: Exception) -> None:
        if len(pieces) == 1:
            self.cancel(pieces[0].digest)  # before the loop knows of it: the next batch is chosen at once
            self._bring(pieces, items, [error], began)
            return
        logger.warning("a batch of %d items raised %r; doing them one by one", len(pieces), error)
        for piece, item in zip(pieces, items, strict=True):
            began = time.monotonic()
            try:
                rows = self._await(self._encode([piece], [item], began))
            except Exception as alone:
                self.cancel(piece.digest)
                self._bring([piece], [item], [alone], began)
            else:
                self._bring([piece], [item], rows, began)

    def _bring(
        self, pieces: list[Piece], items: list[_Item], rows: Sequence[torch.Tensor | Exception], began: float
    ) -> None:
        now = time.monotonic()
        seconds = now - max(began, self._idle_since)  # a batch that was launched early waited for the one before
        self._idle_since = now
        self._gate.spent(seconds)
        for piece, item, found in zip(pieces, items, rows, strict=True):
            if not isinstance(found, Exception):
                self._vitals.worked()
                self._remember(item.patches.frame_pairs(piece.start, piece.stop))
            elif not isinstance(found, WrongRows | NotFinite):  # they say nothing of the device
                self._vitals.failed(piece.digest, found, self._probe)
        self._made(Made(pieces, rows, seconds))

    def _remember(self, patches: Patches) -> None:
        if self._good is None or patches.room < self._good.room:
            self._good = Patches(patches.pixel_values.clone(), patches.grid_thw)  # its item's are soon freed

    def _probe(self) -> None:
        """Encodes what worked before, or a picture if nothing did yet. Raises what the encoder raises, but not that the
        picture is none for it: then nothing is known to be good."""
        try:
            good = self._good or self._picture()
        except MediaError:
            return
        encode_one(self._encoder, good)


def _finite(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether all values of each are finite: bool [len(rows)] on the host, valid once the device has come so far."""
    import torch

    flags = torch.stack([one.isfinite().all() for one in rows])
    if not flags.is_cuda:
        return flags
    return torch.empty(len(rows), dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)


def _event_behind(rows: Sequence[torch.Tensor]) -> Any:
    import torch

    if not rows or not rows[0].is_cuda:
        return None
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(rows[0].device))
    return event
