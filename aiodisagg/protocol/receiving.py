"""The receiving side of a process: all its incoming items, one block pool, and who gets the next block.

Blocks are lent where they are used: rows that exist at the sender come first, one block per item in turn; rows that
are still being computed get blocks only while half of the pool stays free. So an item that waits for a tower can
never keep the pool from items whose rows wait for blocks, and an item larger than the pool slides through it.
Nor can a peer keep it from others: an item whose peer has its share of the blocks is passed over, and keeps its place.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from aiodisagg.errors import InvalidTransition, RemoteProtocolError
from aiodisagg.protocol.blocks import BlockPool, LentBlock
from aiodisagg.protocol.counters import ByteCounters
from aiodisagg.protocol.events import (
    ItemCancelled,
    ItemHurried,
    ItemRequested,
    LeasesRevoked,
    LinkLost,
    LinkUp,
    MessageReceived,
    Place,
    Placed,
    ReceiverAction,
    ReceiverEvent,
    Revoke,
    RowsRefused,
    RowsTaken,
    Send,
    State,
    Take,
    TimerFired,
)
from aiodisagg.protocol.incoming import NOBODY, IncomingItem
from aiodisagg.protocol.lines import Line
from aiodisagg.protocol.messages import Cancel, Commit, Fenced, Grant, ItemKey, Lend, Offer, Progress, Refuse, Release
from aiodisagg.protocol.patience import ReceiverConfig
from aiodisagg.protocol.rows import ModelFingerprint, RowLayout
from aiodisagg.protocol.timers import Timers

__all__ = ["Receiver", "ReceiverConfig"]

MOST_UNHEARD = 4096
"""So many ends of items that their peers may not have heard of are remembered. Of the oldest ones beyond that a peer is
not told: it keeps what it has for them until its own patience ends."""


class Receiver:
    """Pure: ``handle(event, now) -> actions``. A bad peer can raise only RemoteProtocolError, changing nothing.

    Args:
        model: what offers must match.
        pool: the blocks; the receiver is their only user.
    """

    def __init__(self, model: ModelFingerprint, pool: BlockPool, config: ReceiverConfig | None = None) -> None:
        self.model, self.pool, self.config = model, pool, config or ReceiverConfig()
        self.counters = ByteCounters(RowLayout.of(model))
        self.items: dict[ItemKey, IncomingItem] = {}
        self._taking: dict[tuple[ItemKey, int, int], Take] = {}
        self._eager, self._early = Line(), Line()
        self._fresh: list[ItemKey] = []
        """Came into the eager line since blocks were lent last."""
        self._linked: set[str] = set()
        self._unheard: OrderedDict[tuple[str, ItemKey], int] = OrderedDict()
        """Epochs of which a peer does not know, or has not said that it knows, that they are over."""
        self._timers: Timers[ItemKey] = Timers()

    def next_timer(self) -> float | None:
        """When to feed TimerFired; None: no item is open. Read it again after every ``handle``."""
        return self._timers.next()

    def handle(self, event: ReceiverEvent, now: float) -> list[ReceiverAction]:
        actions: list[ReceiverAction] = []
        match event:
            case MessageReceived():
                actions = self._message(event, now)
            case RowsTaken() | RowsRefused():
                actions = self._taken(event, now)
            case ItemRequested(key, spec, timeout_s):
                if key in self.items:
                    raise InvalidTransition(self.items[key].state.value, "ItemRequested")
                item = IncomingItem(key, spec, self.model, self.pool, self.config, now, timeout_s)
                self.items[key] = item
                actions = self._after(item, [Place(key, frozenset())])
            case Placed(key, _) | ItemCancelled(key) | ItemHurried(key, _):
                found = self.items.get(key)
                if isinstance(event, Placed):
                    self._linked.add(event.peer)
                actions = self._step(found, event, now) if found else []
            case LinkUp(peer):
                self._linked.add(peer)
                actions = self._link_up(peer, event, now)
            case LinkLost(peer, gone):
                self._linked.discard(peer)
                for item in [item for item in self.items.values() if item.peer == peer]:
                    actions += self._step(item, event, now)
                for key in self._unheard_by(peer) if gone else ():
                    del self._unheard[peer, key]
            case LeasesRevoked(leases):
                for lease in leases:
                    block = self.pool.get(lease)
                    if block is not None and block.revoked:
                        block.fenced = True
                        self._settle(block)
            case TimerFired():
                while (due := self._timers.take(now)) is not None:
                    actions += self._step(self.items[due], event, now)
        return actions + self._lend(now)

    # -- routing -------------------------------------------------------------------------------------------------

    def _step(self, item: IncomingItem, event: object, now: float) -> list[ReceiverAction]:
        return self._after(item, item.handle(event, now))

    def _after(self, item: IncomingItem, actions: list[ReceiverAction]) -> list[ReceiverAction]:
        for action in actions:
            if isinstance(action, Take):
                self._taking[action.key, action.chunk.lease, action.chunk.start] = action
            elif isinstance(action, Send) and isinstance(action.message, Cancel | Release):
                self._ended(action.peer, action.message)
        if item.state.final:
            del self.items[item.key]
            self._timers.disarm(item.key)
        else:
            self._timers.arm(item.key, item.timer)
        self._queue(item)
        return actions

    def _ended(self, peer: str, word: Cancel | Release) -> None:
        """Remembers what a peer without a link cannot hear, and until it answers what it may not hear: a link that is
        about to be lost takes words along, and a peer that does not know works for nobody."""
        if isinstance(word, Cancel) or peer not in self._linked:
            self._unheard[peer, word.key] = word.epoch
            self._unheard.move_to_end((peer, word.key))
            if len(self._unheard) > MOST_UNHEARD:
                self._unheard.popitem(last=False)

    def _unheard_by(self, peer: str) -> list[ItemKey]:
        return [key for other, key in self._unheard if other == peer]

    def _message(self, event: MessageReceived, now: float) -> list[ReceiverAction]:
        peer, message = event.peer, event.message
        if not isinstance(message, Offer | Progress | Commit | Fenced | Refuse):
            raise RemoteProtocolError(peer, f"{type(message).__name__} is not a sender's word")
        actions: list[ReceiverAction] = []
        if isinstance(message, Fenced | Refuse):
            if self._unheard.get((peer, message.key), message.epoch + 1) <= message.epoch:
                del self._unheard[peer, message.key]
            old = [one for one in self.pool.lent_to(peer, message.key) if one.epoch <= message.epoch]
            if said := tuple(block.lend.lease for block in old if block.revoked and not block.fenced):
                actions.append(Revoke(NOBODY, said))
        item = self.items.get(message.key)
        if item is not None and item.peer == peer and item.epoch == message.epoch:
            try:
                return actions + self._step(item, message, now)
            except InvalidTransition as error:
                raise RemoteProtocolError(peer, f"item {message.key}: {error}") from error
        if isinstance(message, Offer) and (item is None or item.peer != peer):
            return [Send(peer, Cancel(message.key, message.epoch))]
        return actions

    def _taken(self, event: RowsTaken | RowsRefused, now: float) -> list[ReceiverAction]:
        chunk = event.chunk
        take = self._taking.pop((event.key, chunk.lease, chunk.start), None)
        block = self.pool.get(chunk.lease)
        if take is None or block is None:
            raise InvalidTransition("no such Take", type(event).__name__)
        block.pins -= 1
        block.spent.add(chunk.start, chunk.stop)
        outcome = "received" if isinstance(event, RowsTaken) else "refused"
        self.counters.rows(outcome, block.peer, chunk.stop - chunk.start)
        self.counters.meta(outcome, block.peer, take.meta)
        if isinstance(event, RowsRefused):
            event = replace(event, peer=block.peer)
        item = self.items.get(event.key)
        if item is not None and isinstance(event, RowsTaken) and take.meta is not None:
            item.meta.taken(take.meta)
        self._settle(block)
        return self._step(item, event, now) if item is not None else []

    def _settle(self, block: LentBlock) -> None:
        if self.pool.settle(block):
            owner = self.items.get(block.owner)
            if owner is not None:
                owner.lends.pop(block.lend.lease, None)
                self._queue(owner)

    def _link_up(self, peer: str, event: LinkUp, now: float) -> list[ReceiverAction]:
        """Resumes what this peer provides; has it end, and fence, what it provides no more."""
        actions: list[ReceiverAction] = []
        for item in [item for item in self.items.values() if item.peer == peer]:
            actions += self._step(item, event, now)
        stale: dict[ItemKey, int] = {}
        for key in self._unheard_by(peer):
            owner = self.items.get(key)
            if owner is None or owner.peer != peer:  # else its newer epoch ends the one before
                stale[key] = self._unheard[peer, key]
        for block in self.pool.lent_to(peer):
            owner = self.items.get(block.owner)
            if block.revoked and not block.fenced and (owner is None or owner.peer != peer):
                stale[block.owner] = max(block.epoch, stale.get(block.owner, 0))
        return actions + [Send(peer, Cancel(key, epoch)) for key, epoch in stale.items()]

    # -- blocks --------------------------------------------------------------------------------------------------

    def _queue(self, item: IncomingItem) -> None:
        """Puts an item that wants blocks into the right line, or into none; where it stands already it stays."""
        gap = self._gap(item)
        line = None if gap is None else self._eager if gap[0] < item.ready else self._early
        for other in (self._eager, self._early):
            if other is not line:
                other.remove(item.key)
        if line is not None and line.add(item.key, str(item.peer)) and line is self._eager:
            self._fresh.append(item.key)

    def _gap(self, item: IncomingItem) -> tuple[int, int] | None:
        if item.state not in (State.WAITING_FOR_INPUT, State.TRANSFERRING):
            return None
        window = self.config.window_blocks
        if len(item.lends) >= window and sum(not block.revoked for block in item.lends.values()) >= window:
            return None
        return item.claimed.first_gap(0, item.spec.rows)

    def _next(self) -> ItemKey | None:
        """Takes the next item that may have a block out of its line."""
        most = self.pool.most(self._linked)
        early = self.pool.free - 1 >= -(-self.pool.blocks // 2)
        for line in (self._eager, self._early) if early else (self._eager,):
            key = line.first(lambda peer: self.pool.held(peer) < most)
            if key is not None:
                line.remove(key)
                return key
        return None

    def _lend(self, now: float) -> list[ReceiverAction]:
        """Lends what can be lent, one block per item in turn, and states each receiver's ledger with its grant."""
        if not self._eager and not self._early:
            return []
        grants: dict[ItemKey, list[Lend]] = {}
        while self.pool.free and (key := self._next()) is not None:
            item = self.items[key]
            gap = self._gap(item)
            assert gap is not None and item.peer is not None
            stop = min(gap[1], gap[0] + self.pool.rows_per_block)
            block = self.pool.lend(key, item.peer, item.epoch, gap[0], stop)
            item.lends[block.lend.lease] = block
            item.claimed.add(gap[0], stop)
            grants.setdefault(key, []).append(block.lend)
            self._queue(item)
        for key in self._fresh:
            if key in self._eager:
                self.items[key].waits(now)
        self._fresh.clear()
        actions: list[ReceiverAction] = []
        for key, lends in grants.items():
            item = self.items[key]
            assert item.peer is not None
            actions.append(Send(item.peer, Grant(key, item.epoch, tuple(lends), item.held.told())))
        return actions

    def __repr__(self) -> str:
        return f"<Receiver {len(self.items)} items, {self.pool!r}>"
