"""Whose turn it is to get an item though others are predicted to be faster.

What is believed of a peer is corrected by the items that it gets. One whose self-test was disturbed, or that became
faster, would get none, and stay what it is believed to be. So a peer that got none of the last ``EVERY`` items is tried
with one. If it is believed to be faster by that, others follow until it is not, or it gets items by itself; if not, it
is tried again after twice as many items: a peer that really is slow costs less and less. Whoever has many slow peers
tries one after the other, ``BETWEEN`` items apart, who was asked longest ago first: all at once would be what most
items go to, and other language peers try them as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from aiodisagg.scheduler.cost import Size
from aiodisagg.scheduler.placement import PeerView, Placement, Standing, Wanted, place

EVERY, DOUBLINGS = 256, 6
BETWEEN = 128
APART = 16
"""Items between two of one trial: the first should be there by then."""
FASTER = 0.9
"""A peer is believed to be faster if it is predicted to take this part of what it was, for ``TYPICAL``."""
TYPICAL = Size.of((1, 64, 64), 1 << 24)
REMEMBERED = 4096
"""Peers of which something is remembered; beyond that the one that was asked longest ago is forgotten."""


@dataclass(slots=True)
class _Record:
    """When it got its latest item, counted in items; how many trials were in vain, since it last got one by itself;
    what it was predicted to take when the latest began."""

    latest: int
    tries: int = 0
    believed_s: float = 0.0


class Trials:
    """One language peer's encode peers."""

    def __init__(self) -> None:
        self._placed = 0
        self._begun = -BETWEEN
        """When the latest trial began, of whomever, counted in items."""
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def place(self, wanted: Wanted, peers: Iterable[PeerView]) -> Placement | None:
        """A place for the item at a peer that is to be tried with it now, if there is one among those that are ready;
        it counts as tried."""
        due = [view for view in peers if view.standing is Standing.READY and self._due(view)]
        if not due:
            return None
        view = min(due, key=lambda view: (self._records[view.peer].latest, view.peer))
        record, takes_s = self._records[view.peer], view.costs.predict(TYPICAL).total_s
        if record.tries and takes_s < FASTER * record.believed_s:
            record.tries = 0
        else:
            self._begun = self._placed
        record.believed_s = takes_s
        return place(wanted, [view])

    def _due(self, view: PeerView) -> bool:
        record = self._records.get(view.peer)
        if record is None:
            record = self._add(view.peer)
        ago = self._placed - record.latest
        if ago < APART:
            return False
        if record.tries and view.costs.predict(TYPICAL).total_s < FASTER * record.believed_s:
            return True
        return ago >= EVERY << min(record.tries, DOUBLINGS) and self._placed - self._begun >= BETWEEN

    def asked(self, peer: str, *, trial: bool) -> None:
        """It got an item. ``trial``: because it was due."""
        record = self._records.get(peer) or self._add(peer)
        self._placed += 1
        record.latest = self._placed
        record.tries = record.tries + 1 if trial else 0
        self._records.move_to_end(peer)

    def gone(self, peer: str) -> None:
        self._records.pop(peer, None)

    def _add(self, peer: str) -> _Record:
        record = self._records[peer] = _Record(self._placed)
        if len(self._records) > REMEMBERED:
            self._records.popitem(last=False)
        return record
