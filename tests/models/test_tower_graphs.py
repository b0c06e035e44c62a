"""The tower in fixed buffers, as graphs have it, run on the CPU: a stand-in for a capture computes again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from aiodisagg.models.base import ItemKind
from aiodisagg.models.tower import FusedTower, sdpa
from aiodisagg.models.tower_graphs import PATCHES, SLOTS
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from tests.models.halves import png

Tiny = Callable[..., Path]
IMAGE = (ItemKind.IMAGE, (png(100, 70),), (1, 4, 6))
SQUARE = (ItemKind.IMAGE, (png(64, 64, 3),), (1, 4, 4))
WIDE = (ItemKind.IMAGE, (png(33, 128, 5),), (1, 8, 2))
VIDEO = (ItemKind.VIDEO, tuple(png(64, 96, i) for i in range(5)), (3, 6, 4))


def attend(qkv: torch.Tensor, bounds: torch.Tensor, most: int) -> torch.Tensor:
    """Nothing is known of what is behind the last segment."""
    out = torch.full((qkv.shape[0], *qkv.shape[2:]), float("nan"))
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        if stop > start:
            assert stop - start <= most
            sdpa(None)(qkv[start:stop], 1, stop - start, out[start:stop], qkv.shape[3] ** -0.5)
    return out.reshape(qkv.shape[0], -1)


class Rig:
    """An encoder with graphs, and how often they were replayed."""

    def __init__(
        self, folder: Path, *, sizes: Sequence[int] = (32, 64, 128), slots: dict[int, int] | None = None
    ) -> None:
        self.encoder = Qwen3VLVisionEncoder(folder, dtype=torch.float32)
        self.plain = Qwen3VLVisionEncoder(folder, dtype=torch.float32)
        self.encoder.fused = FusedTower(self.encoder._tower)
        self.replays = 0

        def capture(compute: Callable[[], None]) -> Callable[[], None]:
            def replay() -> None:
                self.replays += 1
                compute()

            return replay

        self.encoder.fused.use_graphs(attend, capture, sizes=sizes, slots=slots or {1: 128, 8: 128})

    def check(self, *items: tuple[ItemKind, tuple[bytes, ...], tuple[int, int, int]]) -> list[torch.Tensor]:
        batch = [self.encoder.prepare(kind, media, grid, 2.0) for kind, media, grid in items]
        found = self.encoder.encode(batch)
        for rows, wanted in zip(found, self.plain.encode(batch), strict=True):
            torch.testing.assert_close(rows, wanted, atol=2e-5, rtol=1e-5)
        return found


def test_rows_are_the_towers_for_any_batch_and_earlier_rows_stay(tiny: Tiny) -> None:
    rig = Rig(tiny())
    kept = rig.check(IMAGE)
    before = [rows.clone() for rows in kept]
    for batch in ((IMAGE,), (SQUARE,), (WIDE, IMAGE, SQUARE), (VIDEO,), (SQUARE, VIDEO, WIDE)):
        rig.check(*batch)
    assert rig.replays == 6
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


def test_an_encoder_that_is_let_go_of_is_gone_with_its_graphs(tiny: Tiny) -> None:
    """Each referred to the other: weights and graphs stayed on the device until somebody collected garbage."""
    gc.collect()
    gc.disable()
    try:
        encoder = Qwen3VLVisionEncoder(tiny(), dtype=torch.float32)
        encoder.fused = FusedTower(encoder._tower)
        encoder.fused.use_graphs(attend, lambda compute: print, sizes=(32,), slots={1: 32})
        held = [weakref.ref(encoder.fused.graphs), weakref.ref(encoder._tower.pos_embed.weight)]
        del encoder
        assert all(what() is None for what in held)
    finally:
        gc.enable()


def test_what_there_is_no_size_for_is_launched(tiny: Tiny) -> None:
    rig = Rig(tiny(), sizes=(16, 32), slots={1: 32, 2: 16})
    rig.check(SQUARE)  # 16 patches
    rig.check(IMAGE)  # 24
    assert rig.replays == 2
    rig.check(IMAGE, SQUARE)  # more patches
    rig.check(WIDE, SQUARE)  # room for so many pictures only up to 16 patches
    rig.check(VIDEO)  # three frame pairs
    assert rig.replays == 2


def test_usual_pictures_waste_little() -> None:
    for patches, most in ((3520, 0.02), (8160, 0.005), (256, 0.0), (1600, 0.13)):
        assert min(size for size in PATCHES if size >= patches) <= patches * (1 + most)
    assert all(size % 4 == 0 for size in PATCHES) and len(PATCHES) == len(set(PATCHES))
    assert min(SLOTS) == 1 and max(SLOTS.values()) <= max(PATCHES)
