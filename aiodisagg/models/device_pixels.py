"""Pixels on a device: Pillow's bicubic resize and ``cut_patches`` as tensor operations.

Decoding a JPEG is left to the CPU; resizing, normalising and cutting cost it as much again, and what then goes to the
device is eight times the bytes of the decoded picture. The resize is Pillow's own (``Resample.c``, 8 bits a channel):
first along rows, then along columns, each a sum of integer weights of 22 bits that is rounded and clipped to a byte.
In integers it is exact on every device. Pillow 13 takes the columns first for some sizes, which rounds and clips other
values in between: there, a picture that changes in both directions may differ by a level here and there (white noise,
which is clipped a lot, by more); older ones agree in every bit.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image

from aiodisagg.models.preprocessing import PixelSettings, value_table

_BITS = 32 - 8 - 2
_SUPPORT = 2.0


def _bicubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return np.where(x < 1.0, near, np.where(x < 2.0, (((x - 5) * x + 8) * x - 4) * a, 0.0))


@functools.lru_cache(maxsize=64)
def _taps(size: int, wanted: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each of ``wanted`` outputs reads: indices int64 [taps, wanted] and weights int32 [taps, wanted].

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
    return torch.from_numpy(np.minimum(index, size - 1)).to(device), torch.from_numpy(fixed).to(device)


def _along(pixels: torch.Tensor, dim: int, wanted: int) -> torch.Tensor:
    if pixels.shape[dim] == wanted:
        return pixels
    index, weight = _taps(pixels.shape[dim], wanted, pixels.device)
    shape = [1] * pixels.ndim
    shape[dim] = wanted
    total: torch.Tensor | None = None
    for i in range(index.shape[0]):
        part = pixels.index_select(dim, index[i]).to(torch.int32) * weight[i].view(shape)
        total = part + (1 << (_BITS - 1)) if total is None else total.add_(part)
    assert total is not None
    return (total >> _BITS).clamp_(0, 255).to(torch.uint8)


def resize(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [n, H, W, 3] resized as ``Image.resize((width, height), BICUBIC)`` does."""
    return _along(_along(pixels, 2, width), 1, height)


def can_resize(settings: PixelSettings) -> bool:
    """Whether this folder's filter is the one that is known here."""
    return settings.resample == Image.Resampling.BICUBIC


@functools.lru_cache(maxsize=8)
def _table(settings: PixelSettings, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(value_table(settings)).to(device, dtype)


def cut(
    frames: torch.Tensor, grid_thw: tuple[int, int, int], settings: PixelSettings, dtype: torch.dtype
) -> torch.Tensor:
    """Patches [t*h*w, 3*temporal_patch*patch*patch] of uint8 frames [n, H, W, 3], resized to the grid.

    The values are those of :func:`~aiodisagg.models.preprocessing.cut_patches`, rounded to ``dtype``.
    """
    t, h, w = grid_thw
    p, m, n = settings.patch, settings.merge, settings.temporal_patch
    frames = resize(frames, h * p, w * p)
    missing = t * n - frames.shape[0]
    if missing:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    patches = frames.view(t, n, h // m, m, p, w // m, m, p, 3).permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    table = _table(settings, frames.device, dtype)
    # One byte an element is moved; the values follow where they are used.
    bytes_ = patches.reshape(t * h * w, 3, n * p * p)
    return torch.stack([table[:, c][bytes_[:, c].int()] for c in range(3)], dim=1).view(t * h * w, -1)
