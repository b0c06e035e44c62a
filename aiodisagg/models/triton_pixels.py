"""Kernels for pixels: Pillow's bicubic resize, and patches of a picture's bytes, in one launch each.

The arithmetic is that of :mod:`~aiodisagg.models.device_pixels`, where some fifty launches do the same. While a burst
of requests is planned and decoded in the process, each launch may have to wait for Python's lock.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit(do_not_specialize=["total", "size", "wanted", "inner", "taps"])
def _resize(
    source_ptr, out_ptr, index_ptr, weight_ptr, total, size, wanted, inner, taps,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[outer, size, inner] to [outer, wanted, inner]: sums of integer weights, rounded and clipped to bytes."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    i = at % inner
    j = at // inner % wanted
    line = at // inner // wanted * size
    summed = tl.full([BLOCK], 1 << (BITS - 1), dtype=tl.int32)
    for tap in range(taps):
        where = tl.load(index_ptr + tap * wanted + j, mask=there, other=0)
        weight = tl.load(weight_ptr + tap * wanted + j, mask=there, other=0)
        summed += tl.load(source_ptr + (line + where) * inner + i, mask=there, other=0).to(tl.int32) * weight
    level = tl.minimum(tl.maximum(summed >> BITS, 0), 255)
    tl.store(out_ptr + at, level.to(tl.uint8), mask=there)


@triton.jit(do_not_specialize=["total", "frames", "h", "w"])
def _patches(
    source_ptr, table_ptr, out_ptr, total, frames, h, w,
    P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[frames, h*P, w*P, 3] to [t*h*w, 3, N, P, P], the M x M patches of a token side by side."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    x, y, k = at % P, at // P % P, at // (P * P) % N
    channel = at // (P * P * N) % 3
    patch = at // (P * P * N * 3)
    column, patch = patch % M, patch // M
    row, patch = patch % M, patch // M
    column += patch % (w // M) * M
    patch = patch // (w // M)
    row += patch % (h // M) * M
    frame = tl.minimum(patch // (h // M) * N + k, frames - 1)
    pixel = (frame * h * P + row * P + y) * (w * P) + column * P + x
    level = tl.load(source_ptr + pixel * 3 + channel, mask=there, other=0).to(tl.int32)
    tl.store(out_ptr + at, tl.load(table_ptr + level * 3 + channel, mask=there), mask=there)


def resize_along(pixels: torch.Tensor, dim: int, index: torch.Tensor, weight: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``pixels`` with ``dim`` resized by ``index`` and ``weight`` int32 [taps, wanted], of ``bits``."""
    taps, wanted = index.shape
    shape = list(pixels.shape)
    inner = 1
    for length in shape[dim + 1 :]:
        inner *= length
    size, shape[dim] = shape[dim], wanted
    out = torch.empty(shape, dtype=torch.uint8, device=pixels.device)
    total = out.numel()
    _resize[(triton.cdiv(total, _BLOCK),)](
        pixels, out, index, weight, total, size, wanted, inner, taps, BITS=bits, BLOCK=_BLOCK
    )
    return out


def patches(
    frames: torch.Tensor, table: torch.Tensor, grid_thw: tuple[int, int, int], patch: int, merge: int, times: int
) -> torch.Tensor:
    """[t*h*w, 3*times*patch*patch] of uint8 ``frames`` [n, h*patch, w*patch, 3], the last one repeated if there are
    fewer than t*times, each byte as ``table`` [256, 3] has it."""
    t, h, w = grid_thw
    out = torch.empty(t * h * w, 3 * times * patch * patch, dtype=table.dtype, device=frames.device)
    total = out.numel()
    _patches[(triton.cdiv(total, _BLOCK),)](
        frames, table, out, total, frames.shape[0], h, w, P=patch, M=merge, N=times, BLOCK=_BLOCK
    )
    return out
