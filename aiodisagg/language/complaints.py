"""What is held against encode peers, and said of them: refusals, and items that did not come."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily

from aiodisagg.protocol.counters import PeerLabels
from aiodisagg.protocol.messages import ItemKey, Refuse
from aiodisagg.protocol.patience import NOT_FINITE
from aiodisagg.scheduler.health import NO_FAULT

logger = logging.getLogger(__name__)

CODES = NO_FAULT | {"encode_failed", "prepare_failed", "model_mismatch", NOT_FINITE}
"""Of refusals, in metrics; what else a peer says is ``other``."""


@dataclass(slots=True)
class _Complaints:
    """About one life of a peer. ``warned``: of what, since it delivered last. ``refusal``: its last one."""

    warned: set[str] = field(default_factory=set)
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A peer refused an item that another may take."""

    peer: str
    name: str
    code: str
    when: float


class Complaints:
    """Peers are named by incarnation."""

    def __init__(self) -> None:
        self._about: dict[str, _Complaints] = {}
        self._refusals: Counter[tuple[str, str]] = Counter()
        """By incarnation and code; of peers that are gone under ``""``."""
        self._open: dict[ItemKey, dict[str, Refusal]] = {}
        """Of items that are still fetched: who is to blame is known when somebody delivers, or nobody."""
        self.pending: Counter[str] = Counter()
        """How many of them by peer."""

    def refused(self, peer: str, name: str, refusal: Refuse, now: float) -> None:
        code = refusal.code if refusal.code in CODES else "other"
        self._refusals[peer, code] += 1
        said = f"{refusal.code}: {refusal.message[:500]}"
        self.warn(peer, name, code, f"refused item {refusal.key}: {said}")
        self._about[peer].refusal = said
        if refusal.code not in NO_FAULT:
            self.pending[peer] += peer not in self._open.get(refusal.key, {})
            self._open.setdefault(refusal.key, {})[peer] = Refusal(peer, name, code, now)

    def warn(self, peer: str, name: str, code: str, what: str) -> None:
        """Once for each code, until the peer delivers."""
        about = self._about.setdefault(peer, _Complaints())
        if code not in about.warned:
            about.warned.add(code)
            logger.warning("encode peer %s (%s) %s", name, peer, what)

    def over(self, key: ItemKey, provider: str = "") -> Iterator[Refusal]:
        """The item was delivered by ``provider``, or by nobody. Returns the refusals that were the refusers' fault."""
        refusals = self._open.pop(key, {})
        if refusals:
            self.pending -= Counter(refusals.keys())
        return (refusal for refusal in refusals.values() if provider not in ("", refusal.peer))

    def delivered(self, peer: str) -> None:
        """What it refused before is forgiven."""
        if (about := self._about.get(peer)) is not None:
            about.warned.clear()
        if self.pending.pop(peer, 0):
            for refusals in self._open.values():
                refusals.pop(peer, None)

    def last_refusal(self, peer: str) -> str:
        about = self._about.get(peer)
        return "" if about is None else about.refusal

    def gone(self, peer: str) -> None:
        self._about.pop(peer, None)
        for who, code in [known for known in self._refusals if known[0] == peer]:
            self._refusals["", code] += self._refusals.pop((who, code))

    def metrics(self, labels: PeerLabels) -> CounterMetricFamily:
        found = CounterMetricFamily(
            "aiodisagg_item_refusals", "Items that an encode peer would not provide.", labels=("peer", "code")
        )
        by_label: Counter[tuple[str, str]] = Counter()
        for (incarnation, code), count in self._refusals.items():
            by_label[labels.of(incarnation), code] += count
        for series, count in by_label.items():
            found.add_metric(series, count)
        return found
