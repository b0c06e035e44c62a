"""What a language peer knows of a peer with a tower: the services' own book, fed with what the services are told.

That is: what it asked for itself and has seen done, what stages of its items say, and heartbeats. The costs begin with
a self-test and are learned.
"""

from __future__ import annotations

from collections.abc import Iterable

from aiodisagg.scheduler.book import PeerBook
from aiodisagg.scheduler.cost import PeerCosts, Rates, Size, Timing
from aiodisagg.scheduler.cost import ServiceTimes as SelfTest
from aiodisagg.scheduler.placement import PeerView, Placement
from aiodisagg.simulate.request import Item
from aiodisagg.simulate.times import Costs

BEAT_S = 5 / 3
"""Between two heartbeats: a third of the default lease."""
TESTED = (196, 1024, 8160)
"""Patches of the pictures of a self-test."""

Key = tuple[int, int]
"""Of an item: its request's number, and its index."""


def size_of(item: Item, costs: Costs) -> Size:
    return Size(item.patches, item.patches**2, item.rows * costs.times.row_bytes)


class Known:
    """One language peer's knowledge of one other peer, or of its own tower (``local``)."""

    def __init__(self, name: str, costs: Costs, *, local: bool) -> None:
        self.name, self._costs = name, costs
        rows = 1000
        moved_s = costs.local_s(rows) if local else costs.transfer_s(rows)
        byte_s = max(moved_s / (rows * costs.times.row_bytes), 1e-15)
        learned = PeerCosts(Rates(transfer_s=1e-6 if local else max(costs.rtt_s, 1e-6), transfer_byte_s=byte_s))
        learned.believe(
            SelfTest(
                tuple(Timing(patches, patches**2, costs.prepare_s(patches)) for patches in TESTED),
                tuple(Timing(patches, patches**2, costs.tower_s((patches,))) for patches in TESTED),
                costs.times.prepare_threads,
            )
        )
        self.book: PeerBook[Key] = PeerBook(learned)
        self._told: frozenset[int] = frozenset()

    def heard(self, patches: int, identities: frozenset[int], now: float) -> None:
        """A heartbeat."""
        self.book.heard(patches, now)
        self._told = identities

    def view(self, identities: Iterable[int], now: float) -> PeerView:
        holding = self.book.holding(map(str, identities), now)
        holding |= {str(one): 0.0 for one in identities if one in self._told and str(one) not in holding}
        book = self.book
        return PeerView(self.name, book.costs, book.backlog(now), holding=holding, doubt=book.doubt)

    def asked(self, item: Item, placement: Placement, now: float) -> None:
        self.book.asked(_key(item), str(item.identity), size_of(item, self._costs), placement, now)

    def entered(self, item: Item, stage: str, elapsed_s: float, patches: int, now: float) -> None:
        """``patches``: that wait at the peer."""
        self.book.entered(_key(item), stage, max(elapsed_s, 1e-9), now)
        if stage == "encoded":
            self.book.ready(_key(item), now)
        self.book.told(patches, now)

    def arrived(self, item: Item, now: float) -> None:
        """All of its rows are here."""
        self.book.ready(_key(item), now)  # of rows that were kept, nobody said anything
        self.book.arrived(_key(item), size_of(item, self._costs).size_bytes, now)
        self.book.left(_key(item))


def _key(item: Item) -> Key:
    return item.request.number, item.index
