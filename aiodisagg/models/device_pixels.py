"""Pixels on a device: Pillow's bicubic resize and ``cut_patches`` as tensor operations.

Decoding a JPEG is left to the CPU; resizing, normalising and cutting cost it as much again, and what then goes to the
device is eight times the bytes of the decoded picture. The resize is Pillow's own (``Resample.c``, 8 bits a channel):
first along rows, then along columns, each a sum of integer weights of 22 bits that is rounded and clipped to a byte.
In integers it is exact on every device. Pillow 13 takes the columns first for some sizes, which rounds and clips other
values in between: there, a picture that changes in both directions may differ by a level here and there (white noise,
which is clipped a lot, by more); older ones agree in every bit.

``TORCH`` does this in some fifty launches; :func:`fastest_pixels` gives kernels that do it in two or three and agree
with it in every bit.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from aiodisagg.models.preprocessing import PixelSettings, value_table

logger = logging.getLogger(__name__)

_BITS = 32 - 8 - 2
_SUPPORT = 2.0


def _bicubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return np.where(x < 1.0, near, np.where(x < 2.0, (((x - 5) * x + 8) * x - 4) * a, 0.0))


@functools.lru_cache(maxsize=64)
def _taps(size: int, wanted: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each of ``wanted`` outputs reads: indices and weights, int32 [taps, wanted].

    Pillow's arithmetic to the last bit; an array at a time, since a photo of another size has some ten thousand taps.
    """
    scale = size / wanted
    stretch = max(scale, 1.0)
    center = (np.arange(wanted) + 0.5) * scale
    low = np.maximum((center - _SUPPORT * stretch + 0.5).astype(np.int64), 0)
    high = np.minimum((center + _SUPPORT * stretch + 0.5).astype(np.int64), size)
    index = low + np.arange((high - low).max())[:, None]
    weight = np.where(index < high, _bicubic((index - center + 0.5) * (1.0 / stretch)), 0.0)
    total = functools.reduce(np.add, weight)  # one by one as Pillow does: sum() has an order of its own
    fixed = weight / total * (1 << _BITS)
    fixed = np.trunc(fixed + np.where(fixed < 0, -0.5, 0.5)).astype(np.int32)
    index = np.minimum(index, size - 1).astype(np.int32)
    return torch.from_numpy(index).to(device), torch.from_numpy(fixed).to(device)


def can_resize(settings: PixelSettings) -> bool:
    """Whether this folder's filter is the one that is known here."""
    return settings.resample == Image.Resampling.BICUBIC


@functools.lru_cache(maxsize=8)
def _table(settings: PixelSettings, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(value_table(settings)).to(device, dtype)


@dataclass(frozen=True, slots=True)
class Pixels:
    """How a device does it.

    ``along``: uint8 pixels, the dimension to resize, indices and weights [taps, wanted] as ``_taps`` makes them, bits
    of the weights. ``patches``: uint8 frames [n, h*patch, w*patch, 3], values [256, 3] by byte and channel, the grid,
    and the patch, merge and temporal sizes, to patches.
    """

    along: Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor, int], torch.Tensor]
    patches: Callable[[torch.Tensor, torch.Tensor, tuple[int, int, int], int, int, int], torch.Tensor]

    def resize(self, pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """uint8 [n, H, W, 3] resized as ``Image.resize((width, height), BICUBIC)`` does."""
        for dim, wanted in ((2, width), (1, height)):
            if pixels.shape[dim] != wanted:
                pixels = self.along(pixels, dim, *_taps(pixels.shape[dim], wanted, pixels.device), _BITS)
        return pixels

    def cut(
        self, frames: torch.Tensor, grid_thw: tuple[int, int, int], settings: PixelSettings, dtype: torch.dtype
    ) -> torch.Tensor:
        """Patches [t*h*w, 3*temporal_patch*patch*patch] of uint8 frames [n, H, W, 3], resized to the grid.

        The values are those of :func:`~aiodisagg.models.preprocessing.cut_patches`, rounded to ``dtype``.
        """
        frames = self.resize(frames, grid_thw[1] * settings.patch, grid_thw[2] * settings.patch)
        table = _table(settings, frames.device, dtype)
        return self.patches(frames, table, grid_thw, settings.patch, settings.merge, settings.temporal_patch)


def _along(pixels: torch.Tensor, dim: int, index: torch.Tensor, weight: torch.Tensor, bits: int) -> torch.Tensor:
    shape = [1] * pixels.ndim
    shape[dim] = index.shape[1]
    total: torch.Tensor | None = None
    for i in range(index.shape[0]):
        part = pixels.index_select(dim, index[i]).to(torch.int32) * weight[i].view(shape)
        total = part + (1 << (bits - 1)) if total is None else total.add_(part)
    assert total is not None
    return (total >> bits).clamp_(0, 255).to(torch.uint8)


def _patches(
    frames: torch.Tensor, table: torch.Tensor, grid_thw: tuple[int, int, int], patch: int, merge: int, times: int
) -> torch.Tensor:
    (t, h, w), p, m, n = grid_thw, patch, merge, times
    missing = t * n - frames.shape[0]
    if missing:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    patches = frames.view(t, n, h // m, m, p, w // m, m, p, 3).permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    # One byte an element is moved; the values follow where they are used.
    bytes_ = patches.reshape(t * h * w, 3, n * p * p)
    return torch.stack([table[:, c][bytes_[:, c].int()] for c in range(3)], dim=1).view(t * h * w, -1)


TORCH = Pixels(_along, _patches)
"""What others are compared with; on any device."""


def fastest_pixels(settings: PixelSettings, dtype: torch.dtype, device: torch.device) -> Pixels:
    """Kernels, if they agree with ``TORCH`` here in every bit; else a line in the log, and ``TORCH``."""
    try:
        from aiodisagg.models import triton_pixels

        fast = Pixels(triton_pixels.resize_along, triton_pixels.patches)
        draw = torch.Generator(device).manual_seed(3)
        side = settings.factor
        for height, width in ((side + 9, 3 * side - 5), (2 * side, 3 * side)):
            frames = torch.randint(256, (1, height, width, 3), generator=draw, device=device, dtype=torch.uint8)
            grid = 1, 2 * settings.merge, 3 * settings.merge
            if not torch.equal(*(way.cut(frames, grid, settings, dtype) for way in (fast, TORCH))):
                logger.warning("kernels for pixels are not used: they disagree")
                return TORCH
    except Exception as error:  # no Triton, or what a compiler or a driver raises
        logger.warning("kernels for pixels are not used: %r", error)
        return TORCH
    return fast
