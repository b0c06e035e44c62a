"""The small int32 regions of an item, computed from its grid; each is per row or once, never per window."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from math import isqrt

from aiodisagg.protocol.messages import Meta
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
