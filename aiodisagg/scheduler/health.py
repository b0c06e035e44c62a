"""When to trust whom: late items are asked of a second peer, killers of encoders are refused, slow peers are suspects.

**Hedge.** An item is *overdue* when it is neither complete nor all there at its encoder long after its predicted
finish. It is then fetched a second time, from another peer that is predicted to deliver sooner than the wait so far
went on; the first to land wins. At most one hedge an item, and few at once, so that a slow day is not doubled.

**Poison.** An item that was in the tower when its encoder died is a *suspect*. It is alone in the next tower, so that
a bystander that shared a batch with a killer does not share one with another, whoever asked for that; a suspect that
is encoded is cleared; one with which a second encoder dies is refused, and remembered for a while: its clients will
try again. A link that is lost is no death yet: the process is known to be dead when nobody listens where it did, when
another life of it answers there, or when membership says so. One that nothing is heard of is waited for a little,
where its death would be one too many, and then the item is tried on: a network that is cut makes no poison.

**Standing.** A peer stands as membership says, and is a suspect for a while once it failed several times in a row:
refused items that others then delivered, was left because it did not deliver, lost hedges. A peer that fails at once
has nothing to do and would look like the fastest of all. Until somebody delivers it may be the item: who refused one is
only *doubted* until it delivers another, and items that were refused are not taken to doubted peers if there are
others. When the while is over one item is tried; it is twice as long
each time. One delivered item forgives everything: a busy peer is not a dead one. A peer that refuses an item because
it drains does so for the rest of its life: where peers are listed, instead of registered, nobody else tells of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from aiodisagg.protocol.timers import Timers
from aiodisagg.scheduler.placement import Standing

K = TypeVar("K", bound=Hashable)

REMEMBERED = 4096
"""Digests and peers of which something is remembered; beyond that the oldest is forgotten."""

ITEMS_FAULT = frozenset({"invalid_media", "wrong_shape", "too_large", "poison"})
"""Codes of refusals that any peer would give."""
NO_FAULT = ITEMS_FAULT | {"draining", "cancelled", "misnamed"}
"""Codes of refusals that say nothing against a peer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """``hedge_factor``, ``hedge_slack_s``: an item is overdue after this many times its predicted seconds, and at least
    this much later than predicted; slack 0: nothing is hedged. ``hedged_share``: of the open items that may be hedged,
    but always one. ``deaths``: encoders that may die with an item. ``poison_s``: how long a poison item is remembered.
    ``confirm_s``: how long after a link was lost it is waited for whether its process died. ``failures``: in a row,
    before a peer is a suspect; for ``suspect_s``, later for twice as long each time, ``suspect_most_s`` at most.
    """

    hedge_factor: float = 3.0
    hedge_slack_s: float = 2.0
    hedged_share: float = 0.1
    deaths: int = 2
    poison_s: float = 600.0
    confirm_s: float = 5.0
    failures: int = 2
    suspect_s: float = 10.0
    suspect_most_s: float = 300.0


class Hedges(Generic[K]):
    """Which items are overdue, and which may be fetched twice."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.started = self.won = 0
        """Hedges begun, and those that landed before the first fetch."""
        self._due: Timers[K] = Timers()
        self._hedged: set[K] = set()

    def asked(self, key: K, predicted_s: float, now: float) -> None:
        """The item was asked for and is predicted to be complete ``predicted_s`` from now."""
        slack_s = self.config.hedge_slack_s
        if slack_s > 0:
            self._due.arm(key, now + max(self.config.hedge_factor * predicted_s, predicted_s + slack_s))

    def settled(self, key: K) -> None:
        """Its rows exist at the peer, or the peer has nothing more to do with it: it is not late there."""
        self._due.disarm(key)

    def over(self, key: K) -> None:
        """The item is complete or given up."""
        self._due.disarm(key)
        self._hedged.discard(key)

    def next_timer(self) -> float | None:
        """When the next item becomes overdue."""
        return self._due.next()

    def overdue(self, now: float) -> list[K]:
        """Items that are late, the latest first; each is named once."""
        late = []
        while (key := self._due.take(now)) is not None:
            late.append(key)
        return late

    def later(self, key: K, seconds: float, now: float) -> None:
        """An overdue item could not be hedged now; look again."""
        self._due.arm(key, now + seconds)

    def allowed(self, open_items: int) -> bool:
        """Whether one more may be fetched twice."""
        return len(self._hedged) < max(1, int(open_items * self.config.hedged_share))

    def hedged(self, key: K) -> None:
        """``key`` is the second fetch of an item."""
        self.started += 1
        self._hedged.add(key)


@dataclass(slots=True)
class _Accused:
    """A digest: whose links were lost with it in the tower, and when; who of them is known to be dead; the latest."""

    when: float
    cut: dict[str, float] = field(default_factory=dict)
    died: set[str] = field(default_factory=set)


class Poison:
    """Digests that were in a tower when their encoder died. ``now`` is any monotonic clock in seconds."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.refused = 0
        self._accused: OrderedDict[str, _Accused] = OrderedDict()

    def cut(self, peer: str, in_tower: Iterable[str], now: float) -> None:
        """The peer's link was lost while these digests were in its tower."""
        for digest in in_tower:
            accused = self._accused.pop(digest, None) or _Accused(now)
            accused.when = accused.cut[peer] = now
            self._accused[digest] = accused
        while len(self._accused) > REMEMBERED:
            self._accused.popitem(last=False)

    def died(self, peer: str) -> None:
        """The peer's process is known to be dead."""
        for accused in self._accused.values():
            if accused.cut.pop(peer, None) is not None:
                accused.died.add(peer)

    def lives(self, peer: str) -> None:
        """The peer's process is there after all."""
        for digest, accused in list(self._accused.items()):
            accused.cut.pop(peer, None)
            accused.died.discard(peer)
            if not accused.cut and not accused.died:
                del self._accused[digest]

    def encoded(self, digest: str) -> None:
        """It went well."""
        self._accused.pop(digest, None)

    def suspect(self, digest: str, now: float) -> bool:
        """It is to be alone in a tower."""
        return self._of(digest, now) is not None

    def refuses(self, digest: str, now: float) -> bool:
        """It is poison: it must not be asked of anybody. Counts when it says so."""
        accused = self._of(digest, now)
        poison = accused is not None and len(accused.died) >= self.config.deaths
        self.refused += poison
        return poison

    def unsure_s(self, digest: str, now: float) -> float:
        """For how long it should not be asked of anybody, because it may be found to be poison any moment; or 0."""
        accused = self._of(digest, now)
        if accused is None:
            return 0.0
        left = sorted(s for when in accused.cut.values() if (s := when + self.config.confirm_s - now) > 0)
        too_many = len(accused.died) + len(left) - self.config.deaths
        return left[too_many] if 0 <= too_many < len(left) else 0.0

    def _of(self, digest: str, now: float) -> _Accused | None:
        accused = self._accused.get(digest)
        if accused is not None and now - accused.when >= self.config.poison_s:
            del self._accused[digest]
            return None
        return accused


@dataclass(slots=True)
class _Record:
    """Failures in a row, how often the peer became a suspect of them, and until when it is one."""

    failures: int = 0
    spells: int = 0
    until: float = -math.inf


class Standings:
    """How peers stand: what membership says of them, and what was seen of them."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self._told: dict[str, Standing] = {}
        self._drains: OrderedDict[str, None] = OrderedDict()
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self.doubted: OrderedDict[str, None] = OrderedDict()

    def told(self, peer: str, standing: Standing | None) -> None:
        """Membership says so; None: the peer is gone, and what was known of it with it."""
        if standing is None:
            self._told.pop(peer, None)
            self._records.pop(peer, None)
            self.doubted.pop(peer, None)
        else:
            self._told[peer] = standing

    def drains(self, peer: str) -> None:
        """It says so itself: whatever membership has heard, it takes no new item in this life."""
        self._drains[peer] = None
        if len(self._drains) > REMEMBERED:
            self._drains.popitem(last=False)

    def failed(self, peer: str, now: float) -> float:
        """It did not do what it was asked for, and another may. Returns for how many seconds it is a suspect because of
        this, 0.0 if it is none or was one before."""
        record = self._records.setdefault(peer, _Record())
        self._records.move_to_end(peer)
        if len(self._records) > REMEMBERED:
            self._records.popitem(last=False)
        if now >= record.until:  # of a suspect it is no news, as of items that were asked for together
            record.failures += 1
            if record.failures >= self.config.failures:
                return self._suspect(record, now)
        return 0.0

    def asked(self, peer: str, now: float) -> float:
        """It has a new item. For one that was a suspect this is the trial: it is one again until the item is here, for
        as many seconds as is returned at most; 0.0: it was none."""
        record = self._records.get(peer)
        if record is not None and record.spells and now >= record.until:
            return self._suspect(record, now)
        return 0.0

    def _suspect(self, record: _Record, now: float) -> float:
        config = self.config
        seconds = min(config.suspect_s * 2.0 ** min(record.spells, 30), config.suspect_most_s)
        record.until = now + seconds
        record.spells += 1
        return seconds

    def refused(self, peer: str) -> None:
        """It refused an item, and nobody knows yet whether another may take it."""
        self.doubted[peer] = None
        if len(self.doubted) > REMEMBERED:
            self.doubted.popitem(last=False)

    def delivered(self, peer: str) -> bool:
        """An item of the peer is complete. Returns whether it was a suspect until now."""
        self.doubted.pop(peer, None)
        record = self._records.pop(peer, None)
        return record is not None and record.spells > 0

    def of(self, peer: str, now: float) -> Standing:
        told, record = self._told.get(peer, Standing.READY), self._records.get(peer)
        if peer in self._drains:
            told = Standing.DRAINING
        return told if record is None or now >= record.until else max(told, Standing.SUSPECT)
