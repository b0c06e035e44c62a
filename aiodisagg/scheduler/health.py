"""When to trust whom: late items are asked of a second peer, killers of encoders are refused, slow peers are suspects.

**Hedge.** An item is *overdue* when it is neither complete nor all there at its encoder long after its predicted
finish. It is then fetched a second time, from another peer that is predicted to deliver sooner than the wait so far
went on; the first to land wins. At most one hedge an item, and few at once, so that a slow day is not doubled.

**Poison.** An item that was in the tower when its encoder died is a *suspect*. Suspects are tried one at a time a
peer, so that a bystander that shared a batch with a killer does not share the next one; a suspect that is encoded is
cleared; one with which a second encoder dies is refused, and remembered for a while: its clients will try again. A
link that comes back to the same process was only cut, and nobody died.

**Standing.** A peer stands as membership says, and is a suspect for a while after it lost hedges. All of it is
forgiven with time, or by one delivered item: a busy peer is not a dead one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from aiodisagg.scheduler.placement import Standing

K = TypeVar("K", bound=Hashable)

REMEMBERED = 4096
"""Digests and peers of which something is remembered; beyond that the oldest is forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """``hedge_factor``, ``hedge_slack_s``: an item is overdue after this many times its predicted seconds, and at least
    this much later than predicted; slack 0: nothing is hedged. ``hedged_share``: of the open items that may be hedged,
    but always one. ``deaths``: encoders that may die with an item. ``poison_s``: how long a poison item is remembered.
    ``lost_hedges``: in a row, before a peer is a suspect; for ``suspect_s``.
    """

    hedge_factor: float = 3.0
    hedge_slack_s: float = 2.0
    hedged_share: float = 0.1
    deaths: int = 2
    poison_s: float = 600.0
    lost_hedges: int = 2
    suspect_s: float = 30.0


class Hedges(Generic[K]):
    """Which items are overdue, and which may be fetched twice."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.started = self.won = 0
        """Hedges begun, and those that landed before the first fetch."""
        self._due: dict[K, float] = {}
        self._hedged: set[K] = set()

    def asked(self, key: K, predicted_s: float, now: float) -> None:
        """The item was asked for and is predicted to be complete ``predicted_s`` from now."""
        slack_s = self.config.hedge_slack_s
        if slack_s > 0:
            self._due[key] = now + max(self.config.hedge_factor * predicted_s, predicted_s + slack_s)

    def settled(self, key: K) -> None:
        """Its rows exist at the peer, or the peer has nothing more to do with it: it is not late there."""
        self._due.pop(key, None)

    def over(self, key: K) -> None:
        """The item is complete or given up."""
        self._due.pop(key, None)
        self._hedged.discard(key)

    def next_timer(self) -> float | None:
        """When the next item becomes overdue."""
        return min(self._due.values(), default=None)

    def overdue(self, now: float) -> list[K]:
        """Items that are late, the latest first; each is named once."""
        late = sorted((due, str(key), key) for key, due in self._due.items() if due <= now)
        for _, _, key in late:
            del self._due[key]
        return [key for _, _, key in late]

    def later(self, key: K, seconds: float, now: float) -> None:
        """An overdue item could not be hedged now; look again."""
        self._due[key] = now + seconds

    def allowed(self, open_items: int) -> bool:
        """Whether one more may be fetched twice."""
        return len(self._hedged) < max(1, int(open_items * self.config.hedged_share))

    def hedged(self, key: K) -> None:
        """``key`` is the second fetch of an item."""
        self.started += 1
        self._hedged.add(key)


class Poison:
    """Digests that were in a tower when their encoder died. ``now`` is any monotonic clock in seconds."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.refused = 0
        self._deaths: OrderedDict[str, tuple[frozenset[str], float]] = OrderedDict()

    def died(self, peer: str, in_tower: Iterable[str], now: float) -> None:
        """The peer's link was lost while these digests were in its tower."""
        for digest in in_tower:
            peers, _ = self._deaths.pop(digest, (frozenset(), now))
            self._deaths[digest] = (peers | {peer}, now)
        while len(self._deaths) > REMEMBERED:
            self._deaths.popitem(last=False)

    def lives(self, peer: str) -> None:
        """The peer's process is there after all."""
        for digest, (peers, when) in list(self._deaths.items()):
            if peer in peers:
                self._put(digest, peers - {peer}, when)

    def encoded(self, digest: str) -> None:
        """It went well."""
        self._deaths.pop(digest, None)

    def deaths(self, digest: str, now: float) -> int:
        peers, when = self._deaths.get(digest, (frozenset(), now))
        if now - when >= self.config.poison_s:
            self._deaths.pop(digest, None)
            return 0
        return len(peers)

    def suspect(self, digest: str, now: float) -> bool:
        """It may share a peer with no other suspect."""
        return self.deaths(digest, now) > 0

    def refuses(self, digest: str, now: float) -> bool:
        """It is poison: it must not be asked of anybody. Counts when it says so."""
        poison = self.deaths(digest, now) >= self.config.deaths
        self.refused += poison
        return poison

    def _put(self, digest: str, peers: frozenset[str], when: float) -> None:
        if peers:
            self._deaths[digest] = (peers, when)
        else:
            del self._deaths[digest]


class Standings:
    """How peers stand: what membership says of them, and what was seen of them."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self._told: dict[str, Standing] = {}
        self._lost: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def told(self, peer: str, standing: Standing | None) -> None:
        """Membership says so; None: the peer is gone, and what was known of it with it."""
        if standing is None:
            self._told.pop(peer, None)
            self._lost.pop(peer, None)
        else:
            self._told[peer] = standing

    def lost_hedge(self, peer: str, now: float) -> None:
        """Another peer, asked later, was faster."""
        count, _ = self._lost.pop(peer, (0, now))
        self._lost[peer] = (count + 1, now)
        while len(self._lost) > REMEMBERED:
            self._lost.popitem(last=False)

    def delivered(self, peer: str) -> None:
        """An item of the peer is complete."""
        self._lost.pop(peer, None)

    def of(self, peer: str, now: float) -> Standing:
        told = self._told.get(peer, Standing.READY)
        count, when = self._lost.get(peer, (0, now))
        slow = count >= self.config.lost_hedges and now - when < self.config.suspect_s
        return max(told, Standing.SUSPECT) if slow else told
