"""One item on its way in: the receiver's machine.

Theory
------
The **ledger** (``held``, and ``meta`` for the small regions) is the truth about what arrived; it only grows. An
**epoch** is one attempt to move the item from one incarnation of one peer. Every attempt begins the same way, be it
the first or one after a cut, a restart, a failover or silence: the receiver states its ledger in a ``Want`` with a
new epoch. So there is no resume code that a first attempt does not run.

Rows are in one of four places: held; *pending* (committed, a Take is reading them); *lent* in this epoch; missing.
``claimed`` is the first three. A new epoch gives back what was lent, never what is pending or held.

Blocks of an older epoch may still be written to until the sender's ``Offer`` for the new one, which says that nothing
older moves, and restates finished chunks whose ``Commit`` was lost. Until then they are *kept*: revoked, but with
rows that may count. That is why a cut costs at most the chunk that was in flight. What the sender says holds for its
side only: this one may be placing bytes yet, so also then a block is free only after a Revoke, which asks ``NOBODY``.

After failed writes the next epoch may wait (``resting``): the peer has stopped, and nothing is lent to it.

What the table cannot say: messages of another peer or epoch never reach the item (the Receiver uses them for fences
only); ``Place`` is asked for exactly when ``peer`` becomes None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from aiodisagg.errors import InvalidTransition, RemoteProtocolError
from aiodisagg.protocol.blocks import BlockPool, LentBlock
from aiodisagg.protocol.events import (
    Fail,
    Finish,
    ItemCancelled,
    ItemHurried,
    ItemSpec,
    LinkLost,
    LinkUp,
    Place,
    Placed,
    ReceiverAction,
    Revoke,
    RowsRefused,
    RowsTaken,
    Send,
    State,
    Take,
    TimerFired,
)
from aiodisagg.protocol.messages import (
    Cancel,
    Chunk,
    Commit,
    Fenced,
    FromSender,
    ItemKey,
    Meta,
    Offer,
    Progress,
    Refuse,
    Release,
    Want,
)
from aiodisagg.protocol.meta import MetaLedger
from aiodisagg.protocol.patience import Patience, ReceiverConfig
from aiodisagg.protocol.ranges import RangeSet
from aiodisagg.protocol.rows import ModelFingerprint
from aiodisagg.protocol.story import Story

Actions = list[ReceiverAction]
NOBODY = ""
"""The peer in a Revoke of what a sender has fenced itself: only copies that this side has begun are waited for."""


class IncomingItem:
    """The machine; ``handle`` is its only door. See the module's text."""

    def __init__(
        self, key: ItemKey, spec: ItemSpec, model: ModelFingerprint, pool: BlockPool, config: ReceiverConfig,
        now: float, timeout_s: float,
    ) -> None:  # fmt: skip
        self.key, self.spec, self.model = key, spec, model
        self.state = State.BOOTSTRAPPING
        self.peer: str | None = None
        self.epoch = self._waited = self.ready = 0
        self.held, self.pending, self.claimed = RangeSet(), RangeSet(), RangeSet()
        self.meta = MetaLedger.of(spec.meta, spec.rows)
        self.lends: dict[int, LentBlock] = {}
        self.deadline, self.timeout_s = now + timeout_s, timeout_s
        self._urgency, self._urged = spec.urgency, now
        self.wake = self.deadline
        self._story = Story(now)
        self._pool, self._config = pool, config
        self._linked = self._resting = self._sent_media = self._wonders = False
        self._has_media: set[str] = set()
        self._avoid: set[str] = set()
        self._patience = Patience(config)

    # -- the door ------------------------------------------------------------------------------------------------

    def handle(self, event: object, now: float) -> Actions:
        """Raises InvalidTransition, changing nothing, if the event is not legal in this state."""
        method = self.TABLE.get((self.state, type(event)))
        if method is None or (self.peer is None and isinstance(event, FromSender | LinkLost | LinkUp)):
            raise InvalidTransition(self.state.value, type(event).__name__)
        return method(self, event, now)

    @property
    def timer(self) -> float:
        """When TimerFired is due at the latest."""
        return min(self.deadline, self.wake)

    @property
    def complete(self) -> bool:
        return self.held.covers(0, self.spec.rows) and not self.meta.lacking

    # -- placement and epochs ------------------------------------------------------------------------------------

    def _placed(self, event: Placed, now: float) -> Actions:
        if self.peer is not None:
            raise InvalidTransition(self.state.value, "Placed")
        if hopeless := self._patience.hopeless(event.peer):
            return self.fail(now, *hopeless)
        self.peer, self._linked = event.peer, True
        self._patience.answered()
        return self._new_epoch(now, f"placed on {event.peer}")

    def _new_epoch(self, now: float, why: str) -> Actions:
        """States the ledger to the current peer and starts over from it."""
        assert self.peer is not None
        actions = self._withdraw(keep=True)
        self.epoch += 1
        self.state, self.ready, self._resting, self._wonders = State.BOOTSTRAPPING, 0, False, False
        self._story.tell(now, f"{why}, epoch {self.epoch}, {len(self.held)}/{self.spec.rows} rows held")
        media = None if self.peer in self._has_media else self.spec.media
        self._has_media.add(self.peer)
        self._sent_media = media is not None
        return [*actions, self._want(now, media)]

    def _want(self, now: float, media: tuple[bytes, ...] | None) -> Send:
        self.wake, spec = now + self._config.stall_s, self.spec
        want = Want(
            self.key, self.epoch, spec.digest, spec.kind, spec.grid_thw, spec.rows, spec.fps, self.held.told(),
            self.meta.lacking, self.model, max(0.0, self.deadline - now), media, self._urgency.later(now - self._urged),
        )  # fmt: skip
        return Send(str(self.peer), want)

    def _hurried(self, event: ItemHurried, now: float) -> Actions:
        """Asks once more, from the better place, unless the peer has begun: before that there is nothing to lose."""
        if event.urgency.before(self._urgency.later(now - self._urged)):
            self._urgency, self._urged = event.urgency, now
            if self.peer and self._linked and not self._resting and not self.ready:
                return self._new_epoch(now, "wanted sooner")
        return []

    def _withdraw(self, *, keep: bool, said: bool = False) -> Actions:
        """Gives back what is lent. ``keep``: the sender may still restate what it wrote there. ``said``: it fenced."""
        revoked = []
        for lease, block in list(self.lends.items()):
            if not block.revoked:
                block.revoked = True
                revoked.append(lease)
            block.kept = keep
            if not keep:
                block.epoch = self.epoch  # the sender obeys only a Cancel of its newest epoch
            if self._pool.settle(block) or not keep:
                del self.lends[lease]
        self.claimed = self.held.copy()
        for start, stop in self.pending.spans():
            self.claimed.add(start, stop)
        return [Revoke(NOBODY if said else self.peer, tuple(revoked))] if revoked and self.peer is not None else []

    def _fail_over(self, now: float, why: str) -> Actions:
        """Leaves the current peer; what it was lent stays quarantined until it is fenced."""
        actions = self._withdraw(keep=False)
        actions += self._part(Cancel)
        self._avoid.add(str(self.peer))
        self._story.tell(now, f"left {self.peer}: {why}")
        self.peer, self.state, self.wake = None, State.BOOTSTRAPPING, self.deadline
        return [*actions, Place(self.key, frozenset(self._avoid))]

    def _part(self, word: type[Cancel | Release]) -> Actions:
        return [] if self.peer is None else [Send(self.peer, word(self.key, self.epoch))]

    def _link_lost(self, event: LinkLost, now: float) -> Actions:
        if event.gone:
            return self._fail_over(now, "its process ended")
        actions, self._linked = self._withdraw(keep=True), False
        self.state, self.wake = State.BOOTSTRAPPING, now + self._config.failover_s
        self._story.tell(now, f"link to {self.peer} lost")
        return actions

    def _link_up(self, event: LinkUp, now: float) -> Actions:
        self._linked = True
        if self._patience.fruitless():
            return self._fail_over(now, "its link was lost again and again")
        return self._new_epoch(now, f"link to {event.peer} is back")

    def _timer(self, event: TimerFired, now: float) -> Actions:
        if now >= self.deadline:
            return self.fail(now, "deadline", f"not complete after {self.timeout_s:g} s")
        if now < self.wake or self.peer is None:
            return []
        if not self._linked:
            return self._fail_over(now, f"its link did not come back in {self._config.failover_s:g} s")
        if self._resting:
            return self._new_epoch(now, "rested")
        owed = any(not block.revoked and block.lend.start < self.ready for block in self.lends.values())
        if owed and not self._wonders and self.state is not State.BOOTSTRAPPING:
            self._wonders = True  # a new epoch would end a write that is only slow
            return [self._want(now, None)]
        if (self._wonders or self.state is State.BOOTSTRAPPING) and self._patience.stalled():
            return self._fail_over(now, f"no answer to {self._patience.unanswered} questions")
        return self._new_epoch(now, f"no progress in {self._config.stall_s:g} s")

    def _late(self, now: float, writing: bool) -> Actions:
        """It owes rows for long, and says whether it is writing them."""
        self._wonders = False
        if (self._patience.slow if writing else self._patience.fruitless)():
            return self._fail_over(now, "rows that are ready do not arrive")
        return [] if writing else self._new_epoch(now, f"no progress in {self._config.stall_s:g} s")

    # -- what the sender says ------------------------------------------------------------------------------------

    def _offered(self, event: Offer, now: float) -> Actions:
        peer = str(self.peer)
        if self._resting:  # of the epoch that ended with a failed write, said twice
            return []
        if event.model != self.model or event.rows != self.spec.rows or event.ready > event.rows:
            raise RemoteProtocolError(peer, f"item {self.key}: offer does not fit what was wanted: {event}")
        if event.needs_media:
            self._has_media.discard(peer)
            actions = self._settle_older(event.epoch)
            if self._sent_media:
                return actions + self._give_up_on(now, "media_ignored", "asks for media that it was sent", True)
            return actions + self._new_epoch(now, f"{peer} has neither rows nor media")
        for chunk, meta in event.written:
            self._check_chunk(chunk, meta)
        actions = [take for chunk, meta in event.written for take in self._take(chunk, meta)]
        actions += self._settle_older(event.epoch)
        self._patience.answered()
        if self.state is State.BOOTSTRAPPING:
            self.state = State.TRANSFERRING if self.claimed else State.WAITING_FOR_INPUT
            self._story.tell(now, f"offered, {event.ready} rows ready")
        self._heard(now, event.ready)
        return actions + (self._late(now, event.writing) if self._wonders else [])

    def _settle_older(self, epoch: int) -> Actions:
        """Nothing of this peer that is older than ``epoch`` moves; also what it was lent in an earlier stay."""
        old = [one for one in self._pool.lent_to(str(self.peer), self.key) if one.epoch < epoch]
        for block in old:
            block.kept = False
            if self._pool.settle(block) or not block.pins:
                self.lends.pop(block.lend.lease, None)
        said = tuple(block.lend.lease for block in old if not block.fenced)
        return [Revoke(NOBODY, said)] if said else []

    def _progress(self, event: Progress, now: float) -> Actions:
        if event.ready > self.spec.rows:
            raise RemoteProtocolError(str(self.peer), f"item {self.key}: {event.ready} of {self.spec.rows} rows ready")
        self._story.tell(now, event.stage)
        self._heard(now, event.ready)
        return []

    def _heard(self, now: float, ready: int) -> None:
        self.ready = max(self.ready, ready)
        self.wake = now + self._config.stall_s

    def _committed(self, event: Commit, now: float) -> Actions:
        self._check_chunk(event.chunk, event.meta)
        actions = self._take(event.chunk, event.meta)
        if actions:
            self.state, self._wonders = State.TRANSFERRING, False
            self._heard(now, event.chunk.stop)
        return actions

    def _check_chunk(self, chunk: Chunk, meta: Meta | None) -> None:
        """Raises RemoteProtocolError if no honest sender could say this; late words about ended lends are fine."""
        peer = str(self.peer)
        if wrong := self._pool.wrong(chunk, self.key, peer):
            raise RemoteProtocolError(peer, f"item {self.key}: {wrong}")
        if self._pool.get(chunk.lease) is not None and (wrong := self.meta.wrong(chunk.start, chunk.stop, meta)):
            raise RemoteProtocolError(peer, f"item {self.key}: {wrong} does not fit {chunk}")

    def _take(self, chunk: Chunk, meta: Meta | None) -> Actions:
        """The chunk lies in its block: take it, unless these rows were taken before."""
        block = self._pool.get(chunk.lease)
        if block is None or any(s.overlaps(chunk.start, chunk.stop) for s in (self.held, self.pending, block.spent)):
            return []
        block.pin(chunk)
        self.pending.add(chunk.start, chunk.stop)
        self.claimed.add(chunk.start, chunk.stop)
        row_bytes = self._pool.row_bytes
        offset = block.lend.offset + (chunk.start - block.lend.start) * row_bytes
        return [Take(self.key, chunk, offset, (chunk.stop - chunk.start) * row_bytes, meta)]

    def _fenced(self, event: Fenced, now: float) -> Actions:
        """Unasked: the sender stopped in this epoch, because a write failed. Start over, a bounded number of times."""
        if self._resting:
            return []
        actions = self._withdraw(keep=True, said=True)
        why, pause_s = f"a write failed: {event.reason}", self._patience.write_failed(str(self.peer), event.reason)
        if self._patience.fruitless() or self._patience.cannot_write(str(self.peer)):
            return actions + self._fail_over(now, f"{why}; again and again")
        if not pause_s:
            return actions + self._new_epoch(now, why)
        actions += self._withdraw(keep=False)
        self.state, self.wake, self._resting = State.BOOTSTRAPPING, now + pause_s, True
        self._story.tell(now, f"{why}; again in {pause_s:g} s")
        return actions

    def _refused(self, event: Refuse, now: float) -> Actions:
        return self._withdraw(keep=False, said=True) + self._give_up_on(now, event.code, event.message, event.retryable)

    def _give_up_on(self, now: float, code: str, message: str, retryable: bool) -> Actions:
        """The current peer will not provide the item: another one may, unless that was said too often."""
        if self._patience.refused(str(self.peer), code) or not retryable:
            return self.fail(now, code, message)
        return self._fail_over(now, f"{code}: {message}")

    # -- what became of a Take -----------------------------------------------------------------------------------

    def _taken(self, event: RowsTaken, now: float) -> Actions:
        chunk = event.chunk
        self.pending.remove(chunk.start, chunk.stop)
        self.held.add(chunk.start, chunk.stop)
        self._patience.rows_came()
        if not self.complete:
            return []
        self.state = State.SUCCESS
        farewell = Cancel if any(block.revoked or not block.done for block in self.lends.values()) else Release
        actions = self._withdraw(keep=False) + self._part(farewell)
        self._story.tell(now, "complete")
        return [*actions, Finish(self.key)]

    def _chunk_refused(self, event: RowsRefused, now: float) -> Actions:
        chunk = event.chunk
        self.pending.remove(chunk.start, chunk.stop)
        self.claimed.remove(chunk.start, chunk.stop)
        what = "could not be delivered" if event.why else "have a wrong checksum"
        self._story.tell(now, f"rows {chunk.start}-{chunk.stop} {what}")
        if event.why:
            gone = self._patience.undelivered()
            return self.fail(now, "undelivered", f"rows could not be delivered: {event.why}") if gone else []
        leave = self._patience.spoiled(event.peer) and event.peer == self.peer
        return self._fail_over(now, "wrong checksums again and again") if leave else []

    # -- ends ----------------------------------------------------------------------------------------------------

    def _cancelled(self, event: ItemCancelled, now: float) -> Actions:
        return self.fail(now, "cancelled", "nobody waits for it any more")

    def fail(self, now: float, code: str, message: str) -> Actions:
        """Ends the item; its blocks are quarantined until fenced."""
        actions = self._withdraw(keep=False) + self._part(Cancel)
        self.state = State.FAILED
        self._story.tell(now, f"{code}: {message}")
        return [*actions, Fail(self.key, code, message, self._story.lines)]

    def waits(self, now: float) -> None:
        """Its rows are ready, and no block is free for them. Told once in an epoch."""
        if self._waited != self.epoch and all(block.revoked for block in self.lends.values()):
            self._waited = self.epoch
            self._story.tell(now, f"waits for a free block of {self._pool!r}")

    def _ignore(self, event: object, now: float) -> Actions:
        return []

    def __repr__(self) -> str:
        rows = f"{len(self.held)}/{self.spec.rows} rows, {len(self.lends)} blocks"
        return f"<IncomingItem {self.key} {self.state.value} epoch {self.epoch} from {self.peer}, {rows}>"

    TABLE: ClassVar[dict[tuple[State, type], Callable[..., Actions]]] = {}


def _table() -> dict[tuple[State, type], Callable[..., Actions]]:
    item = IncomingItem
    alive = (State.BOOTSTRAPPING, State.WAITING_FOR_INPUT, State.TRANSFERRING)
    offered = alive[1:]
    rows: list[tuple[tuple[State, ...], type, Callable[..., Actions]]] = [
        (alive[:1], Placed, item._placed),
        (alive, Offer, item._offered),
        (alive[:1], Progress, item._ignore),
        (offered, Progress, item._progress),
        (alive[:1], Commit, item._ignore),
        (offered, Commit, item._committed),
        (alive, Fenced, item._fenced),
        (alive, Refuse, item._refused),
        (alive, RowsTaken, item._taken),
        (alive, RowsRefused, item._chunk_refused),
        (alive, LinkLost, item._link_lost),
        (alive, LinkUp, item._link_up),
        (alive, TimerFired, item._timer),
        (alive, ItemCancelled, item._cancelled),
        (alive, ItemHurried, item._hurried),
    ]
    return {(state, event): method for states, event, method in rows for state in states}


IncomingItem.TABLE = _table()
