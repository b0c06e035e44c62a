"""What is known of one encode peer: its costs, what it was asked for, and what its heartbeats say of others' work.

The costs are calibrated here, from what an encode peer says of each item (stage ``s`` was entered, the one before took
``elapsed_s``) and from when rows were here:

| seen | is an observation of |
|---|---|
| ``prepared``, or ``encoding`` without it, elapsed | prepare |
| ``encoding`` ... ``encoded``, elapsed | the tower, over the items that left it together |
| all rows exist ... all rows are here | the transfer of the rows that were still missing |
| asked ... all rows are here | the predicted finish: nothing is learned, its error is counted |

An item whose link was cut, or that left the peer, teaches nothing; the first ones teach nothing of the way, which opens
with them: memory is mapped, device pools are opened.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from aiodisagg.scheduler.cost import PeerCosts, Size
from aiodisagg.scheduler.placement import Backlog, Placement

K = TypeVar("K", bound=Hashable)

IDLE = Backlog()
NONE = Size(0, 0)
MADE = 1024
"""Digests that the peer made rows of, the latest: it may hold them still."""
TOGETHER_S = 1e-3
"""Items that leave a tower within this time left it together."""
TOLD_AGAIN_S, TOLD_LONG_AGO_S = 5.0, 60.0
"""Heartbeats of a peer that are alike are not passed on. So what one told melts away for the first of these, in which
the next one must have come; then it counts as told again, since a peer that hangs looked idle otherwise; and after the
second it counts no more: perhaps nobody passes anything on."""
MOST_PATCHES = 2**62
"""That a heartbeat can tell of. What an older server passed on may be too large for a float."""
TYPICAL_PATCHES = 4096
"""Of an item of which only patches are known, as in heartbeats."""


@dataclass(slots=True)
class _Open:
    digest: str
    size: Size
    placed: Placement
    asked: float
    missing_bytes: int
    stage: str = ""
    entered: float = 0.0
    """When it came into the tower."""
    prepares: bool = True
    """Its preparing is still ahead, or under way."""
    encodes: bool = True
    ready: float | None = None
    ready_bytes: int = 0
    """Of what was missing when all rows existed."""
    clean: bool = True
    """Nothing happened to it that makes its times strange."""
    in_parts: bool = False
    """Some of its rows exist, and others do not."""
    connects: bool = False
    """It was asked for before anything had come from the peer: the way here may have been made for it."""


class PeerBook(Generic[K]):
    """Keeps account of one incarnation of an encode peer. ``now`` is any monotonic clock in seconds.

    Args:
        costs: calibrated here; may be shared with nobody.
    """

    def __init__(self, costs: PeerCosts) -> None:
        self.costs = costs
        self.open: dict[K, _Open] = {}
        self.size_bytes = 0
        """Bytes of the rows of open items."""
        self._prepare_s = self._tower_s = self._transfer_s = self._there_s = 0.0
        self._patches = 0
        self._beat: tuple[int, float] = (0, -math.inf)
        self._told: tuple[int, float] = (0, -math.inf)
        """Patches of others' items, and when that was: in the last heartbeat, and in whatever was heard last."""
        self._made: OrderedDict[str, None] = OrderedDict()
        self._latest: dict[str, K] = {}
        self._in_tower: dict[K, float] = {}
        self._leaving = NONE
        """Of the batch that is leaving the tower, what has left so far, added up."""
        self._began = self._longest_s = 0.0
        self._first_left = self._left_tower = -1e9
        """When the first of that batch left, and the latest."""
        self._came = False
        """Rows have come from the peer."""

    def asked(self, key: K, digest: str, size: Size, placed: Placement, now: float) -> None:
        """The peer was asked for an item, as placement predicted it."""
        self.open[key] = _Open(digest, size, placed, now, size.size_bytes, connects=not self._came)
        self._latest[digest] = key
        self.size_bytes += size.size_bytes
        self._transfer_s += placed.service.transfer_s
        if not placed.held:
            self._prepare_s += placed.service.prepare_s
            self._tower_s += placed.service.tower_s
            self._patches += size.patches

    def entered(self, key: K, stage: str, elapsed_s: float, now: float) -> None:
        """The peer says that the item entered ``stage`` and that the one before took ``elapsed_s``."""
        item = self.open.get(key)
        if item is None:
            return
        if item.stage == stage or elapsed_s <= 0:  # 0: more rows exist, no stage was entered
            item.in_parts |= stage == "encoding"
            return
        item.stage = stage
        if item.placed.held:
            if stage in ("preparing", "prepared"):  # it has dropped them meanwhile
                self._made.pop(item.digest, None)
            return
        if item.encodes and item.prepares and stage in ("prepared", "encoding", "encoded"):
            item.prepares = False
            self._prepare_s -= item.placed.service.prepare_s
            if stage != "encoded" and item.clean:
                self.costs.prepared(item.size, elapsed_s)
        if stage == "encoding":
            item.entered = self._in_tower[key] = now
        elif stage == "encoded" and self._in_tower.pop(key, None) is not None and item.clean:
            self._departed(item, elapsed_s, now)

    def _departed(self, item: _Open, elapsed_s: float, now: float) -> None:
        """The item left the tower. It worked on the item since the one before left, or since the item came.

        Items that leave together were one batch, however many: they are one observation, made when the next one leaves.
        It is of another batch if it leaves later, or came when the first of these had left: small batches follow close.
        """
        for other in map(self.open.__getitem__, self._in_tower):
            other.clean &= not other.in_parts  # this one went between them
        if now - self._left_tower > TOGETHER_S or item.entered >= self._first_left:
            self._observe_tower()
            self._began, self._first_left = max(self._left_tower, item.entered), now
        before, size = self._leaving, item.size
        self._leaving = Size(before.patches + size.patches, before.squares + size.squares)
        self._longest_s = max(self._longest_s, elapsed_s)
        self._left_tower = now

    def _observe_tower(self) -> None:
        """Others' items may have been between: not longer than the item's own time there."""
        seconds = min(self._left_tower - self._began, self._longest_s)
        if self._leaving is not NONE and seconds > 0:
            self.costs.encoded([self._leaving], seconds)
        self._leaving, self._longest_s = NONE, 0.0

    def ready(self, key: K, now: float) -> None:
        """All rows of the item exist at the peer."""
        item = self.open.get(key)
        if item is None or item.ready is not None:
            return
        item.ready, item.ready_bytes = now, item.missing_bytes
        self._there_s += item.placed.service.transfer_s
        self._made[item.digest] = None
        self._made.move_to_end(item.digest)
        if len(self._made) > MADE:
            self._made.popitem(last=False)
        self._out_of_queues(item)

    def _out_of_queues(self, item: _Open) -> None:
        """Nothing is left to be encoded of it."""
        if item.placed.held or not item.encodes:
            return
        item.encodes = False
        if item.prepares:
            self._prepare_s -= item.placed.service.prepare_s
        self._tower_s -= item.placed.service.tower_s
        self._patches -= item.size.patches

    def arrived(self, key: K, size_bytes: int, now: float) -> None:
        """Bytes of the item's rows are here."""
        item = self.open.get(key)
        if item is None:
            return
        item.missing_bytes -= size_bytes
        if item.missing_bytes > 0:
            return
        self._came = True
        if not item.clean or item.connects:
            return
        if item.ready is not None and item.ready_bytes > 0:
            self.costs.transferred(item.ready_bytes, now - item.ready)
        self.costs.finished(item.placed.finish_s, now - item.asked)

    def disturbed(self, key: K | None = None) -> None:
        """The link was cut or the item was asked for again: its times say nothing. None: all items."""
        for item in self.open.values() if key is None else filter(None, [self.open.get(key)]):
            item.clean = False

    def left(self, key: K) -> None:
        """The item is complete, given up, or asked of another peer. Does nothing if it was not asked for here."""
        item = self.open.pop(key, None)
        if item is None:
            return
        self._out_of_queues(item)
        self._transfer_s -= item.placed.service.transfer_s
        if item.ready is not None:
            self._there_s -= item.placed.service.transfer_s
        self.size_bytes -= item.size.size_bytes
        self._in_tower.pop(key, None)
        if self._latest.get(item.digest) == key:
            del self._latest[item.digest]
        if not self.open:  # sums of floats drift
            self._prepare_s = self._tower_s = self._transfer_s = self._there_s = 0.0

    def heard(self, queued_patches: int, now: float) -> None:
        """A heartbeat: patches that the peer has not encoded yet, for whomever."""
        self.told(queued_patches, now)
        self._beat = self._told

    def told(self, queued_patches: int, now: float) -> None:
        """The same, said with an item: it will not be said again."""
        self._told = (min(max(0, queued_patches - self._patches), MOST_PATCHES), now)

    def knows(self, digests: Iterable[str]) -> bool:
        """Whether the peer has or is encoding one of these for this side, as far as is known here."""
        return not (self._latest.keys().isdisjoint(digests) and self._made.keys().isdisjoint(digests))

    def holding(self, digests: Iterable[str], now: float) -> dict[str, float]:
        """Which of the digests the peer has or is encoding for this side; seconds until their rows exist."""
        found = {}
        for digest in digests:
            key = self._latest.get(digest)
            if key is not None and self.open[key].ready is None:
                item = self.open[key]
                found[digest] = max(0.0, item.asked + item.placed.ready_s - now)
            elif key is not None or digest in self._made:
                found[digest] = 0.0
        return found

    def in_tower(self) -> list[str]:
        """Digests of the items that are in the tower now, as far as was heard."""
        return [self.open[key].digest for key in self._in_tower if self.open[key].ready is None]

    @property
    def doubt(self) -> float:
        """How far predicted finishes are off, as ``PeerView.doubt``; before the first one, anything is possible."""
        return self.costs.finish_error if self.costs.finishes else 1.0

    def backlog(self, now: float) -> Backlog:
        """What an item that is asked for now has to wait for."""
        if not self.open and not self._told[0] and not self._beat[0]:
            return IDLE
        return Backlog(
            max(0.0, self._prepare_s) / self.costs.prepare_threads,
            max(0.0, self._tower_s - self._running_s(now)) + self._foreign_s(now),
            max(0.0, self._transfer_s),
            max(0.0, self._there_s),
        )

    def _running_s(self, now: float) -> float:
        """How long the tower has been at what is in it; what waits behind that does not become less by it."""
        if not self._in_tower:
            return 0.0
        predicted_s = sum(
            item.placed.service.tower_s for item in map(self.open.__getitem__, self._in_tower) if item.encodes
        )
        return min(now - max(self._left_tower, min(self._in_tower.values())), predicted_s)

    def _foreign_s(self, now: float) -> float:
        """Others' work that is left of what was heard last."""
        patches, heard = self._told if now - self._told[1] < TOLD_AGAIN_S else self._beat
        since_s = now - heard
        if not patches or since_s >= TOLD_LONG_AGO_S:
            return 0.0
        items = patches / TYPICAL_PATCHES
        work_s = self.costs.tower.predict((items, patches, patches * TYPICAL_PATCHES))
        return max(0.0, work_s - since_s) if since_s < TOLD_AGAIN_S else work_s
