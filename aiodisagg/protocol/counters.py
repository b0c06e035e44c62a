"""Bytes that moved, by what became of them, region and peer: the numbers behind "never sent twice"."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator

from aiodisagg.protocol.messages import Meta
from aiodisagg.protocol.rows import Region, RowLayout

MOST_PEERS = 4096
"""More than are ever linked at once."""


class ByteCounters:
    """Counts bytes by ``(outcome, region, peer)``. Outcomes: ``sent``, ``resent``, ``received``, ``refused``.

    Every restart makes another peer, and a sender is never told that one is gone for good: above ``MOST_PEERS`` the
    one that was counted longest ago goes into the peer ``""``. Totals stay."""

    def __init__(self, layout: RowLayout) -> None:
        self._layout = layout
        self._peers: OrderedDict[str, Counter[tuple[str, Region]]] = OrderedDict()
        self._past: Counter[tuple[str, Region]] = Counter()

    def rows(self, outcome: str, peer: str, rows: int) -> None:
        """Packed rows: their input and DeepStack parts."""
        counted = self._of(peer)
        for region in (Region.INPUT, Region.DEEPSTACK):
            counted[outcome, region] += rows * self._layout.region_bytes(region)

    def meta(self, outcome: str, peer: str, meta: Meta | None) -> None:
        """The small regions of a commit."""
        if meta is None:
            return
        counted = self._of(peer)
        parts = ((Region.FILL_IDS, meta.fill_ids), (Region.MROPE, meta.mrope), (Region.AUX, meta.aux))
        for region, data in parts:
            if data is not None:
                counted[outcome, region] += len(data)

    def _of(self, peer: str) -> Counter[tuple[str, Region]]:
        counted = self._peers.get(peer)
        if counted is None:
            counted = self._peers[peer] = Counter()
            if len(self._peers) > MOST_PEERS:
                self._past += self._peers.popitem(last=False)[1]
        else:
            self._peers.move_to_end(peer)
        return counted

    def total(self, outcome: str, *, region: Region | None = None, peer: str | None = None) -> int:
        """Bytes with this outcome, summed over whatever is not named."""
        return sum(
            n
            for what, where, who, n in self.items()
            if what == outcome and region in (None, where) and peer in (None, who)
        )

    def items(self) -> Iterator[tuple[str, Region, str, int]]:
        """(outcome, region, peer, bytes), for exporters."""
        for peer, counted in (*self._peers.items(), ("", self._past)):
            for (outcome, region), n in counted.items():
                yield outcome, region, peer, n
