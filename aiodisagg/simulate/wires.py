"""How rows get from the peer that encodes to the peer that computes: as times of a link."""

from __future__ import annotations

from collections.abc import Callable

from aiodisagg.simulate.clock import Clock
from aiodisagg.simulate.request import Item
from aiodisagg.simulate.times import Costs
from aiodisagg.simulate.tower import Tower

Arrived = Callable[[Item], None]


class Ways:
    """When what peers send each other is there: each sends one thing at a time, and receives one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sends_until: dict[str, float] = {}
        self._receives_until: dict[str, float] = {}

    def ends(self, sender: str, receiver: str, moves_s: float) -> float:
        """The next thing between the two takes ``moves_s``; what takes no time waits for nothing."""
        if not moves_s:
            return self._clock.now
        free = max(self._sends_until.get(sender, 0.0), self._receives_until.get(receiver, 0.0))
        ends = self._sends_until[sender] = self._receives_until[receiver] = max(self._clock.now, free) + moves_s
        return ends


class TimedWires:
    """Half a round trip to ask, half a round trip and the bytes to bring; each peer sends, and receives, one item at
    a time at the link's rate. Within a peer there is no round trip, and the bytes go at a rate of their own.
    ``item.arrived`` grows, and ``arrived(item)`` is called each time."""

    def __init__(self, clock: Clock, costs: Costs, arrived: Arrived) -> None:
        self._clock, self._costs, self._arrived = clock, costs, arrived
        self._ways = Ways(clock)

    def fetch(self, item: Item, tower: Tower, encoder: str, receiver: str) -> None:
        """Asks ``encoder``, whose tower it is, for an item."""
        costs, local = self._costs, encoder == receiver
        half = 0.0 if local else costs.rtt_s / 2

        def rows(item: Item) -> None:
            moves_s = costs.local_s(item.rows) if local else costs.transfer_s(item.rows)
            self._later(self._ways.ends(encoder, receiver, moves_s) + half, self._here, item)

        self._later(self._clock.now + half, tower.submit, item, rows)

    def _later(self, at: float, call: Callable[..., None], *what: object) -> None:
        """Now, if that is the time."""
        if at > self._clock.now:
            self._clock.at(at, call, *what)
        else:
            call(*what)

    def _here(self, item: Item) -> None:
        item.arrived = item.rows
        self._arrived(item)
