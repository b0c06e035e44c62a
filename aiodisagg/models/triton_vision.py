"""Kernels for the vision tower: rope in place, a residual with its norm, and attention for head sizes that are no power
of two.

Qwen3-VL's heads have 72 elements. Attention kernels for 64, 96 and 128 pad that by a third and more, in both products.
Here a head is 64 + 16: two products of each kind, 80 columns of work for 72 of use. A segment (an image, or a frame
pair) attends to itself only; equal segments that follow each other go in one launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def _turn(qkv_ptr, cos_ptr, sin_ptr, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, D: tl.constexpr,
          HALF: tl.constexpr, HALF_PAD: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)  # 0 queries, 1 keys
    h = tl.arange(0, HALF_PAD)
    head = tl.arange(0, HEADS_PAD)
    there = (head < HEADS)[:, None] & (h < HALF)[None, :]
    own = h < HALF
    c1 = tl.load(cos_ptr + token * D + h, mask=own, other=0.0)[None, :]
    c2 = tl.load(cos_ptr + token * D + HALF + h, mask=own, other=0.0)[None, :]
    s1 = tl.load(sin_ptr + token * D + h, mask=own, other=0.0)[None, :]
    s2 = tl.load(sin_ptr + token * D + HALF + h, mask=own, other=0.0)[None, :]
    at = qkv_ptr + (token * 3 + part) * (HEADS * D) + head[:, None] * D + h[None, :]
    x1 = tl.load(at, mask=there, other=0.0).to(tl.float32)
    x2 = tl.load(at + HALF, mask=there, other=0.0).to(tl.float32)
    tl.store(at, (x1 * c1 - x2 * s1).to(qkv_ptr.dtype.element_ty), mask=there)
    tl.store(at + HALF, (x2 * c2 + x1 * s2).to(qkv_ptr.dtype.element_ty), mask=there)


@triton.jit
def _add_norm(
    x_ptr, delta_ptr, weight_ptr, bias_ptr, out_ptr, eps, H: tl.constexpr, H_PAD: tl.constexpr,
):  # fmt: skip
    """x += delta; out = LayerNorm(x). A row each, sums in float32, rounded where torch rounds."""
    row = tl.program_id(0).to(tl.int64) * H
    n = tl.arange(0, H_PAD)
    there = n < H
    kind = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row + n, mask=there, other=0.0).to(tl.float32)
    x = (x + tl.load(delta_ptr + row + n, mask=there, other=0.0).to(tl.float32)).to(kind)
    tl.store(x_ptr + row + n, x, mask=there)
    wide = x.to(tl.float32)
    away = tl.where(there, wide - tl.sum(wide, 0) / H, 0.0)
    y = away * tl.rsqrt(tl.sum(away * away, 0) / H + eps)
    y = y * tl.load(weight_ptr + n, mask=there, other=0.0).to(tl.float32)
    y = y + tl.load(bias_ptr + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + n, y.to(kind), mask=there)


@triton.jit
def _visit(
    acc1, acc2, top, mass, q1, q2, keys, n0, size, scale, d1, d2, own2,
    STRIDE: tl.constexpr, SPAN: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys; the factor of the exponent is applied with the subtraction, in one instruction."""
    n = n0 + tl.arange(0, BLOCK_N)
    rows = keys + n[:, None] * STRIDE
    low, high = rows + d1[None, :], rows + D1 + d2[None, :]
    if MASKED:
        seen = (n < size)[:, None]
        k1 = tl.load(low, mask=seen, other=0.0)
        k2 = tl.load(high, mask=seen & own2[None, :], other=0.0)
        v1 = tl.load(low + SPAN, mask=seen, other=0.0)
        v2 = tl.load(high + SPAN, mask=seen & own2[None, :], other=0.0)
    else:
        k1 = tl.load(low)
        k2 = tl.load(high, mask=own2[None, :], other=0.0)
        v1 = tl.load(low + SPAN)
        v2 = tl.load(high + SPAN, mask=own2[None, :], other=0.0)
    s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")
    if MASKED:
        s = tl.where((n < size)[None, :], s, float("-inf"))
    above = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - above[:, None])
    shrink = tl.exp2(top - above)
    mass = mass * shrink + tl.sum(p, 1)
    p = p.to(v1.dtype)
    acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
    acc2 = tl.dot(p, v2, acc2 * shrink[:, None], input_precision="ieee")
    return acc1, acc2, above, mass


@triton.jit(do_not_specialize=["size"])
def _attend(
    qkv_ptr, out_ptr, size, scale,
    HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tiles of queries x heads x segments of ``size`` tokens. D is split in D1 columns and the D - D1 in D2."""
    tile, head = tl.program_id(0), tl.program_id(1)
    base = tl.program_id(2).to(tl.int64) * size
    STRIDE: tl.constexpr = 3 * HEADS * D
    SPAN: tl.constexpr = HEADS * D
    m_at = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d1, d2 = tl.arange(0, D1), tl.arange(0, D2)
    own2 = D1 + d2 < D
    queries = qkv_ptr + (base + m_at)[:, None] * STRIDE + head * D
    keys = qkv_ptr + base * STRIDE + SPAN + head * D
    valid = (m_at < size)[:, None]
    q1 = tl.load(queries + d1[None, :], mask=valid, other=0.0)
    q2 = tl.load(queries + D1 + d2[None, :], mask=valid & own2[None, :], other=0.0)
    acc1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_M], dtype=tl.float32)
    whole = size // BLOCK_N * BLOCK_N
    for n0 in range(0, whole, BLOCK_N):
        acc1, acc2, top, mass = _visit(
            acc1, acc2, top, mass, q1, q2, keys, n0, size, scale, d1, d2, own2, STRIDE, SPAN, D1, BLOCK_N, False
        )
    for n0 in range(whole, size, BLOCK_N):
        acc1, acc2, top, mass = _visit(
            acc1, acc2, top, mass, q1, q2, keys, n0, size, scale, d1, d2, own2, STRIDE, SPAN, D1, BLOCK_N, True
        )
    out = out_ptr + ((base + m_at)[:, None] * HEADS + head) * D
    kind = out_ptr.dtype.element_ty
    tl.store(out + d1[None, :], (acc1 / mass[:, None]).to(kind), mask=valid)
    tl.store(out + D1 + d2[None, :], (acc2 / mass[:, None]).to(kind), mask=valid & own2[None, :])


def turn(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rope of queries and keys in [N, 3, heads, d], in place; cos and sin are float32 [N, d]."""
    tokens, _, heads, d = qkv.shape
    half = d // 2
    _turn[(tokens, 2)](
        qkv, cos, sin, HEADS=heads, HEADS_PAD=triton.next_power_of_2(heads), D=d, HALF=half,
        HALF_PAD=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip
    return qkv


def add_norm(x: torch.Tensor, delta: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + delta`` of [N, hidden], in the memory of ``x``, and its ``norm``, a LayerNorm."""
    rows, size = x.shape
    out = torch.empty_like(x)
    _add_norm[(rows,)](
        x, delta, norm.weight, norm.bias, out, norm.eps, H=size, H_PAD=triton.next_power_of_2(size), num_warps=2
    )
    return x, out


@dataclass(frozen=True, slots=True)
class Tiles:
    """Queries and keys of a tile, its warps, and the stages of its pipeline. Callable as the tower's attention."""

    m: int
    n: int
    warps: int
    stages: int

    def __call__(self, qkv: torch.Tensor, segments: int, size: int, out: torch.Tensor, scaling: float) -> None:
        """Attention within each of ``segments`` times ``size`` tokens of [N, 3, heads, d], into [N, heads, d]."""
        heads, d = qkv.shape[2], qkv.shape[3]
        if d < 16:
            raise ValueError(f"heads of {d} elements: at least 16 are needed")
        d1 = 1 << (d.bit_length() - 1)  # the largest power of two in it
        d2 = max(16, triton.next_power_of_2(max(1, d - d1)))
        _attend[(triton.cdiv(size, self.m), heads, segments)](
            qkv, out, size, scaling * LOG2E,
            HEADS=heads, D=d, D1=d1, D2=d2, BLOCK_M=self.m, BLOCK_N=self.n, num_warps=self.warps,
            num_stages=self.stages,
        )  # fmt: skip


SHAPES = (Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2), Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 128, 4, 2))
"""Which is fastest is measured where it runs."""
