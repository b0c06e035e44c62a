"""Who goes first of those that want the same thing: the one rule of the line before an engine, of the engine's pages
and prompt tokens, and of a tower beside it. Pure.

Theory. A request claims its place with four things: when it came, its class, how much service it still needs, and when
it is *due*. Whoever is due goes before all that are not, and among those that are due who came first goes first. All
others go by class, and within a class in the order that was chosen:

* ``first-come``: by arrival.
* ``short-first``: by the service that is still needed, so a request of text alone is not stuck behind one with
  pictures. The shortest first has the least mean wait, and who needs least delays others least. Sizes count in powers
  of two: what is nearly equal keeps the order of arrival, and a wrong prediction changes little.

Nobody starves. Time makes everybody due, and who is due once stays so. From then on only those go before it that are
due and came earlier: finitely many, and never one more. It begins when they have been served and what was at work has
ended, however many come after it. ``first-come`` has due times as well, because classes could starve one another.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import itemgetter
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

Rank = tuple[bool, int, int, float]
"""Lower goes first."""


class Claim(NamedTuple):
    """What decides the place of a request. Numbers of one line are of one kind: one clock, one unit of service."""

    arrived: float
    """When it came, or how many came before it; no two are alike."""
    due: float = -math.inf
    """From then on it goes before all that are not due. By default at once: then arrivals are all that counts."""
    priority: int = 0
    """Its class: lower goes first."""
    service: float = 0.0
    """What it still needs."""


class Order(enum.StrEnum):
    """How requests of one class go while none is due."""

    SHORT_FIRST = "short-first"
    FIRST_COME = "first-come"

    def rank(self, claim: Claim, now: float) -> Rank:
        """Whose is lower goes first at ``now``."""
        if claim.due <= now:
            return False, 0, 0, claim.arrived
        size = _size(claim.service) if self is Order.SHORT_FIRST else 0
        return True, claim.priority, size, claim.arrived


def _size(service: float) -> int:
    """The power of two above it."""
    return math.frexp(service)[1] if service > 0 else -(1 << 30)


class Queue(Generic[T]):
    """Those that wait, in their order; what is asked for is found without looking at all of them.

    Its clock does not go back. Items are told apart by identity.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._claims: dict[T, Claim] = {}
        self._early: list[tuple[Rank, T]] = []
        """Not due when that was last asked, by rank."""
        self._late: list[tuple[float, T]] = []
        """Due, by arrival."""
        self.next_due = math.inf
        """No later than when the next one becomes due, of those that were not when that was last asked."""

    def __len__(self) -> int:
        return len(self._claims)

    def __iter__(self) -> Iterator[T]:
        """In the order in which they were added."""
        return iter(self._claims)

    def add(self, item: T, claim: Claim) -> None:
        self._claims[item] = claim
        insort(self._early, (self._order.rank(claim, -math.inf), item), key=itemgetter(0))
        self.next_due = min(self.next_due, claim.due)

    def remove(self, item: T) -> None:
        """KeyError if it is not here."""
        claim = self._claims.pop(item)
        early = bisect_left(self._early, rank := self._order.rank(claim, -math.inf), key=itemgetter(0))
        if early < len(self._early) and self._early[early][0] == rank:
            del self._early[early]
        else:
            del self._late[bisect_left(self._late, claim.arrived, key=itemgetter(0))]
        if not self._claims:
            self.next_due = math.inf

    def first(self, now: float) -> T | None:
        """Who goes next; None if nobody waits."""
        self._look(now)
        line = self._late or self._early
        return line[0][1] if line else None

    def _look(self, now: float) -> None:
        """Moves those that have become due."""
        if now < self.next_due:
            return
        due = [(self._claims[item].arrived, item) for _, item in self._early if self._claims[item].due <= now]
        self._early = [entry for entry in self._early if self._claims[entry[1]].due > now]
        for entry in due:
            insort(self._late, entry, key=itemgetter(0))
        self.next_due = min((self._claims[item].due for _, item in self._early), default=math.inf)
