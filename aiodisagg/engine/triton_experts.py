"""A mixture of experts in two Triton products: gate and up with their activation, then down with the router's weight.

A **pair** is (token, one of its experts). Pairs are ordered by expert, each expert's padded to whole blocks of BLOCK_M
rows, by two kernels without a word to the host; a block multiplies with one expert's weights. With few pairs (a decode
step of up to eight requests) nothing is ordered: a block is one pair, for two pairs rarely share an expert.

Experts nobody chose are not read, which is what decoding is about: it is bound by the bytes of the chosen ones. Pairs
of padding have the id ``experts`` and are in no block. Weights are as transformers holds them: gate_up [E, 2I, H], down
[E, H, I].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pairs"])
def _count(ids_ptr, counts_ptr, pairs, CHUNK: tl.constexpr):
    expert = tl.program_id(0)
    i = tl.arange(0, CHUNK)
    found = tl.zeros([CHUNK], dtype=tl.int32)
    for start in range(0, pairs, CHUNK):
        found += (tl.load(ids_ptr + start + i, mask=start + i < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(found, 0))


@triton.jit(do_not_specialize=["pairs", "blocks"])
def _place(
    ids_ptr, counts_ptr, order_ptr, block_expert_ptr, pairs, blocks,
    EXPERTS: tl.constexpr, EXPERTS_PAD: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """order: pairs of each expert, padded with ``pairs``; block_expert: whose block it is, -1 past the last."""
    expert = tl.program_id(0)
    e = tl.arange(0, EXPERTS_PAD)
    counts = tl.load(counts_ptr + e, mask=e < EXPERTS, other=0)
    whole = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(e < expert, whole, 0), 0)
    own = tl.sum(tl.where(e == expert, whole, 0), 0)
    i = tl.arange(0, CHUNK)
    at = first * BLOCK_M
    for start in range(0, pairs, CHUNK):
        match = (tl.load(ids_ptr + start + i, mask=start + i < pairs, other=-1) == expert).to(tl.int32)
        tl.store(order_ptr + at + tl.cumsum(match, 0) - match, start + i, mask=match != 0)
        at += tl.sum(match, 0)
    row = tl.arange(0, BLOCK_M)
    tl.store(order_ptr + at + row, tl.zeros([BLOCK_M], dtype=tl.int32) + pairs, mask=at + row < (first + own) * BLOCK_M)
    for block in range(first, first + own):
        tl.store(block_expert_ptr + block, expert)
    if expert == EXPERTS - 1:
        for block in range(first + own, blocks):
            tl.store(block_expert_ptr + block, -1)


@triton.jit
def _block(ids_ptr, order_ptr, block_expert_ptr, block, pairs, ALONE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a block, and its pairs (``pairs`` where a row has none)."""
    row = tl.arange(0, BLOCK_M)
    if ALONE:
        expert = tl.load(ids_ptr + block)
        pair = tl.where(row == 0, block, pairs)
    else:
        expert = tl.load(block_expert_ptr + block)
        pair = tl.load(order_ptr + block * BLOCK_M + row)
    return expert, pair


@triton.jit(do_not_specialize=["pairs"])
def _gate_up(
    x_ptr, w_ptr, out_ptr, ids_ptr, order_ptr, block_expert_ptr, pairs,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, pair = _block(ids_ptr, order_ptr, block_expert_ptr, tl.program_id(1), pairs, ALONE, BLOCK_M)
    if (expert < 0) | (expert >= EXPERTS):
        return
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    valid = pair < pairs
    x_row = x_ptr + (pair // TOP_K).to(tl.int64)[:, None] * H
    w_row = w_ptr + expert.to(tl.int64) * (2 * INNER * H) + n[:, None] * H
    gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k0 in range(0, H, BLOCK_K):
        inside = (k0 + k < H)[None, :]
        x = tl.load(x_row + k0 + k[None, :], mask=valid[:, None] & inside, other=0.0)
        there = (n < INNER)[:, None] & inside
        wg = tl.load(w_row + k0 + k[None, :], mask=there, other=0.0)
        gate += tl.dot(x, tl.trans(wg), input_precision="ieee")
        wu = tl.load(w_row + INNER * H + k0 + k[None, :], mask=there, other=0.0)
        up += tl.dot(x, tl.trans(wu), input_precision="ieee")
    y = gate / (1.0 + tl.exp(-gate)) * up
    where = out_ptr + pair.to(tl.int64)[:, None] * INNER + n[None, :]
    tl.store(where, y.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (n < INNER)[None, :])


@triton.jit(do_not_specialize=["pairs"])
def _down(
    x_ptr, w_ptr, out_ptr, weight_ptr, ids_ptr, order_ptr, block_expert_ptr, pairs,
    EXPERTS: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, pair = _block(ids_ptr, order_ptr, block_expert_ptr, tl.program_id(1), pairs, ALONE, BLOCK_M)
    if (expert < 0) | (expert >= EXPERTS):
        return
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    valid = pair < pairs
    x_row = x_ptr + pair.to(tl.int64)[:, None] * INNER
    w_row = w_ptr + expert.to(tl.int64) * (H * INNER) + n[:, None] * INNER
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k0 in range(0, INNER, BLOCK_K):
        inside = (k0 + k < INNER)[None, :]
        x = tl.load(x_row + k0 + k[None, :], mask=valid[:, None] & inside, other=0.0)
        w = tl.load(w_row + k0 + k[None, :], mask=(n < H)[:, None] & inside, other=0.0)
        acc += tl.dot(x, tl.trans(w), input_precision="ieee")
    weight = tl.load(weight_ptr + pair, mask=valid, other=0.0).to(tl.float32)
    y = acc.to(out_ptr.dtype.element_ty).to(tl.float32) * weight[:, None]
    where = out_ptr + pair.to(tl.int64)[:, None] * H + n[None, :]
    tl.store(where, y.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (n < H)[None, :])


@dataclass(frozen=True, slots=True)
class Tiles:
    """Block shapes of one product: rows, columns, depth, warps, stages of the pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Shapes of both products. ``alone``: a block is one pair. Both have the same ``m``: they share the order."""

    gate_up: Tiles
    down: Tiles
    alone: bool = False


SETS: dict[str, tuple[Plan, Plan, Plan, Plan]] = {
    "triton": (
        Plan(Tiles(16, 32, 128, 4, 4), Tiles(16, 64, 128, 4, 4), alone=True),
        Plan(Tiles(16, 64, 128, 4, 3), Tiles(16, 64, 128, 4, 4)),
        Plan(Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 4)),
        Plan(Tiles(128, 64, 64, 8, 4), Tiles(128, 128, 64, 8, 4)),
    ),
    "triton, wide": (
        Plan(Tiles(16, 64, 64, 4, 5), Tiles(16, 128, 128, 8, 3), alone=True),
        Plan(Tiles(16, 128, 64, 8, 4), Tiles(16, 128, 128, 8, 3)),
        Plan(Tiles(32, 128, 64, 8, 3), Tiles(32, 128, 128, 8, 3)),
        Plan(Tiles(128, 128, 64, 8, 3), Tiles(128, 256, 64, 8, 3)),
    ),
}
"""Shapes for a pair alone, and for few, some and many rows an expert; tastes, of which a chip prefers one or the other
for each."""
SETS["triton, deep"] = (
    *SETS["triton"][:3],
    Plan(Tiles(128, 128, 64, 8, 4), Tiles(128, 256, 64, 8, 4)),  # 192 KiB of shared memory: Hopper and later
)


def plan_of(tokens: int, top_k: int, experts: int, plans: tuple[Plan, Plan, Plan, Plan]) -> Plan:
    """By how many rows an expert gets on average."""
    alone, few, some, many = plans
    pairs = tokens * top_k
    if pairs <= 64:
        return alone
    each = pairs / experts
    return few if each <= 12 else some if each <= 64 else many


def run_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    plan: Plan,
) -> torch.Tensor:
    """See :mod:`aiodisagg.engine.experts`."""
    experts, hidden, inner = down.shape
    tokens, top_k = ids.shape
    pairs, device = tokens * top_k, x.device
    m = plan.gate_up.m
    if plan.alone:
        blocks = pairs
        order = block_expert = ids
    else:
        blocks = min(pairs, pairs // m + experts)
        counts = torch.empty(experts, dtype=torch.int32, device=device)
        order = torch.empty(blocks * m, dtype=torch.int32, device=device)
        block_expert = torch.empty(blocks, dtype=torch.int32, device=device)
        chunk = 512 if pairs <= 512 else 2048
        _count[(experts,)](ids, counts, pairs, CHUNK=chunk, num_warps=4)
        _place[(experts,)](
            ids, counts, order, block_expert, pairs, blocks,
            EXPERTS=experts, EXPERTS_PAD=triton.next_power_of_2(experts), BLOCK_M=m, CHUNK=chunk, num_warps=4,
        )  # fmt: skip
    inside = torch.empty(pairs, inner, dtype=x.dtype, device=device)
    out = torch.empty(pairs, hidden, dtype=x.dtype, device=device)
    t = plan.gate_up
    _gate_up[(triton.cdiv(inner, t.n), blocks)](
        x, gate_up, inside, ids, order, block_expert, pairs,
        EXPERTS=experts, TOP_K=top_k, H=hidden, INNER=inner, ALONE=plan.alone,
        BLOCK_M=t.m, BLOCK_N=t.n, BLOCK_K=t.k, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    t = plan.down
    _down[(triton.cdiv(hidden, t.n), blocks)](
        inside, down, out, weights, ids, order, block_expert, pairs,
        EXPERTS=experts, H=hidden, INNER=inner, ALONE=plan.alone,
        BLOCK_M=t.m, BLOCK_N=t.n, BLOCK_K=t.k, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return out
