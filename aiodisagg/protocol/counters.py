"""Bytes that moved, by what became of them, region and peer: the numbers behind "never sent twice"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from aiodisagg.protocol.messages import Meta
from aiodisagg.protocol.rows import Region, RowLayout


class ByteCounters:
    """Counts bytes by ``(outcome, region, peer)``. Outcomes: ``sent``, ``resent``, ``received``, ``refused``."""

    def __init__(self, layout: RowLayout) -> None:
        self._layout = layout
        self._bytes: Counter[tuple[str, Region, str]] = Counter()

    def rows(self, outcome: str, peer: str, rows: int) -> None:
        """Packed rows: their input and DeepStack parts."""
        for region in (Region.INPUT, Region.DEEPSTACK):
            self._bytes[outcome, region, peer] += rows * self._layout.region_bytes(region)

    def meta(self, outcome: str, peer: str, meta: Meta | None) -> None:
        """The small regions of a commit."""
        if meta is None:
            return
        parts = ((Region.FILL_IDS, meta.fill_ids), (Region.MROPE, meta.mrope), (Region.AUX, meta.aux))
        for region, data in parts:
            if data is not None:
                self._bytes[outcome, region, peer] += len(data)

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
