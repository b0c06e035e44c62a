"""Bytes that moved, by what became of them, region and peer: the numbers behind "never sent twice"."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator

from aiodisagg.protocol.messages import Meta
from aiodisagg.protocol.rows import Region, RowLayout

MOST_PEERS = 4096
"""More than are ever linked at once."""


class PeerLabels:
    """What exporters call peers: by name, and by name and incarnation where a linked one has that name already.

    Whoever is not known, or not any more, is ``""``: what was counted of it goes on being counted there. Above
    ``MOST_PEERS`` the oldest without a link is forgotten.
    """

    def __init__(self) -> None:
        self._labels: dict[str, str] = {}
        self._linked: set[str] = set()

    def linked(self, peer: str, name: str) -> None:
        """The peer has a link (again). A name is taken from a peer of before that has none."""
        self._linked.add(peer)
        if peer in self._labels:
            return
        holder = next((other for other, label in self._labels.items() if label == name), None)
        if holder is not None and holder not in self._linked:
            del self._labels[holder]
            holder = None
        self._labels[peer] = name if holder is None else f"{name}/{peer}"
        if len(self._labels) > MOST_PEERS:
            past = next((other for other in self._labels if other not in self._linked), None)
            if past is not None:
                del self._labels[past]

    def lost(self, peer: str, *, gone: bool) -> None:
        """Its link was lost. ``gone``: it will not come back."""
        self._linked.discard(peer)
        if gone:
            self._labels.pop(peer, None)

    def of(self, peer: str) -> str:
        return self._labels.get(peer, "")


class ByteCounters:
    """Counts bytes by ``(outcome, region, peer)``. Outcomes: ``sent``, ``resent``, ``received``, ``refused``.

    Every restart makes another peer, and a sender is never told that one is gone for good: above ``MOST_PEERS`` the
    one that was counted longest ago goes into the peer ``""``. Totals stay."""

    def __init__(self, layout: RowLayout) -> None:
        self._layout = layout
        self.labels: PeerLabels | None = None
        """What peers are called in ``items``; None: by themselves."""
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
            for who, counted in self._everybody()
            for (what, where), n in counted.items()
            if what == outcome and region in (None, where) and peer in (None, who)
        )

    def items(self) -> Iterator[tuple[str, Region, str, int]]:
        """(outcome, region, label of the peer, bytes), for exporters; no two alike."""
        found: Counter[tuple[str, Region, str]] = Counter()
        for peer, counted in self._everybody():
            label = peer if self.labels is None else self.labels.of(peer)
            for (outcome, region), n in counted.items():
                found[outcome, region, label] += n
        for (outcome, region, label), n in found.items():
            yield outcome, region, label, n

    def _everybody(self) -> Iterator[tuple[str, Counter[tuple[str, Region]]]]:
        yield from self._peers.items()
        yield "", self._past
