"""One item on its way out to one receiver: the sender's machine.

Theory
------
The sender decides nothing about what was received: it writes the rows that were granted, in the blocks that were
lent, one chunk at a time (one *stream* per item), and says so. What it remembers is only what the receiver might not
know: ``written``, the chunks whose ``Commit`` may have been lost. A ``Want`` with a newer epoch replaces everything
else; before it is answered, the write in progress is fenced, so ``Offer`` always means that nothing older moves.

An item's record outlives its link for ``retain_s``, because the source and ``written`` are what make a resume cheap.
It ends earlier when another receiver, one with a link, waits for the room (``RoomWanted``); who returns after that
sends the media once more. So does that of a receiver which has a link, and for as long has not taken rows that exist,
or not said that it has them all; when it grants blocks later it is told (``Fenced``), and not before: until then it
lacks nothing. How long a write may take is for the transport to say.
It is never dropped while a write may still move: every end goes through a fence if a write is in progress. That is
why an unknown item can be declared fenced at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from aiodisagg.errors import InvalidTransition, RemoteProtocolError
from aiodisagg.protocol.counters import ByteCounters
from aiodisagg.protocol.events import (
    ChunkWritten,
    EncodeStopped,
    Fence,
    LinkLost,
    LinkUp,
    RowsReady,
    Send,
    SenderAction,
    StageEntered,
    State,
    TimerFired,
    Write,
    WriteFailed,
    WritesFenced,
)
from aiodisagg.protocol.messages import (
    MOST_LENDS,
    MOST_WRITTEN,
    Cancel,
    Chunk,
    Commit,
    Fenced,
    Grant,
    Lend,
    Meta,
    Offer,
    Progress,
    Refuse,
    Release,
    Want,
)
from aiodisagg.protocol.meta import ItemMeta
from aiodisagg.protocol.ranges import RangeSet
from aiodisagg.protocol.rows import ModelFingerprint
from aiodisagg.protocol.sources import Source

Actions = list[SenderAction]
REASON_CHARS = 1000
"""So much of an error is told to the receiver: a write's names each plane that was tried, and is kept in stories."""


@dataclass(frozen=True, slots=True)
class RoomWanted:
    """The Sender's own word to an item that is not ``here``: somebody who is waits for the room of its source."""


@dataclass(frozen=True, slots=True)
class SenderConfig:
    """Bounds of a sender.

    ``retain_s``: how long an item outlives its link, unless others need its room, and for how long it may leave rows
    where they are if others do. ``capacity_bytes``: memory for sources. ``file_bytes``: and for the files of those that
    are not encoded yet.
    ``placeholders``: token id by item kind, for receivers that want region 1.
    """

    retain_s: float = 30.0
    capacity_bytes: int = 1 << 30
    file_bytes: int = 1 << 28
    placeholders: tuple[tuple[str, int], ...] = ()


class OutgoingItem:
    """The machine; ``handle`` is its only door. See the module's text."""

    def __init__(
        self, peer: str, want: Want, model: ModelFingerprint, row_bytes: int, counters: ByteCounters,
        config: SenderConfig, now: float,
    ) -> None:  # fmt: skip
        self.peer, self.key, self.digest, self.rows = peer, want.key, want.digest, want.rows
        self.state = State.BOOTSTRAPPING
        self.epoch = 0
        self.source: Source | None = None
        self.written: list[tuple[Chunk, Meta | None]] = []
        self.lends: list[Lend] = []
        self.writing: Write | None = None
        self._drawn: Source | None = None
        self.fencing = False
        self.linked = True
        self.timer = self.moved = now
        self.story: deque[str] = deque(maxlen=24)
        self._meta: ItemMeta | None = None
        self._shape = (want.kind, want.grid_thw)
        self._wanted_meta: tuple[int, ...] = ()
        self._seen: set[int] = set()
        self._sent = RangeSet()
        self._after_fence: Callable[[float], Actions] | None = None
        self._model, self._row_bytes, self._counters, self._config = model, row_bytes, counters, config

    # -- the door ------------------------------------------------------------------------------------------------

    def handle(self, event: object, now: float) -> Actions:
        """Raises InvalidTransition, changing nothing, if the event is not legal in this state."""
        method = self.TABLE.get((self.state, type(event)))
        if method is None:
            raise InvalidTransition(self.state.value, type(event).__name__)
        return method(self, event, now)

    @property
    def ended(self) -> bool:
        """Final, and no write can move any more: the record may be dropped."""
        return self.state.final and self.writing is None and not self.fencing

    def here(self, now: float) -> bool:
        """Its receiver has a link and takes the rows that there are, as far as it was seen lately."""
        return self.linked and (now < self._yields or not self._owed)

    def due(self, now: float) -> float:
        """When TimerFired is to be fed."""
        may_yield = self.linked and now < self._yields < self.timer and self._owed
        return self._yields if may_yield else self.timer

    @property
    def _yields(self) -> float:
        """When a receiver that takes no rows counts as away."""
        return self.moved + self._config.retain_s

    @property
    def _owed(self) -> bool:
        """It is the receiver's turn: rows exist that were not taken, or all were, and it has not said so."""
        source = self.source
        if source is None or self.writing is not None:
            return False
        return source.complete or not self._sent.covers(0, source.ready)

    # -- epochs --------------------------------------------------------------------------------------------------

    def _want(self, event: Want, now: float) -> Actions:
        """A newer epoch replaces what was granted; the same one again is answered again."""
        if event.epoch <= self.epoch:
            again = event.epoch == self.epoch and self.state in (State.WAITING_FOR_INPUT, State.TRANSFERRING)
            return [self._offer()] if again else []
        self.epoch, self.linked = event.epoch, True
        self.timer = now + event.timeout_s + self._config.retain_s
        self._wanted_meta = event.meta
        self.lends.clear()
        self._seen.clear()
        self._forget(event.held)
        self.state = State.BOOTSTRAPPING
        self._tell(f"wanted, epoch {event.epoch}, {sum(b - a for a, b in event.held)}/{self.rows} rows held there")
        return self._fenced_then(self._start, now)

    def _start(self, now: float) -> Actions:
        if self.source is not None:
            self.state = State.TRANSFERRING if self.written else State.WAITING_FOR_INPUT
        return [self._offer()]

    def _offer(self) -> SenderAction:
        source = self.source
        ready = source.ready if source is not None else 0
        written, writing = tuple(self.written[-MOST_WRITTEN:]), self.writing is not None
        offer = Offer(self.key, self.epoch, self.rows, self._model, source is None, ready, written, writing)
        return Send(self.peer, offer)

    def _forget(self, held: tuple[tuple[int, int], ...]) -> None:
        """The receiver holds these rows: their chunks need not be restated."""
        known = RangeSet(held)
        self.written = [(chunk, meta) for chunk, meta in self.written if not known.covers(chunk.start, chunk.stop)]

    def _fenced_then(self, then: Callable[[float], Actions], now: float) -> Actions:
        """Does ``then`` as soon as no write of this item can move; a later call replaces an earlier one."""
        if self.writing is None and not self.fencing:
            return then(now)
        self._after_fence = then
        if self.fencing:
            return []
        self.fencing = True
        return [Fence(self.peer, self.key)]

    def _writes_fenced(self, event: WritesFenced, now: float) -> Actions:
        if not self.fencing or self.writing is not None:
            raise InvalidTransition(self.state.value, "WritesFenced")
        self.fencing = False
        then, self._after_fence = self._after_fence, None
        return then(now) if then is not None else []

    # -- rows and chunks -----------------------------------------------------------------------------------------

    def _granted(self, event: Grant, now: float) -> Actions:
        if event.epoch != self.epoch:
            return []
        if any(not start < stop <= self.rows for start, stop in event.held):
            raise RemoteProtocolError(self.peer, f"item {self.key}: {event.held} does not fit its {self.rows} rows")
        for lend in event.lends:
            if not 0 <= lend.start < lend.stop <= self.rows:
                raise RemoteProtocolError(self.peer, f"item {self.key}: {lend} is outside its {self.rows} rows")
        new = [lend for lend in event.lends if lend.lease not in self._seen]
        if len(self.lends) + len(new) > MOST_LENDS or len(self._seen) + len(new) > self.rows + MOST_LENDS:
            raise RemoteProtocolError(self.peer, f"item {self.key}: more blocks are lent than it can use")
        self._forget(event.held)
        self.lends += new
        self._seen.update(lend.lease for lend in new)
        self.lends.sort(key=lambda lend: lend.start)
        return self._pump(now)

    def _pump(self, now: float) -> Actions:
        """Starts the next write: the first granted rows that exist."""
        if self.writing is not None or self.fencing or not self.linked or self.source is None:
            return []
        lend = self.lends[0] if self.lends else None
        if lend is None or lend.start >= self.source.ready:
            return []
        stop = min(lend.stop, self.source.ready)
        if stop == lend.stop:
            del self.lends[0]
        else:
            rest = lend.offset + (stop - lend.start) * self._row_bytes
            self.lends[0] = Lend(lend.lease, rest, stop, lend.stop)
        self.state = State.TRANSFERRING
        self._drawn, self.moved = self.source, now
        self.writing = Write(self.peer, self.key, self.epoch, self.digest, lend.lease, lend.offset, lend.start, stop)
        new = self._sent.add(lend.start, stop)
        self._counters.rows("sent", self.peer, stop - lend.start)
        self._counters.rows("resent", self.peer, stop - lend.start - new)
        return [self.writing]

    def _chunk_written(self, event: ChunkWritten, now: float) -> Actions:
        write, chunk = self.writing, event.chunk
        if write is None or (write.lease, write.start, write.stop) != (chunk.lease, chunk.start, chunk.stop):
            raise InvalidTransition(self.state.value, "ChunkWritten")
        self.writing, self.moved = None, now
        if self._drawn is not self.source:  # the encode failed meanwhile: who knows what the write has read
            return []
        meta = self._cut_meta(chunk) if self._wanted_meta else None
        self.written.append((chunk, meta))
        if self.fencing or write.epoch != self.epoch or not self.linked:
            return []
        self._counters.meta("sent", self.peer, meta)
        return [Send(self.peer, Commit(self.key, self.epoch, chunk, meta)), *self._pump(now)]

    def _cut_meta(self, chunk: Chunk) -> Meta:
        if self._meta is None:
            kind, grid = self._shape
            placeholder = dict(self._config.placeholders).get(kind, 0)
            self._meta = ItemMeta.of(kind, grid, self.rows, self._model.deepstack_levels, placeholder)
        return self._meta.cut(chunk.start, chunk.stop, self._wanted_meta)

    def _write_failed(self, event: WriteFailed, now: float) -> Actions:
        if self.writing is None:
            raise InvalidTransition(self.state.value, "WriteFailed")
        self.writing, self.moved = None, now
        self._tell(f"write failed: {event.reason}")
        if self.fencing or event.epoch != self.epoch:
            return []
        self.lends.clear()
        self.state = State.BOOTSTRAPPING
        fenced = Fenced(self.key, self.epoch, event.reason[:REASON_CHARS])
        self.fencing, self._after_fence = True, lambda _: [Send(self.peer, fenced)]
        return [Fence(self.peer, self.key)]

    def _say_fenced(self, now: float) -> Actions:
        return [Send(self.peer, Fenced(self.key, self.epoch))]

    def _rows_ready(self, event: RowsReady, now: float) -> Actions:
        stage = "encoded" if event.stop >= self.rows else "encoding"
        told = Progress(self.key, self.epoch, stage, event.elapsed_s, event.stop, event.waiting_patches)
        return [Send(self.peer, told), *self._pump(now)]

    def _stage(self, event: StageEntered, now: float) -> Actions:
        ready = self.source.ready if self.source is not None else 0
        told = Progress(self.key, self.epoch, event.stage, event.elapsed_s, ready, event.waiting_patches)
        return [Send(self.peer, told)]

    # -- ends ----------------------------------------------------------------------------------------------------

    def _cancelled(self, event: Cancel, now: float) -> Actions:
        if event.epoch < self.epoch:
            return []
        self.epoch = event.epoch
        return self._end(State.FAILED, "cancelled", self._say_fenced, now)

    def _cancelled_late(self, event: Cancel, now: float) -> Actions:
        """Over already, but the fence under way answers this too."""
        self.epoch = max(self.epoch, event.epoch)
        self._after_fence = self._say_fenced
        return []

    def _released(self, event: Release, now: float) -> Actions:
        if event.epoch < self.epoch:
            return []
        return self._end(State.SUCCESS, "released", lambda _: [], now)

    def _stopped(self, event: EncodeStopped, now: float) -> Actions:
        refuse = Refuse(self.key, self.epoch, event.code, event.message[:REASON_CHARS], event.retryable)
        return self._end(State.FAILED, f"{event.code}: {event.message}", lambda _: [Send(self.peer, refuse)], now)

    def _timer(self, event: TimerFired, now: float) -> Actions:
        if now < self.timer:
            return []
        return self._end(State.FAILED, "nobody asked for it in time", self._say_fenced, now)

    def _room_wanted(self, event: RoomWanted, now: float) -> Actions:
        why = "it takes no rows" if self.linked else "its link was lost"
        return self._end(State.FAILED, f"{why}, and others needed the room", lambda _: [], now)

    def _end(self, state: State, why: str, then: Callable[[float], Actions], now: float) -> Actions:
        self.state, self.source = state, None
        self.lends.clear()
        self.written.clear()
        self._tell(why)
        return self._fenced_then(then, now)

    def _link_lost(self, event: LinkLost, now: float) -> Actions:
        self.linked = False
        self.lends.clear()
        if event.gone:
            return self._end(State.FAILED, "the receiver's process ended", lambda _: [], now)
        self.state = State.BOOTSTRAPPING
        self.timer = min(self.timer, now + self._config.retain_s)
        self._tell("link lost")
        return self._fenced_then(lambda _: [], now)

    def _link_up(self, event: LinkUp, now: float) -> Actions:
        self.linked = True
        return []

    def _ignore(self, event: object, now: float) -> Actions:
        return []

    def _tell(self, what: str) -> None:
        self.story.append(what)

    def __repr__(self) -> str:
        return (
            f"<OutgoingItem {self.key} {self.state.value} epoch {self.epoch} to {self.peer}, {len(self.lends)} lends>"
        )

    TABLE: ClassVar[dict[tuple[State, type], Callable[..., Actions]]] = {}


def _table() -> dict[tuple[State, type], Callable[..., Actions]]:
    item = OutgoingItem
    alive = (State.BOOTSTRAPPING, State.WAITING_FOR_INPUT, State.TRANSFERRING)
    offered = alive[1:]
    final = (State.SUCCESS, State.FAILED)
    rows: list[tuple[tuple[State, ...], type, Callable[..., Actions]]] = [
        (alive, Want, item._want),
        (alive[:1], Grant, item._ignore),
        (offered, Grant, item._granted),
        (alive, Release, item._released),
        (alive, Cancel, item._cancelled),
        (alive[:1], RowsReady, item._ignore),
        (offered, RowsReady, item._rows_ready),
        (alive[:1], StageEntered, item._ignore),
        (offered, StageEntered, item._stage),
        (alive, EncodeStopped, item._stopped),
        (alive + final, ChunkWritten, item._chunk_written),
        (alive + final, WriteFailed, item._write_failed),
        (alive + final, WritesFenced, item._writes_fenced),
        (alive, LinkLost, item._link_lost),
        (alive, LinkUp, item._link_up),
        (alive, TimerFired, item._timer),
        (alive, RoomWanted, item._room_wanted),
        (final, Want, item._want),
        (final, Grant, item._ignore),
        (final, Release, item._ignore),
        (final, Cancel, item._cancelled_late),
        (final, LinkLost, item._ignore),
        (final, LinkUp, item._ignore),
        (final, RoomWanted, item._ignore),
        (final, RowsReady, item._ignore),
        (final, StageEntered, item._ignore),
        (final, EncodeStopped, item._ignore),
    ]
    return {(state, event): method for states, event, method in rows for state in states}


OutgoingItem.TABLE = _table()
