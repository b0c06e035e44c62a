"""Whose turn it is to get an item though others are predicted to be faster.

What is believed of a peer is corrected by the items that it gets. One whose self-test was disturbed, or that became
faster, would get none, and stay what it is believed to be. So a peer that got none of the last ``EVERY`` items is
tried with ``IN_A_TRIAL`` items, each some items after the one before: enough to be believed. If it gets none by itself
after that it is tried again after twice as many: a peer that really is slow costs less and less.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from aiodisagg.scheduler.placement import PeerView, Placement, Standing, Wanted, place

EVERY, DOUBLINGS = 256, 6
IN_A_TRIAL, APART = 8, 16
REMEMBERED = 4096
"""Peers of which something is remembered; beyond that the one that was asked longest ago is forgotten."""


@dataclass(slots=True)
class _Record:
    """When it got its latest item, counted in items; how many were trials, since it last got one by itself."""

    latest: int
    tries: int = 0


class Trials:
    """One language peer's encode peers."""

    def __init__(self) -> None:
        self._placed = 0
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def place(self, wanted: Wanted, peers: Iterable[PeerView]) -> Placement | None:
        """A place for the item at a peer that is due, if there is one among those that are ready."""
        return place(wanted, [view for view in peers if view.standing is Standing.READY and self._due(view.peer)])

    def _due(self, peer: str) -> bool:
        record = self._records.get(peer)
        if record is None:
            record = self._add(peer)
        begun, trials = record.tries % IN_A_TRIAL, record.tries // IN_A_TRIAL
        return self._placed - record.latest >= (APART if begun else EVERY << min(trials, DOUBLINGS))

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
