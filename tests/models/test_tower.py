"""The path of accelerators, run on the CPU: rows of the fused tower, and pixels cut by tensor operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from aiodisagg.models.base import ItemKind
from aiodisagg.models.device_pixels import resize
from aiodisagg.models.tower import GRIDS_KEPT
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from tests.models.halves import noise, png

Tiny = Callable[..., Path]
ITEMS = [
    (ItemKind.IMAGE, (png(100, 70),), (1, 4, 6)),
    (ItemKind.IMAGE, (png(64, 64, 3),), (1, 4, 4)),
    (ItemKind.IMAGE, (png(64, 64, 4),), (1, 4, 4)),
    (ItemKind.VIDEO, tuple(png(64, 96, i) for i in range(5)), (3, 6, 4)),
    (ItemKind.IMAGE, (png(33, 128, 5),), (1, 8, 2)),
]


@pytest.fixture(scope="module")
def folder(tiny: Tiny) -> Path:
    return tiny()


@pytest.mark.parametrize("moe", [True, False])
def test_rows_are_transformers(tiny: Tiny, moe: bool) -> None:
    encoder = Qwen3VLVisionEncoder(tiny(moe=moe), dtype=torch.float32)
    patches = [encoder.prepare(kind, media, grid, 2.0) for kind, media, grid in ITEMS]
    expected = encoder.encode(patches)
    encoder.use_fused()
    assert encoder.fused is not None
    for found, wanted in zip(encoder.encode(patches), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    for patch, wanted in zip(patches, expected, strict=True):  # alone, with positions that are kept by now
        torch.testing.assert_close(encoder.encode([patch])[0], wanted, atol=2e-5, rtol=1e-5)
