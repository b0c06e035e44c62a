"""The tower in fixed buffers, where attention reads past the end of a segment as FlashAttention 4 does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from aiodisagg.models.base import ItemKind, Patches
from aiodisagg.models.tower import FusedTower, flash_4_ranges
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from tests.engine.reference_flash import TILE, Flash
from tests.models.halves import png

Tiny = Callable[..., Path]
SIZES = (16, 32, 64)
assert max(SIZES) <= TILE


class Rig:
    """An encoder with graphs, and one without; a stand-in for a capture computes again."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        library, module = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
        self.flash = module.flash_attn_varlen_func = Flash()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, library.__name__, library)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        self.encoder = Qwen3VLVisionEncoder(folder, dtype=torch.float32)
        self.plain = Qwen3VLVisionEncoder(folder, dtype=torch.float32)
        fused = self.encoder.fused = FusedTower(self.encoder._tower)
        slots = {1: max(SIZES), 4: max(SIZES)}
        fused.use_graphs(flash_4_ranges(fused.head_dim**-0.5), lambda compute: compute, sizes=SIZES, slots=slots)
        self.image = self.encoder.prepare(ItemKind.IMAGE, (png(100, 70),), (1, 4, 6), 2.0)
        self.square = self.encoder.prepare(ItemKind.IMAGE, (png(64, 64, 3),), (1, 4, 4), 2.0)

    def check(self, *batch: Patches) -> None:
        self.flash.calls = 0
        found = self.encoder.encode(batch)
        assert self.flash.calls == len(self.encoder._tower.blocks), "by a graph"
        for rows, wanted in zip(found, self.plain.encode(batch), strict=True):
            torch.testing.assert_close(rows, wanted, atol=2e-5, rtol=1e-5)


@pytest.fixture
def rig(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tiny(), monkeypatch)


def test_nothing_behind_the_last_patch_is_read(rig: Rig) -> None:
    """24 patches in a buffer of 32, 40 in one of 64, and what attention makes of the rest is NaN."""
    rig.check(rig.image)
    rig.check(rig.square, rig.image)


def test_a_sick_picture_is_alone(rig: Rig) -> None:
    """Neither its neighbours nor those that find it in the buffers later are spoilt; its own rows show it."""
    sick = Patches(torch.full_like(rig.square.pixel_values, float("nan")), rig.square.grid_thw)
    healthy, spoilt = rig.encoder.encode([rig.image, sick])
    torch.testing.assert_close(healthy, rig.plain.encode([rig.image])[0], atol=2e-5, rtol=1e-5)
    assert spoilt.isnan().all()
    rig.check(rig.image)
    rig.check(rig.image, rig.square)
