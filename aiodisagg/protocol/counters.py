"""Bytes that moved, by what became of them, region and peer: the numbers behind "never sent twice"."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator

from aiodisagg.protocol.messages import Meta
from aiodisagg.protocol.rows import Region, RowLayout

MOST_PEERS = 256


class ByteCounters:
    """Counts bytes by ``(outcome, region, peer)``. Outcomes: ``sent``, ``resent``, ``received``, ``refused``.

    Every restart makes another peer, and a sender is never told that one is gone for good: above ``MOST_PEERS`` the
    one that was counted longest ago goes into the peer ``""``. Totals stay."""

    def __init__(self, layout: RowLayout) -> None:
        self._layout = layout
        self._bytes: Counter[tuple[str, Region, str]] = Counter()
        self._peers: OrderedDict[str, None] = OrderedDict()

    def rows(self, outcome: str, peer: str, rows: int) -> None:
        """Packed rows: their input and DeepStack parts."""
        self._name(peer)
        for region in (Region.INPUT, Region.DEEPSTACK):
            self._bytes[outcome, region, peer] += rows * self._layout.region_bytes(region)

    def meta(self, outcome: str, peer: str, meta: Meta | None) -> None:
        """The small regions of a commit."""
        if meta is None:
            return
        self._name(peer)
        parts = ((Region.FILL_IDS, meta.fill_ids), (Region.MROPE, meta.mrope), (Region.AUX, meta.aux))
        for region, data in parts:
            if data is not None:
                self._bytes[outcome, region, peer] += len(data)

    def _name(self, peer: str) -> None:
        self._peers[peer] = None
        self._peers.move_to_end(peer)
        if len(self._peers) > MOST_PEERS:
            oldest, _ = self._peers.popitem(last=False)
            for outcome, region, who in [key for key in self._bytes if key[2] == oldest]:
                self._bytes[outcome, region, ""] += self._bytes.pop((outcome, region, who))

    def total(self, outcome: str, *, region: Region | None = None, peer: str | None = None) -> int:
        """Bytes with this outcome, summed over whatever is not named."""
        return sum(
            n
            for (what, where, who), n in self._bytes.items()
            if what == outcome and region in (None, where) and peer in (None, who)
        )

    def items(self) -> Iterator[tuple[str, Region, str, int]]:
        """(outcome, region, peer, bytes), for exporters."""
        for (outcome, region, peer), n in self._bytes.items():
            yield outcome, region, peer, n
