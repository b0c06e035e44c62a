"""The small stages of a decoder layer, one Triton kernel each where transformers launches six to ten.

Under a CUDA graph a launch still costs one to two microseconds beside its work, and a decode step of 48 layers has 6 ms
in all: transformers' layer is about 75 launches (3,600 a step), this one 11. Where a stage of transformers rounds to
the model's dtype, so does the kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_norm(
    hidden_ptr, delta_ptr, ids_ptr, visual_ptr, rows_ptr, weight_ptr, out_ptr, eps, rows_stride, rows_column,
    H: tl.constexpr, H_PAD: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, DELTA: tl.constexpr,
    DEEPSTACK: tl.constexpr,
):  # fmt: skip
    """hidden += delta (+ DeepStack row); out = RMSNorm(hidden). DELTA: 0 none, 1 [T, H], 2 [T * TOP_K, H] to sum."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, H_PAD)
    there = n < H
    kind = hidden_ptr.dtype.element_ty
    x = tl.load(hidden_ptr + token * H + n, mask=there, other=0.0).to(tl.float32)
    if DELTA == 1:
        x += tl.load(delta_ptr + token * H + n, mask=there, other=0.0).to(tl.float32)
        x = x.to(kind).to(tl.float32)
    if DELTA == 2:
        total = tl.zeros([H_PAD], dtype=tl.float32)
        for k in tl.static_range(TOP_K):
            chosen = tl.load(ids_ptr + token * TOP_K + k) < EXPERTS  # else padding, whose rows nobody wrote
            total += tl.load(delta_ptr + (token * TOP_K + k) * H + n, mask=there & chosen, other=0.0).to(tl.float32)
        x = (x + total.to(kind).to(tl.float32)).to(kind).to(tl.float32)
    if DEEPSTACK:
        seen = tl.load(visual_ptr + token) != 0
        x += tl.load(rows_ptr + token * rows_stride + rows_column + n, mask=there & seen, other=0.0).to(tl.float32)
        x = x.to(kind).to(tl.float32)
    if DELTA != 0:
        tl.store(hidden_ptr + token * H + n, x.to(kind), mask=there)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / H + eps)
    weight = tl.load(weight_ptr + n, mask=there, other=0.0).to(tl.float32)
    y = (x * inverse).to(kind).to(tl.float32) * weight
    tl.store(out_ptr + token * H + n, y.to(kind), mask=there)


@triton.jit
def _turned(x1, x2, w1, w2, c1, c2, s1, s2, eps, D: tl.constexpr, kind: tl.constexpr):
    inverse = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
    a = ((x1 * inverse).to(kind).to(tl.float32) * w1[None, :]).to(kind).to(tl.float32)
    b = ((x2 * inverse).to(kind).to(tl.float32) * w2[None, :]).to(kind).to(tl.float32)
    return (a * c1[None, :] - b * s1[None, :]).to(kind), (b * c2[None, :] + a * s2[None, :]).to(kind)


@triton.jit
def _rotate_store(
    qkv_ptr, q_norm, k_norm, cos_ptr, sin_ptr, slots, q_out, keys, values, eps,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, KV_HEADS: tl.constexpr, KV_PAD: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Norm and rope of one token's heads; its key and value go to their slot (-1: padding, nowhere)."""
    token = tl.program_id(0).to(tl.int64)
    kind = q_out.dtype.element_ty
    h = tl.arange(0, HALF)
    c1, c2 = tl.load(cos_ptr + token * D + h).to(tl.float32), tl.load(cos_ptr + token * D + HALF + h).to(tl.float32)
    s1, s2 = tl.load(sin_ptr + token * D + h).to(tl.float32), tl.load(sin_ptr + token * D + HALF + h).to(tl.float32)
    base = qkv_ptr + token * ((HEADS + 2 * KV_HEADS) * D)
    head = tl.arange(0, HEADS_PAD)
    at = head[:, None] * D + h[None, :]
    ours = (head < HEADS)[:, None] & (h < HALF)[None, :]
    x1 = tl.load(base + at, mask=ours, other=0.0).to(tl.float32)
    x2 = tl.load(base + at + HALF, mask=ours, other=0.0).to(tl.float32)
    w1, w2 = tl.load(q_norm + h).to(tl.float32), tl.load(q_norm + HALF + h).to(tl.float32)
    y1, y2 = _turned(x1, x2, w1, w2, c1, c2, s1, s2, eps, D, kind)
    tl.store(q_out + token * (HEADS * D) + at, y1, mask=ours)
    tl.store(q_out + token * (HEADS * D) + at + HALF, y2, mask=ours)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    kv_head = tl.arange(0, KV_PAD)
    kv_at = kv_head[:, None] * D + h[None, :]
    theirs = (kv_head < KV_HEADS)[:, None] & (h < HALF)[None, :]
    k1 = tl.load(base + HEADS * D + kv_at, mask=theirs, other=0.0).to(tl.float32)
    k2 = tl.load(base + HEADS * D + kv_at + HALF, mask=theirs, other=0.0).to(tl.float32)
    u1, u2 = tl.load(k_norm + h).to(tl.float32), tl.load(k_norm + HALF + h).to(tl.float32)
    z1, z2 = _turned(k1, k2, u1, u2, c1, c2, s1, s2, eps, D, kind)
    there = slot * (KV_HEADS * D) + kv_at
    tl.store(keys + there, z1, mask=theirs)
    tl.store(keys + there + HALF, z2, mask=theirs)
    source = base + (HEADS + KV_HEADS) * D + kv_at
    tl.store(values + there, tl.load(source, mask=theirs, other=0.0), mask=theirs)
    tl.store(values + there + HALF, tl.load(source + HALF, mask=theirs, other=0.0), mask=theirs)


@triton.jit
def _route(
    logits_ptr, count_ptr, ids_ptr, weights_ptr,
    EXPERTS: tl.constexpr, EXPERTS_PAD: tl.constexpr, TOP_K: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """The TOP_K largest logits of a token and their softmax among themselves; of equal ones the first."""
    token = tl.program_id(0)
    e, k = tl.arange(0, EXPERTS_PAD), tl.arange(0, K_PAD)
    x = tl.load(logits_ptr + token.to(tl.int64) * EXPERTS + e, mask=e < EXPERTS, other=float("-inf")).to(tl.float32)
    first = tl.max(x, 0)
    weights, ids = tl.zeros([K_PAD], dtype=tl.float32), tl.zeros([K_PAD], dtype=tl.int32)
    for i in tl.static_range(TOP_K):
        top = tl.max(x, 0)
        # A NaN equals nothing: its token gets the last expert, and NaN as its weight.
        chosen = tl.minimum(tl.min(tl.where(x == top, e, EXPERTS), 0), EXPERTS - 1)
        weights = tl.where(k == i, tl.exp(top - first), weights)
        ids = tl.where(k == i, chosen, ids)
        x = tl.where(e == chosen, float("-inf"), x)
    weights = weights / tl.sum(weights, 0)
    ids = tl.where(token < tl.load(count_ptr), ids, EXPERTS)
    where = token.to(tl.int64) * TOP_K + k
    tl.store(ids_ptr + where, ids, mask=k < TOP_K)
    tl.store(weights_ptr + where, weights.to(weights_ptr.dtype.element_ty), mask=k < TOP_K)


def add_norm(
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    ids: torch.Tensor | None = None,
    experts: int = 0,
    visual: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    column: int = 0,
) -> torch.Tensor:
    """See :func:`aiodisagg.engine.kernels.add_norm`."""
    tokens, size = hidden.shape
    out = torch.empty_like(hidden)
    top_k = 1 if ids is None else ids.shape[1]
    _add_norm[(tokens,)](
        hidden, delta, ids, visual, rows, weight, out, eps, 0 if rows is None else rows.stride(0), column,
        H=size, H_PAD=triton.next_power_of_2(size), TOP_K=top_k, EXPERTS=experts,
        DELTA=0 if delta is None else 1 if ids is None else 2, DEEPSTACK=rows is not None,
        num_warps=8 if size > 1024 else 4,
    )  # fmt: skip
    return out


def rotate_store(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """See :func:`aiodisagg.engine.kernels.rotate_store`."""
    kv_heads, d = keys.shape[1], keys.shape[2]
    tokens, heads = qkv.shape[0], qkv.shape[1] // d - 2 * kv_heads
    query = torch.empty(tokens, heads, d, dtype=qkv.dtype, device=qkv.device)
    _rotate_store[(tokens,)](
        qkv, q_norm, k_norm, cos, sin, slots, query, keys, values, eps,
        HEADS=heads, HEADS_PAD=triton.next_power_of_2(heads), KV_HEADS=kv_heads,
        KV_PAD=triton.next_power_of_2(kv_heads), D=d, HALF=d // 2, num_warps=4,
    )  # fmt: skip
    return query


def route(logits: torch.Tensor, top_k: int, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`aiodisagg.engine.kernels.route`."""
    tokens, experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=logits.dtype, device=logits.device)
    _route[(tokens,)](
        logits, count, ids, weights, EXPERTS=experts, EXPERTS_PAD=triton.next_power_of_2(experts), TOP_K=top_k,
        K_PAD=triton.next_power_of_2(top_k), num_warps=1,
    )  # fmt: skip
    return ids, weights
