"""Tokens equal the plain loop's, whatever the batch, the pool, the budget and the order in which rows arrive."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from tiny_engine import (
    Answer,
    ask,
    changed,
    deliver_all,
    make_engine,
    make_plan,
    make_rows,
    plain_loop,
    read,
    submit,
    tiny_model,
    with_text,
)

from aiodisagg.engine.engine import Engine
from aiodisagg.engine.stream import RequestHandle
from aiodisagg.models.base import PromptPlan

pytestmark = pytest.mark.anyio

PROMPTS: list[list[int | tuple[int, int, int]]] = [
    [9],
    [3, (1, 4, 5), 4],
    [2, (1, 2, 3), 1, (1, 5, 2), 2, (1, 3, 3), 3],
    [4, (3, 3, 4), 5],
    [1, (1, 2, 2), 2, (2, 2, 3), 6],
    [70],
]
NEW = 12


@cache
def cases(kind: str, levels: int) -> list[tuple[PromptPlan, list[torch.Tensor], list[int]]]:
    """Prompts, their rows and the plain loop's tokens."""
    model, made = tiny_model(kind), []
    for i, parts in enumerate(PROMPTS):
        plan = make_plan(parts, seed=i)
        rows = make_rows(plan, levels, seed=i)
        made.append((plan, rows, plain_loop(model, plan, rows, NEW)))
    return made


@pytest.mark.parametrize("kind", ["moe", "dense"])
@pytest.mark.parametrize("levels", [0, 1, 2, 3])
async def test_a_mixed_batch(kind: str, levels: int) -> None:
    model = tiny_model(kind)
    expected = cases(kind, levels)
    async with make_engine(model) as engine:
        answers = await asyncio.gather(*(ask(engine, p, r, max_tokens=NEW) for p, r, _ in expected))
        stats = engine.stats()
    assert [a.tokens for a in answers] == [tokens for _, _, tokens in expected]
    assert stats.rows_used == sum(len(item) for _, rows, _ in expected for item in rows)
    assert max(size for size, _ in stats.batch_sizes) == len(PROMPTS)
    assert stats.pages_used == 0 and stats.rows_bytes == 0


@pytest.mark.parametrize("budget", [8, 64, 1024])
@pytest.mark.parametrize("kind", ["moe", "dense"])
async def test_chunked_prefill(kind: str, budget: int) -> None:
    model = tiny_model(kind)
    expected = cases(kind, 3)
    async with make_engine(model, token_budget=budget) as engine:
        answers = await asyncio.gather(*(ask(engine, p, r, max_tokens=NEW) for p, r, _ in expected))
    assert [a.tokens for a in answers] == [tokens for _, _, tokens in expected]


@pytest.mark.parametrize(("num_pages", "page_size"), [(24, 4), (90, 1), (6, 16)])
async def test_preemption_in_a_small_pool(num_pages: int, page_size: int) -> None:
    model = tiny_model("moe")
    expected = cases("moe", 3)
    async with make_engine(model, num_pages=num_pages, page_size=page_size) as engine:
        answers = await asyncio.gather(*(ask(engine, p, r, max_tokens=NEW) for p, r, _ in expected))
        stats = engine.stats()
    assert [a.tokens for a in answers] == [tokens for _, _, tokens in expected]
    assert stats.preemptions > 0 or page_size == 16
    assert stats.pages_used == 0


async def trickle(engine: Engine, handle: RequestHandle, rows: Sequence[torch.Tensor], seed: int) -> None:
    """Sixteen rows at a time, in random order, each after the engine has done something else."""
    rng = random.Random(seed)
    pieces = [(i, at) for i, item in enumerate(rows) for at in range(0, len(item), 16)]
    rng.shuffle(pieces)
    for i, at in pieces:
        engine.deliver(handle, i, at, rows[i][at : at + 16])
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(3))
async def test_rows_in_any_order_while_running(seed: int) -> None:
    model = tiny_model("moe")
    plan = make_plan([5, (1, 6, 8), 3, (3, 4, 5), 2, (1, 5, 5), 4], seed=seed)
    rows = make_rows(plan, 3, seed=seed)
    expected = plain_loop(model, plan, rows, NEW)
    other = make_plan([6])
    expected_other = plain_loop(model, other, [], 60)
    async with make_engine(model, token_budget=32, num_pages=40) as engine:
        neighbour = asyncio.create_task(ask(engine, other, max_tokens=60))
        handle = submit(engine, plan, max_tokens=NEW)
        reader = asyncio.create_task(read(handle))
        await handle.admitted
        await trickle(engine, handle, rows, seed)
        assert (await reader).tokens == expected
        assert (await neighbour).tokens == expected_other


async def test_prefill_runs_before_the_last_rows_are_there() -> None:
    model = tiny_model("moe")
    plan = make_plan([5, (1, 4, 4), 3, (1, 4, 4), 2])
    rows = make_rows(plan, 3)
    expected = plain_loop(model, plan, rows, NEW)
    async with make_engine(model, coalesce_tokens=0) as engine:
        handle = submit(engine, plan, max_tokens=NEW)
        await handle.admitted
        assert engine.stats().pages_used == 3, "the pages of the whole prompt are reserved before any row is here"
        engine.deliver(handle, 0, 0, rows[0])
        await ask(engine, make_plan([4]), max_tokens=3)  # the engine has gone round meanwhile
        assert engine.stats().tokens_prefilled == 4 + 5 + 16 + 3
        engine.deliver(handle, 1, 0, rows[1])
        assert (await read(handle)).tokens == expected
        assert engine.stats().tokens_prefilled == 4 + plan.tokens, "nothing was computed twice"


async def serve(
    engine: Engine, plan: PromptPlan, rows: Sequence[torch.Tensor], rng: random.Random
) -> tuple[list[int], list[int]]:
    """Tokens and the items that were asked for, whose rows come in pieces of any size, in any order."""
    handle = submit(engine, plan, max_tokens=NEW)
    asked: list[int] = []

    async def encode() -> None:
        async for needed in handle.needs():
            asked.extend(needed)
            pieces = []
            for i in needed:
                cuts = sorted({0, len(rows[i]), *(rng.randrange(len(rows[i])) for _ in range(3))})
                pieces += [(i, start, stop) for start, stop in itertools.pairwise(cuts)]
            rng.shuffle(pieces)
            for i, start, stop in pieces:
                engine.deliver(handle, i, start, rows[i][start:stop])
                await asyncio.sleep(0)

    encoding = asyncio.create_task(encode())
    answer = await asyncio.wait_for(read(handle), 60)
    await encoding
    return answer.tokens, asked


@pytest.mark.parametrize(("seed", "overlap"), [(0, True), (1, True), (2, False)])
async def test_rows_in_any_order_with_reuse_and_preemption(seed: int, overlap: bool) -> None:
    """Chats that begin alike, their next turns, and the same with another picture, twice, in a pool for two of them."""
    model, rng = tiny_model("moe"), random.Random(seed)
    first = make_plan([3, (1, 4, 5), 4, (2, 3, 3), 3], seed=seed)
    rows = make_rows(first, 3, seed=seed)
    answer = plain_loop(model, first, rows, NEW)
    other, other_rows = changed(first, 1, digest="f" * 32), [rows[0], rows[1].flip(0)]
    prompts = [
        (first, rows),
        (with_text(first, answer), rows),
        (with_text(first, [*answer, 5, 6, 7, 8, 9]), rows),
        (other, other_rows),
        (with_text(other, [9, 8, 7]), other_rows),
    ]
    expected = [plain_loop(model, plan, its_rows, NEW) for plan, its_rows in prompts]
    rng.shuffle(order := list(range(len(prompts))))
    config = {"num_pages": 24, "page_size": 4, "token_budget": 24, "itl_budget_ms": 1.0, "coalesce_tokens": 8}
    async with make_engine(model, overlap=overlap, **config) as engine:
        for _ in range(2):
            served = await asyncio.gather(*(serve(engine, *prompts[i], rng) for i in order))
            assert {i: tokens for i, (tokens, _) in zip(order, served, strict=True)} == dict(enumerate(expected))
        alone = [await serve(engine, *prompts[i], rng) for i in (2, 2)]
        stats = engine.stats()
    assert [tokens for tokens, _ in alone] == [expected[2]] * 2
    assert alone[1][1] == [], "what was just answered needs no picture"
    assert stats.preemptions and stats.evictions and stats.tokens_reused and stats.rows_used
    assert stats.pages_used == 0 and stats.pages_free == 24


@pytest.mark.parametrize("budget", [8, 64])
async def test_a_plain_text_model(budget: int) -> None:
    model = tiny_model("text")
    plans = [make_plan([n], seed=n) for n in (1, 5, 40)]
    expected = [plain_loop(model, plan, [], NEW) for plan in plans]
    async with make_engine(model, token_budget=budget) as engine:
        answers = await asyncio.gather(*(ask(engine, plan, max_tokens=NEW) for plan in plans))
    assert [a.tokens for a in answers] == expected


async def test_the_model_is_given_back_with_its_own_attention() -> None:
    model = tiny_model("dense")
    before = model.config._attn_implementation
    async with make_engine(model) as engine:
        await ask(engine, make_plan([3]))
    assert model.config._attn_implementation == before != "aio_paged"


async def test_visual_tokens_take_nothing_from_the_embedding_table() -> None:
    model = tiny_model("dense")
    plan = make_plan([3, (1, 3, 3), 3])
    rows = make_rows(plan, 2)
    expected = plain_loop(model, plan, rows, NEW)
    table = model.get_input_embeddings().weight
    saved = table[300].detach().clone()
    try:
        with torch.no_grad():
            table[300] = float("nan")
        async with make_engine(model, prefix_cache=False) as engine:
            answer: Answer = await ask(engine, plan, rows, max_tokens=NEW)
            assert engine.stats().rows_used == 9
            changed = await ask(engine, plan, [rows[0].flip(0)], max_tokens=NEW)
    finally:
        with torch.no_grad():
            table[300] = saved
    assert answer.tokens == expected
    assert changed.tokens != expected, "the rows have no effect"


async def test_deepstack_rows_matter() -> None:
    model = tiny_model("moe")
    plan = make_plan([3, (1, 6, 6), 3])
    rows = make_rows(plan, 3)
    without = rows[0].clone()
    without[:, 32:] = 0
    async with make_engine(model, prefix_cache=False) as engine:
        handle = submit(engine, plan, max_tokens=NEW)
        deliver_all(engine, handle, rows)
        first = await read(handle)
        second = await ask(engine, plan, [without], max_tokens=NEW)
    assert first.tokens != second.tokens
