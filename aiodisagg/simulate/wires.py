"""How rows get from the peer that encodes to the peer that computes: as times of a link."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from aiodisagg.simulate.clock import Clock
from aiodisagg.simulate.request import Item
from aiodisagg.simulate.times import Costs
from aiodisagg.simulate.tower import Tower

Arrived = Callable[[Item], None]


class Wires(Protocol):
    """``fetch`` asks ``encoder`` for an item; ``item.arrived`` grows and ``arrived(item)`` is called each time."""

    def fetch(self, item: Item, tower: Tower, encoder: str, receiver: str) -> None: ...


class TimedWires:
    """Half a round trip to ask, half a round trip and the bytes to bring; each peer sends, and receives, one item at
    a time at the link's rate. Within a peer nothing takes time."""

    def __init__(self, clock: Clock, costs: Costs, arrived: Arrived) -> None:
        self._clock, self._costs, self._arrived = clock, costs, arrived
        self._sends_until: dict[str, float] = {}
        self._receives_until: dict[str, float] = {}
        self.moved_rows = 0

    def fetch(self, item: Item, tower: Tower, encoder: str, receiver: str) -> None:
        if encoder == receiver:
            tower.submit(item, self._here)
            return

        def rows(item: Item) -> None:
            now, half = self._clock.now, self._costs.rtt_s / 2
            begins = max(now, self._sends_until.get(encoder, 0.0), self._receives_until.get(receiver, 0.0))
            ends = begins + self._costs.transfer_s(item.rows)
            self._sends_until[encoder] = self._receives_until[receiver] = ends
            self.moved_rows += item.rows
            self._clock.at(ends + half, self._here, item)

        self._clock.at(self._clock.now + self._costs.rtt_s / 2, tower.submit, item, rows)

    def _here(self, item: Item) -> None:
        item.arrived = item.rows
        self._arrived(item)
