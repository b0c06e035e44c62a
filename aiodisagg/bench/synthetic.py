"""Items without a model: rows whose bytes follow from a seed, so that every one of them can be checked on arrival.

No byte is above 63, so rows are finite numbers in every dtype, as a tower's have to be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from aiodisagg.models.base import ItemKind, Patches
from aiodisagg.protocol.events import ItemSpec
from aiodisagg.protocol.rows import ModelFingerprint, RowLayout

_PERIOD = 1024
"""Rows after which the random part repeats; the stamp never does."""


def synthetic_model(hidden_size: int, levels: int) -> ModelFingerprint:
    return ModelFingerprint("Synthetic", hidden_size, levels, "bfloat16", "synthetic-1")


def item_of(seed: int, rows: int) -> ItemSpec:
    """What a receiver asks for; equal seeds and rows are the same item."""
    return ItemSpec(f"seed-{seed}-{rows}", "image", (1, 2, 2 * rows), rows, 0.0, (b"%d" % seed,))


def stamps(seed: int, rows: int) -> np.ndarray:
    """The first eight bytes of each row, uint8 [rows, 8]: its index and the item's seed, six bits a byte."""
    whole = np.arange(rows, dtype=np.int64) + (seed << 24)
    return (whole[:, None] >> np.arange(0, 48, 6) & 63).astype(np.uint8)


def fill(out: np.ndarray, seed: int) -> None:
    """Writes an item's packed rows into uint8 [rows, row_bytes]; a row has at least eight bytes."""
    rows, row_bytes = out.shape
    period = min(rows, _PERIOD)
    out[:period] = np.random.default_rng(seed).integers(0, 64, (period, row_bytes), np.uint8)
    for start in range(period, rows, period):
        stop = min(start + period, rows)
        out[start:stop] = out[: stop - start]
    out[:, :8] = stamps(seed, rows)


class SyntheticEncoder:
    """A ``VisionEncoder`` whose media is a seed and whose tower is :func:`fill`."""

    def __init__(self, model: ModelFingerprint) -> None:
        self.fingerprint, self.layout = model, RowLayout.of(model)

    def prepare(self, kind: ItemKind, media: Sequence[bytes], grid_thw: tuple[int, int, int], fps: float) -> Patches:
        return Patches(torch.tensor([int(media[0])]), grid_thw)

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        found = []
        for patches in batch:
            rows = torch.empty(patches.count // 4, self.layout.row_bytes, dtype=torch.uint8)
            fill(rows.numpy(), int(patches.pixel_values[0]))
            found.append(rows.view(getattr(torch, self.layout.dtype)))
        return found


class NullEncoder:
    """A ``VisionEncoder`` that computes nothing: rows are zeros, made once for each size."""

    def __init__(self, model: ModelFingerprint) -> None:
        self.fingerprint, self.layout = model, RowLayout.of(model)
        self._pixels = torch.zeros(1)
        self._zeros: dict[int, torch.Tensor] = {}

    def prepare(self, kind: ItemKind, media: Sequence[bytes], grid_thw: tuple[int, int, int], fps: float) -> Patches:
        return Patches(self._pixels, grid_thw)

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        return [self._rows(patches.count // 4) for patches in batch]

    def _rows(self, rows: int) -> torch.Tensor:
        found = self._zeros.get(rows)
        if found is None:
            dtype = getattr(torch, self.layout.dtype)
            found = self._zeros[rows] = torch.zeros(rows, self.layout.width, dtype=dtype)
        return found
