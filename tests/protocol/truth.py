"""What every byte of every region should be, worked out without the code under test."""

from __future__ import annotations

import struct
from functools import cache

from aiodisagg.protocol.events import ItemSpec
from aiodisagg.protocol.rows import ModelFingerprint, Region, RowLayout

MODEL = ModelFingerprint("Qwen3VLMoeForConditionalGeneration", 1, 2, "bfloat16", "w0")
LAYOUT = RowLayout.of(MODEL)
ROW_BYTES = LAYOUT.row_bytes
PLACEHOLDERS = (("image", 151655), ("video", 151656))
ALL_META = frozenset({Region.FILL_IDS, Region.MROPE, Region.AUX})

GRIDS = ((1, 2, 2), (1, 4, 2), (1, 4, 6), (1, 6, 6), (2, 4, 4), (3, 2, 10), (1, 8, 10), (4, 4, 6))
"""(t, h, w) in patches; 2 x 2 patches make a row: 1, 2, 6, 9, 8, 15, 20 and 24 rows."""


def rows_of(grid: tuple[int, int, int]) -> int:
    t, h, w = grid
    return t * (h // 2) * (w // 2)


def digest_of(number: int) -> str:
    return f"item-{number}"


def grid_of(digest: str) -> tuple[int, int, int]:
    return GRIDS[int(digest.removeprefix("item-")) % len(GRIDS)]


def kind_of(digest: str) -> str:
    return "image" if grid_of(digest)[0] == 1 else "video"


@cache
def packed(digest: str) -> bytes:
    """[rows, (1+k)*h] 16-bit elements, each naming its item, row and level: no two are alike."""
    number, rows = int(digest.removeprefix("item-")), rows_of(grid_of(digest))
    levels = 1 + MODEL.deepstack_levels
    return b"".join(
        struct.pack("<H", 1 + number * 1024 + row * levels + level) for row in range(rows) for level in range(levels)
    )


@cache
def meta(digest: str) -> dict[Region, bytes]:
    grid, kind = grid_of(digest), kind_of(digest)
    t, h, w = grid
    token = dict(PLACEHOLDERS)[kind]
    places = [(a, b, c) for a in range(t) for b in range(h // 2) for c in range(w // 2)]
    head = [1 if kind == "image" else 2, *grid, len(places), MODEL.deepstack_levels, token]
    return {
        Region.FILL_IDS: struct.pack(f"<{len(places)}i", *[token] * len(places)),
        Region.MROPE: b"".join(struct.pack("<3i", *place) for place in places),
        Region.AUX: struct.pack("<16i", *head, *[0] * (16 - len(head))),
    }


def spec(number: int, wanted: frozenset[Region] = ALL_META) -> ItemSpec:
    digest = digest_of(number)
    grid = grid_of(digest)
    return ItemSpec(digest, kind_of(digest), grid, rows_of(grid), 0.0, (digest.encode(),), wanted)


class Arrived:
    """An item's rows at the receiver's shell: what Take copied, region by region, and whether it is right."""

    def __init__(self, spec: ItemSpec) -> None:
        self.spec = spec
        self.packed = bytearray(spec.rows * ROW_BYTES)
        self.meta = {region: bytearray(len(data)) for region, data in meta(spec.digest).items()}

    def wrong_rows(self, spans: tuple[tuple[int, int], ...]) -> str | None:
        """What is wrong about rows that the ledger claims to hold."""
        true = packed(self.spec.digest)
        for start, stop in spans:
            a, b = start * ROW_BYTES, stop * ROW_BYTES
            if self.packed[a:b] != true[a:b]:
                return f"rows [{start},{stop}) of {self.spec.digest} are not what was encoded"
        return None

    def wrong_meta(self, region: Region, spans: tuple[tuple[int, int], ...]) -> str | None:
        size = {Region.FILL_IDS: 4, Region.MROPE: 12, Region.AUX: 64}[region]
        for start, stop in spans:
            if (
                self.meta[region][start * size : stop * size]
                != meta(self.spec.digest)[region][start * size : stop * size]
            ):
                return f"{region.name} [{start},{stop}) of {self.spec.digest} is wrong"
        return None
