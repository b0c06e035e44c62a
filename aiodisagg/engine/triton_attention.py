"""Attention over a paged KV pool for packed batches: two Triton kernels, and one that joins split results.

Everything that varies between steps is read from device memory, so a launch can be replayed by a CUDA graph: the grid
is of the capacity, and programs without work return at once.

* ``_prefill``: a tile is BLOCK_M rows of one segment and one KV head; a row is a (token, query head of the group) pair,
  so the heads that share keys share their loads, whatever the group's size.
* ``_decode``: segments of one token. A program takes one KV head and one of SPLITS parts of the context (flash
  decoding): with a batch of one there are too few heads to fill a GPU. ``_join`` adds the parts up by their
  log-sum-exp.

Keys and values of the step's own tokens are in the pool already. A slot is ``page * page_size + offset``; the pages of
a segment are ``pages[first:]``. Works in float32, float16 and bfloat16; sums are float32. Under ``TRITON_INTERPRET=1``
the same code runs on CPU tensors.
"""

# Triton has no types: kernels are Python that is compiled, not called.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def _visit(
    acc, m, mass, q, keys, values, pages, n0, stop, position, kv_head, scale,
    KV_HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys. ``scale`` has the factor of base-2 exponentials in it."""
    n = n0 + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    page = tl.load(pages + n // PAGE, mask=n < stop, other=0)
    row = ((page * PAGE + n % PAGE).to(tl.int64) * KV_HEADS + kv_head) * D
    there = (n < stop)[:, None] & (d < D)[None, :]
    k = tl.load(keys + row[:, None] + d[None, :], mask=there, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        s = tl.where((n[None, :] <= position[:, None]) & (n < stop)[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    v = tl.load(values + row[:, None] + d[None, :], mask=there, other=0.0)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return acc, m_new, mass * shrink + tl.sum(p, 1)


@triton.jit
def _prefill(
    q_ptr, keys, values, out_ptr, pages, tile_segment, tile_at, seg_start, seg_new, seg_total, seg_pages, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    # The longest tiles first: the last of a causal segment reads all of it.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    segment = tl.load(tile_segment + tile)
    if segment < 0:
        return
    at = tl.load(tile_at + tile)
    start, new, total = tl.load(seg_start + segment), tl.load(seg_new + segment), tl.load(seg_total + segment)
    its_pages = pages + tl.load(seg_pages + segment)
    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    token = at + row // GROUP
    valid = (row < TOKENS * GROUP) & (token < new)
    head = kv_head * GROUP + row % GROUP
    where = ((start + token).to(tl.int64) * (KV_HEADS * GROUP) + head) * D
    there = valid[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + where[:, None] + d[None, :], mask=there, other=0.0)
    past = total - new
    position = past + token
    acc = tl.zeros([BLOCK_M, D_PAD], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_M], dtype=tl.float32)
    stop = tl.minimum(total, past + at + TOKENS)
    seen_by_all = (past + at + 1) // BLOCK_N * BLOCK_N
    for n0 in range(0, seen_by_all, BLOCK_N):
        acc, m, mass = _visit(
            acc, m, mass, q, keys, values, its_pages, n0, stop, position, kv_head, scale,
            KV_HEADS, D, D_PAD, PAGE, BLOCK_N, False,
        )  # fmt: skip
    for n0 in range(seen_by_all, stop, BLOCK_N):
        acc, m, mass = _visit(
            acc, m, mass, q, keys, values, its_pages, n0, stop, position, kv_head, scale,
            KV_HEADS, D, D_PAD, PAGE, BLOCK_N, True,
        )  # fmt: skip
    acc = acc / mass[:, None]
    tl.store(out_ptr + where[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _decode(
    q_ptr, keys, values, part_ptr, lse_ptr, pages, dec_token, dec_total, dec_pages, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    entry, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(dec_token + entry)
    if token < 0:
        return
    total = tl.load(dec_total + entry)
    its_pages = pages + tl.load(dec_pages + entry)
    share = tl.cdiv(tl.cdiv(total, SPLITS), BLOCK_N) * BLOCK_N
    low = split * share
    stop = tl.minimum(low + share, total)
    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    head = kv_head * GROUP + row
    valid = row < GROUP
    there = valid[:, None] & (d < D)[None, :]
    where = (token.to(tl.int64) * (KV_HEADS * GROUP) + head) * D
    q = tl.load(q_ptr + where[:, None] + d[None, :], mask=there, other=0.0)
    position = tl.full([BLOCK_M], 0, dtype=tl.int32) + total
    acc = tl.zeros([BLOCK_M, D_PAD], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_M], dtype=tl.float32)
    for n0 in range(low, stop, BLOCK_N):
        acc, m, mass = _visit(
            acc, m, mass, q, keys, values, its_pages, n0, stop, position, kv_head, scale,
            KV_HEADS, D, D_PAD, PAGE, BLOCK_N, True,
        )  # fmt: skip
    empty = mass == 0.0
    acc = acc / tl.where(empty, 1.0, mass)[:, None]
    lse = tl.where(empty, float("-inf"), m + tl.log2(tl.where(empty, 1.0, mass)))
    part = (entry * (KV_HEADS * GROUP) + head).to(tl.int64) * SPLITS + split
    tl.store(part_ptr + part[:, None] * D + d[None, :], acc, mask=there)
    tl.store(lse_ptr + part, lse, mask=valid)


@triton.jit
def _join(
    part_ptr, lse_ptr, out_ptr, dec_token,
    HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    entry, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(dec_token + entry)
    if token < 0:
        return
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, D_PAD)
    part = (entry * HEADS + head).to(tl.int64) * SPLITS + split
    lse = tl.load(lse_ptr + part)
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)  # an entry without context, which is padding: zeros
    weight = tl.exp2(lse - top)
    acc = tl.load(part_ptr + part[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    acc = tl.sum(acc * weight[:, None], 0) / tl.maximum(tl.sum(weight, 0), 1e-30)
    where = (token.to(tl.int64) * HEADS + head) * D
    tl.store(out_ptr + where + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)


def _block_m(group: int) -> int:
    return max(128, triton.next_power_of_2(group))


def splits(entries: int, kv_heads: int, multiprocessors: int = 132) -> int:
    """Parts a context is cut into: enough programs for two on each multiprocessor. Three numbers only, for each is
    compiled anew; a part too many costs a program that finds nothing to do."""
    wanted = -(-2 * multiprocessors // max(1, entries * kv_heads))
    return 32 if wanted > 8 else 8 if wanted > 2 else 2


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: Any, scaling: float, *, longer: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention outputs [T, heads, d] of queries [T, heads, d] over one layer of the pool [slots, kv_heads, d].

    ``step``: the :class:`~aiodisagg.engine.inputs.StepInputs`. Rows of padding are zero or undefined, never read by
    others; those of longer segments stay what they are in ``out`` unless ``longer``.
    """
    heads, d = query.shape[1], query.shape[2]
    kv_heads = keys.shape[1]
    group, d_pad = heads // kv_heads, max(16, triton.next_power_of_2(d))
    out = torch.empty_like(query) if out is None else out
    scale = scaling * LOG2E
    if longer and step.tiles:
        _prefill[(step.tiles, kv_heads)](
            query, keys, values, out, step.pages, step.tile_segment, step.tile_at,
            step.seg_start, step.seg_new, step.seg_total, step.seg_pages, scale,
            KV_HEADS=kv_heads, GROUP=group, D=d, D_PAD=d_pad, PAGE=step.page_size,
            BLOCK_M=_block_m(group), BLOCK_N=64, num_warps=8, num_stages=3 if d_pad <= 128 else 2,
        )  # fmt: skip
    if step.decodes:
        parts = splits(step.decodes, kv_heads)
        part = torch.empty(step.decodes, heads, parts, d, dtype=torch.float32, device=query.device)
        lse = torch.empty(step.decodes, heads, parts, dtype=torch.float32, device=query.device)
        _decode[(step.decodes, kv_heads, parts)](
            query, keys, values, part, lse, step.pages, step.dec_token, step.dec_total, step.dec_pages, scale,
            KV_HEADS=kv_heads, GROUP=group, D=d, D_PAD=d_pad, PAGE=step.page_size, SPLITS=parts,
            BLOCK_M=max(16, triton.next_power_of_2(group)), BLOCK_N=64, num_warps=4, num_stages=3,
        )  # fmt: skip
        _join[(step.decodes, heads)](
            part, lse, out, step.dec_token, HEADS=heads, D=d, D_PAD=d_pad, SPLITS=parts, num_warps=2
        )
    return out
