"""The small int32 regions of an item, computed from its grid; each is per row or once, never per window. And which of
them a receiver holds."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt

from aiodisagg.protocol.messages import Meta
from aiodisagg.protocol.ranges import RangeSet, Span
from aiodisagg.protocol.rows import AUX_INTS, Region

_KINDS = {"image": 1, "video": 2}


@dataclass(frozen=True, slots=True)
class ItemMeta:
    """Regions 1, 2 and 3 of an item.

    ``mrope`` is relative to the item: row r of a (t, h, w) grid merged m x m has the temporal, vertical and
    horizontal index of its merged patch, row-major int32 [rows, 3].
    """

    fill_ids: bytes
    mrope: bytes
    aux: bytes

    @classmethod
    def of(cls, kind: str, grid_thw: tuple[int, int, int], rows: int, levels: int, placeholder: int = 0) -> ItemMeta:
        """Computes the regions; a grid that does not give ``rows`` (the caller refuses such items) gets zero axes."""
        t, h, w = grid_thw
        merge = isqrt(t * h * w // rows) if rows else 0
        mrope = array("i")
        if merge and t * (h // merge) * (w // merge) == rows:
            for ti in range(t):
                for hi in range(h // merge):
                    for wi in range(w // merge):
                        mrope.extend((ti, hi, wi))
        else:
            mrope.extend([0] * (3 * rows))
        head = [_KINDS.get(kind, 0), t, h, w, rows, levels, placeholder]
        aux = array("i", head + [0] * (AUX_INTS - len(head)))
        return cls(array("i", [placeholder] * rows).tobytes(), mrope.tobytes(), aux.tobytes())

    def cut(self, start: int, stop: int, regions: tuple[int, ...]) -> Meta:
        """What a commit of rows ``[start, stop)`` carries of the wanted regions."""
        return Meta(
            start,
            stop,
            self.fill_ids[4 * start : 4 * stop] if Region.FILL_IDS in regions else None,
            self.mrope[12 * start : 12 * stop] if Region.MROPE in regions else None,
            self.aux if Region.AUX in regions else None,
        )


@dataclass(slots=True)
class MetaLedger:
    """What a receiver holds of the small regions it wants of an item of ``rows``."""

    held: dict[Region, RangeSet]
    rows: int

    @classmethod
    def of(cls, wanted: Iterable[Region], rows: int) -> MetaLedger:
        return cls({region: RangeSet() for region in wanted}, rows)

    @property
    def lacking(self) -> tuple[Region, ...]:
        """Regions that are not whole yet."""
        return tuple(sorted(r for r, held in self.held.items() if not held.covers(*_span(r, 0, self.rows))))

    def wrong(self, start: int, stop: int, meta: Meta | None) -> str:
        """What in ``meta``, which came with the rows ``[start, stop)``, no honest sender would send; empty: nothing."""
        if meta is not None and (meta.start, meta.stop) != (start, stop):
            return f"meta of rows [{meta.start}, {meta.stop})"
        sizes = {Region.FILL_IDS: 4 * (stop - start), Region.MROPE: 12 * (stop - start), Region.AUX: 4 * AUX_INTS}
        for region, size in sizes.items():
            data, held = None if meta is None else _parts(meta)[region], self.held.get(region)
            lacks = held is not None and not held.covers(*_span(region, start, stop))
            if (lacks and data is None) or (data is not None and len(data) != size):
                return f"region {region.name}"
        return ""

    def taken(self, meta: Meta) -> None:
        """It came with a chunk that was taken."""
        for region, data in _parts(meta).items():
            if data is not None and region in self.held:
                self.held[region].add(*_span(region, meta.start, meta.stop))


def _parts(meta: Meta) -> dict[Region, bytes | None]:
    return {Region.FILL_IDS: meta.fill_ids, Region.MROPE: meta.mrope, Region.AUX: meta.aux}


def _span(region: Region, start: int, stop: int) -> Span:
    """Of the region, for rows ``[start, stop)``."""
    return (0, 1) if region is Region.AUX else (start, stop)
