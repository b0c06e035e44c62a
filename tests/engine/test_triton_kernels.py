"""The Triton kernels, run by its interpreter on the CPU, against the references in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference_flash import Flash

from aiodisagg.engine import triton_attention, triton_experts, triton_layers
from aiodisagg.engine.experts import draw, run_loop
from aiodisagg.engine.flash import FlashPrefill
from aiodisagg.engine.inputs import Piece, StepInputs
from aiodisagg.engine.kernels import Shapes, add_norm, attend, new_inputs, rotate_store, route

PAGE = 16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context in four parts, not 32: interpreting a program costs milliseconds."""
    monkeypatch.setattr(triton_attention, "splits", lambda entries, kv_heads: 4)


def shapes(*, kv_heads: int = 2, group: int = 2, head_dim: int = 16, experts: int = 6, top_k: int = 2) -> Shapes:
    return Shapes(48, kv_heads * group, kv_heads, head_dim, experts, top_k, PAGE, torch.float32, CPU)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def filled(
    of: Shapes, lengths: Sequence[tuple[int, int]], pad_to: tuple[int, int, int] | None = None, keys: int = 0
) -> tuple[StepInputs, torch.Tensor, torch.Tensor]:
    """Inputs of segments (new, total) on pages in no order, queries, and a pool that is NaN wherever nothing lies."""
    order = torch.randperm(sum(-(-total // PAGE) for _, total in lengths), generator=torch.Generator().manual_seed(1))
    numbers = iter((order + 1).tolist())
    pieces = [Piece(new, total, [next(numbers) for _ in range(-(-total // PAGE))]) for new, total in lengths]
    tokens = sum(new for new, _ in lengths)
    room = max(tokens, pad_to[0] if pad_to else 0)
    step = new_inputs(of, tokens=room, segments=8, pages=len(order) + 8, keys=keys)
    pool = torch.full((2, (len(order) + 1) * PAGE, of.kv_heads, of.head_dim), float("nan"))
    for piece in pieces:
        pages = torch.tensor(piece.pages)
        slots = (pages[:, None] * PAGE + torch.arange(PAGE)).view(-1)[: piece.total]
        pool[:, slots] = torch.randn(2, piece.total, of.kv_heads, of.head_dim)
    step.fill(pieces, torch.zeros(tokens).numpy(), torch.zeros(3, tokens).numpy(), pad_to=pad_to, keys=keys)
    return step, torch.randn(step.tokens, of.heads, of.head_dim), pool


BATCHES: dict[str, list[tuple[int, int]]] = {
    "decodes": [(1, 1), (1, 16), (1, 17), (1, 150)],
    "a prompt": [(37, 37)],
    "prompts": [(20, 20), (70, 70), (2, 2)],
    "a later chunk": [(5, 90), (33, 34)],
    "everything": [(1, 40), (19, 19), (1, 3), (30, 100)],
}


@pytest.mark.parametrize("batch", BATCHES)
def test_attention_of_every_kind_of_batch(batch: str) -> None:
    step, query, pool = filled(shapes(), BATCHES[batch])
    close(triton_attention.attend(query, *pool, step, 0.25), attend(query, *pool, step, 0.25))


@pytest.mark.parametrize(("group", "kv_heads"), [(1, 2), (4, 1), (8, 1), (3, 1)])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_attention_of_every_shape(group: int, kv_heads: int, head_dim: int) -> None:
    step, query, pool = filled(shapes(group=group, kv_heads=kv_heads, head_dim=head_dim), [(1, 35), (18, 50)])
    close(triton_attention.attend(query, *pool, step, 0.1), attend(query, *pool, step, 0.1))


def test_padding_of_a_batch_disturbs_nothing() -> None:
    """More tokens, decode entries and tiles than there are: as a graph sees a batch that is smaller than it."""
    torch.manual_seed(0)
    lengths = [(1, 40), (1, 3)]
    step, query, pool = filled(shapes(), lengths)
    wanted = attend(query, *pool, step, 0.25)
    torch.manual_seed(0)
    padded, _, again = filled(shapes(), lengths, pad_to=(4, 4, 0))
    assert torch.equal(pool.nan_to_num(), again.nan_to_num())
    longer = torch.cat([query, torch.full((2, *query.shape[1:]), 7.0)])
    found = triton_attention.attend(longer, *pool, padded, 0.25)
    close(found[:2], wanted)
    assert found[2:].eq(0).all()
    assert padded.count.tolist() == [2]
    assert padded.slots[2:].tolist() == [-1, -1]


def test_tiles_of_no_segment_are_left_alone() -> None:
    step, query, pool = filled(shapes(), [(18, 30)], pad_to=(18, 3, 5))
    close(triton_attention.attend(query, *pool, step, 0.25), attend(query, *pool, step, 0.25))


def test_a_long_context_is_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [triton_attention.splits(batch, 4) for batch in (1, 8, 16, 32, 64, 1000)] == [32, 32, 8, 8, 2, 2]
    step, query, pool = filled(shapes(kv_heads=1, group=1), [(1, 700)])
    close(triton_attention.attend(query, *pool, step, 0.25), attend(query, *pool, step, 0.25))


@pytest.mark.parametrize("kind", ["first", "dense", "experts", "deepstack"])
def test_add_norm(kind: str) -> None:
    tokens, h, weight = 5, 48, torch.randn(48)
    hidden, delta = torch.randn(tokens, h), torch.randn(tokens, h)
    ids = torch.tensor([[0, 5], [3, 6], [6, 6], [1, 2], [4, 0]], dtype=torch.int32)  # 6: padding
    extra: dict[str, object] = {}
    if kind == "first":
        delta = None  # type: ignore[assignment]
    if kind in ("experts", "deepstack"):
        delta = torch.randn(tokens * 2, h)
        delta[ids.view(-1) == 6] = float("nan")  # nobody wrote those
        extra = {"ids": ids, "experts": 6}
    if kind == "deepstack":
        rows = torch.randn(tokens, 3 * h)
        rows[1] = float("nan")  # no row of an item
        extra |= {"visual": torch.tensor([1, 0, 1, 1, 1], dtype=torch.int32), "rows": rows, "column": 2 * h}
    again = hidden.clone()
    wanted = add_norm(hidden, delta, weight, 1e-6, **extra)  # type: ignore[arg-type]
    close(triton_layers.add_norm(again, delta, weight, 1e-6, **extra), wanted)  # type: ignore[arg-type]
    close(again, hidden)
    assert torch.isfinite(wanted).all()


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 2, 16), (1, 3, 64), (3, 1, 128)])
def test_rotate_store(kv_heads: int, group: int, head_dim: int) -> None:
    heads, tokens = kv_heads * group, 4
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim)
    cos, sin = torch.randn(2, tokens, head_dim)
    q_norm, k_norm = torch.randn(2, head_dim)
    slots = torch.tensor([5, 0, 7, 2], dtype=torch.int32)
    ours, theirs = torch.zeros(2, 2, 8, kv_heads, head_dim)
    wanted = rotate_store(qkv, q_norm, k_norm, 1e-6, cos, sin, slots, *theirs)
    close(triton_layers.rotate_store(qkv, q_norm, k_norm, 1e-6, cos, sin, slots, *ours), wanted)
    close(ours, theirs)
    slots[1] = -1  # padding is written nowhere
    untouched = torch.full_like(ours, 3.0)
    triton_layers.rotate_store(qkv, q_norm, k_norm, 1e-6, cos, sin, slots, *untouched)
    assert untouched[:, [0, 1, 3, 4, 6]].eq(3).all()
    close(untouched[:, [5, 7, 2]], theirs[:, [5, 7, 2]])


@pytest.mark.parametrize(("experts", "top_k"), [(6, 2), (16, 8), (5, 3)])
def test_route(experts: int, top_k: int) -> None:
    logits, count = torch.randn(5, experts), torch.tensor([4], dtype=torch.int32)
    (ids, weights), (found, their) = route(logits, top_k, count), triton_layers.route(logits, top_k, count)
    assert torch.equal(ids, found)
    assert found[4].tolist() == [experts] * top_k
    close(their[:4], weights[:4])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's, which is numpy
def test_logits_that_are_not_numbers_choose_experts_that_exist() -> None:
    logits = torch.full((1, 6), float("nan"))
    ids, _ = triton_layers.route(logits, 2, torch.tensor([1], dtype=torch.int32))
    assert ids.max() < 6


PLANS = [plan for plans in triton_experts.SETS.values() for plan in plans]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.gate_up.m}-{plan.gate_up.n}-{plan.down.n}")
def test_experts_by_every_plan(plan: triton_experts.Plan) -> None:
    of, inner = shapes(), 40  # which is no multiple of any block
    gate_up, down = torch.randn(of.experts, 2 * inner, of.hidden) * 0.2, torch.randn(of.experts, of.hidden, inner)
    x, ids, weights = draw(of, 11, padding=2)
    ids[0, 0] = ids[1, 0] = 5  # somebody has company, and expert 4 nobody
    ids[ids == 4] = 3
    found = triton_experts.run_experts(x, ids, weights, gate_up, down, plan)
    close(found[:-4], run_loop(x, ids, weights, gate_up, down)[:-4])


def test_plans_by_rows_per_expert() -> None:
    for plans in triton_experts.SETS.values():
        found = [triton_experts.plan_of(tokens, 8, 128, plans) for tokens in (8, 64, 512, 2048)]
        assert found == list(plans)
        assert [plan.gate_up.m == plan.down.m for plan in plans] == [True] * 4  # they share the order of pairs


LISTED = {
    "a prompt": [(37, 37)],
    "everything": [(1, 40), (1, 3), (19, 19), (30, 100), (2, 17)],
    "one token between longer ones": [(1, 5), (19, 19), (1, 40), (30, 100)],
}


@pytest.mark.parametrize("spare", [0, 70])
@pytest.mark.parametrize("batch", LISTED)
def test_prefill_by_listed_keys(batch: str, spare: int) -> None:
    """Exactly listed, and with padding of tokens, decodes, tiles and keys."""
    of, flash, lengths = shapes(), Flash(), LISTED[batch]
    first = next(i for i, (new, _) in enumerate(lengths) if new > 1)
    keys, tokens = sum(total for _, total in lengths[first:]), sum(new for new, _ in lengths)
    step, query, pool = filled(of, lengths, (tokens + 5, 5, 20) if spare else None, keys + spare)
    assert step.key_slots.shape[0] == keys + spare
    queries, ends = step.query_at.tolist(), step.key_at.tolist()
    assert (queries[0], ends[0]) == (first, 0)
    assert set(queries[len(lengths) - first :]) == {tokens} and set(ends[len(lengths) - first :]) == {keys}

    def pages(*args: Any, longer: bool = True, **named: Any) -> torch.Tensor:
        assert not longer, "what is listed is computed once"
        return triton_attention.attend(*args, longer=longer, **named)

    run = FlashPrefill(pages, flash)
    close(run(query, *pool, step, 0.25)[:tokens], attend(query, *pool, step, 0.25)[:tokens])
    assert flash.calls == 1


def test_without_a_list_pages_are_read() -> None:
    of, flash = shapes(), Flash()
    step, query, pool = filled(of, [(1, 40), (30, 100)])
    run = FlashPrefill(triton_attention.attend, flash)
    close(run(query, *pool, step, 0.25), attend(query, *pool, step, 0.25))
    assert flash.calls == 0


def test_a_list_is_of_its_step_only() -> None:
    of, flash = shapes(), Flash()
    step, query, pool = filled(of, [(1, 40), (30, 100), (3, 9)], keys=120)
    run, whole = FlashPrefill(triton_attention.attend, flash), pool.nan_to_num()
    other = [Piece(piece.new, piece.total, piece.pages[::-1]) for piece in step.pieces[:2]]
    step.fill(other, torch.zeros(31).numpy(), torch.zeros(3, 31).numpy(), keys=100)
    close(run(query[:31], *whole, step, 0.25), attend(query[:31], *whole, step, 0.25))
    step.fill(other, torch.zeros(31).numpy(), torch.zeros(3, 31).numpy())
    close(run(query[:31], *whole, step, 0.25), attend(query[:31], *whole, step, 0.25))
    assert flash.calls == 1
