"""Prompts that begin alike: what may be shared, what must not be, and which items need not be encoded."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_engine import (
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

from aiodisagg.engine.prefix import PageKeys
from aiodisagg.engine.stream import RequestHandle
from aiodisagg.errors import EngineError
from aiodisagg.models.base import PromptPlan

pytestmark = pytest.mark.anyio

PAGE = 4


def keys(plan: PromptPlan, page_size: int = PAGE) -> list[bytes]:
    return PageKeys(plan, page_size).keys


def same(a: list[bytes], b: list[bytes]) -> int:
    """How many keys agree; after the first that does not, none may."""
    equal = [x == y for x, y in zip(a, b, strict=False)]
    assert equal == sorted(equal, reverse=True)
    return sum(equal)


def test_only_full_pages_have_keys_and_all_keys_differ() -> None:
    assert [len(keys(make_plan([n]))) for n in (1, 3, 4, 7, 8, 100)] == [0, 0, 1, 1, 2, 25]
    plan = make_plan([3, (1, 4, 4), 2])
    alike = replace(plan, input_ids=np.full(plan.tokens, 7), positions=np.zeros((3, plan.tokens), dtype=np.int64))
    assert len(set(keys(alike))) == 5


def test_two_images_of_one_size_share_only_what_is_before_them() -> None:
    plan = make_plan([9, (1, 2, 3), 2, (1, 4, 4), 9])
    other = changed(plan, 0, digest="0" * 32)
    assert np.array_equal(plan.input_ids, other.input_ids) and np.array_equal(plan.positions, other.positions)
    assert same(keys(plan), keys(other)) == 2
    assert same(keys(plan), keys(changed(plan, 1, digest="f" * 32))) == 17 // PAGE
    assert same(keys(plan), keys(make_plan([9, (1, 2, 3), 2, (1, 4, 4), 9]))) == plan.tokens // PAGE


@pytest.mark.parametrize(
    "what", [{"grid_thw": (1, 2, 8)}, {"fps": 3.0}, {"kind": "video"}], ids=lambda w: next(iter(w))
)
def test_what_an_item_is_shown_as_is_part_of_the_key(what: dict[str, Any]) -> None:
    plan = make_plan([4, (1, 2, 2), 4])
    assert same(keys(plan), keys(changed(plan, 0, **what))) == 1


def test_equal_ids_at_other_positions_are_not_equal() -> None:
    """A square and a row of as many tokens: what follows stands elsewhere, and so do they."""
    square, row = make_plan([4, (1, 2, 2), 8]), make_plan([4, (1, 1, 4), 8])
    disguised = changed(row, 0, digest=square.items[0].digest, grid_thw=square.items[0].grid_thw)
    assert np.array_equal(square.input_ids, disguised.input_ids)
    assert same(keys(square), keys(disguised)) == 1


def test_rows_of_an_item_are_told_apart_by_where_they_begin() -> None:
    """The same picture twice in a row is not one picture with twice the rows."""
    plan = make_plan([4, (1, 2, 4), 3])
    item = plan.items[0]
    halves = tuple(replace(item, rows=4, spans=(span,)) for span in ((4, 8), (8, 12)))
    assert same(keys(plan), keys(replace(plan, items=halves))) == 2


def test_an_answer_has_the_keys_of_the_prompt_that_repeats_it() -> None:
    whole = make_plan([6, (1, 2, 3), 20])
    for cut in (12, 13, 15, 16, 19):
        plan = replace(whole, input_ids=whole.input_ids[:cut], positions=whole.positions[:, :cut])
        growing = PageKeys(plan, PAGE)
        for at in range(cut, whole.tokens):
            growing.grow(int(whole.input_ids[at]), at + whole.delta)
            assert len(growing.keys) == (at + 1) // PAGE
        assert growing.keys == keys(whole)


def test_an_answer_behind_another_picture_has_other_keys() -> None:
    """The picture ends in a page that the answer fills."""
    plan = make_plan([5, (1, 1, 2)])
    both = PageKeys(plan, PAGE), PageKeys(changed(plan, 0, digest="f" * 32), PAGE)
    for one in both:
        one.grow(7, plan.tokens + plan.delta)
    assert len(both[0].keys) == 2 and same(*(one.keys for one in both)) == 1


# -- in the engine -------------------------------------------------------------------------------------------------

NEW = 12


async def first_need(handle: RequestHandle) -> tuple[int, ...]:
    return await anext(aiter(handle.needs()))


async def test_the_next_turn_needs_no_image_and_computes_only_what_is_new() -> None:
    model = tiny_model("moe")
    plan = make_plan([5, (1, 4, 4), 3, (1, 3, 5), 4])
    rows = make_rows(plan, 3)
    async with make_engine(model, page_size=PAGE) as engine:
        first = await ask(engine, plan, rows, max_tokens=NEW)
        before = engine.stats()
        turn = with_text(plan, [*first.tokens, 1, 2, 3, 4, 5])
        handle = submit(engine, turn, max_tokens=NEW)
        assert await first_need(handle) == ()
        second = await asyncio.wait_for(read(handle), 30)
        stats = engine.stats()
    assert first.tokens == plain_loop(model, plan, rows, NEW)
    assert second.tokens == plain_loop(model, turn, rows, NEW)
    known = plan.tokens + NEW - 1  # the last token of an answer is never computed
    assert stats.tokens_reused == known // PAGE * PAGE and stats.prefix_hits == 1
    assert stats.tokens_prefilled - before.tokens_prefilled == turn.tokens - stats.tokens_reused
    assert stats.rows_used == before.rows_used, "rows were used again"
    assert stats.pages_used == 0 and stats.pages_free == 128 and stats.pages_idle > 0


async def test_the_same_prompt_again_computes_the_last_page() -> None:
    model = tiny_model("moe")
    plan = make_plan([3, (1, 3, 3), 4])
    assert plan.tokens % PAGE == 0
    rows = make_rows(plan, 3)
    async with make_engine(model, page_size=PAGE) as engine:
        answers = [await ask(engine, plan, rows if i == 0 else (), max_tokens=NEW) for i in range(3)]
        assert engine.stats().tokens_reused == 2 * (plan.tokens - PAGE)
    assert {tuple(a.tokens) for a in answers} == {tuple(plain_loop(model, plan, rows, NEW))}


async def test_of_several_items_those_are_needed_that_are_not_in_pages() -> None:
    model = tiny_model("moe")
    plan = make_plan([2, (1, 4, 4), 1, (1, 4, 5), 1, (1, 3, 3), 5])
    rows = make_rows(plan, 3)
    other = changed(plan, 2, digest="f" * 32)
    other_rows = [*rows[:2], rows[2].flip(0)]
    cut = changed(plan, 1, digest="e" * 32)
    cut_rows = [rows[0], rows[1].flip(0), rows[2]]
    cases = [(other, other_rows, (1, 2)), (cut, cut_rows, (0, 1, 2)), (plan, rows, (2,))]
    expected = [plain_loop(model, asked, its_rows, NEW) for asked, its_rows, _ in cases]
    async with make_engine(model, page_size=16) as engine:
        handle = submit(engine, plan, max_tokens=NEW)
        assert await first_need(handle) == (0, 1, 2)
        deliver_all(engine, handle, rows)
        await read(handle)
        for (asked, its_rows, needed), tokens in zip(cases, expected, strict=True):
            handle = submit(engine, asked, max_tokens=NEW)
            assert await first_need(handle) == needed, "an item that ends in a page that is not there is needed whole"
            for i in needed:
                engine.deliver(handle, i, 0, its_rows[i])
            assert (await read(handle)).tokens == tokens


async def test_a_request_that_lost_its_pages_asks_for_its_images_again() -> None:
    """It is admitted on pages that hold its first image and waits for its second. An older request takes all pages;
    the second image comes meanwhile, and then the first has to come too."""
    model = tiny_model("moe")
    plan = make_plan([2, (1, 4, 4), 2, (1, 2, 2), 3])
    rows = make_rows(plan, 3)
    before = changed(plan, 1, digest="f" * 32)
    older = make_plan([9], seed=3)
    expected = plain_loop(model, older, [], 44), plain_loop(model, plan, rows, NEW)
    async with make_engine(model, page_size=PAGE, num_pages=14) as engine:
        await ask(engine, before, rows, max_tokens=1)
        held = submit(engine, older, max_tokens=44)
        handle = submit(engine, plan, max_tokens=NEW)
        needs = aiter(handle.needs())

        def second_image(*args: object) -> None:
            """Before a step of the older request, on the step thread."""
            if engine.stats().preemptions:
                engine.deliver(handle, 1, 0, rows[1])

        hook = model.register_forward_pre_hook(second_image)
        assert await anext(needs) == (1,)
        first = await asyncio.wait_for(read(held), 30)
        hook.remove()
        while (again := await anext(needs)) == ():
            pass
        assert again == (0,)
        await ask(engine, make_plan([3], seed=9), max_tokens=1)  # the engine has gone round and has not missed it
        engine.deliver(handle, 0, 0, rows[0])
        answer = await asyncio.wait_for(read(handle), 30)
        assert [needed async for needed in needs] == []
        stats = engine.stats()
    assert (first.tokens, answer.tokens) == expected
    assert stats.preemptions == 1 and stats.evictions > 0
    assert stats.tokens_reused == 20 + PAGE, "of its six pages one was left"


async def test_rows_that_are_nan_do_not_stay_in_pages() -> None:
    model = tiny_model("moe")
    plan = make_plan([3, (1, 4, 4), 9])
    rows = make_rows(plan, 3)
    bad = [rows[0].clone()]
    bad[0][2] = float("nan")
    expected = plain_loop(model, plan, rows, NEW)
    async with make_engine(model, page_size=PAGE, token_budget=8) as engine:
        with pytest.raises(EngineError, match="not finite"):
            await ask(engine, plan, bad)
        handle = submit(engine, plan, max_tokens=NEW)
        assert await first_need(handle) == (0,)
        deliver_all(engine, handle, rows)
        assert (await read(handle)).tokens == expected


async def test_switched_off_nothing_is_reused() -> None:
    model = tiny_model("moe")
    plan = make_plan([3, (1, 4, 4), 9])
    rows = make_rows(plan, 3)
    async with make_engine(model, page_size=PAGE, prefix_cache=False) as engine:
        for _ in range(2):
            handle = submit(engine, plan, max_tokens=2)
            assert await first_need(handle) == (0,)
            deliver_all(engine, handle, rows)
            await read(handle)
        stats = engine.stats()
    assert (stats.tokens_reused, stats.prefix_hits, stats.pages_idle) == (0, 0, 0)


async def test_a_prompt_that_no_page_takes_is_not_hashed() -> None:
    async with make_engine(tiny_model("dense"), num_pages=4) as engine:
        assert engine.keys(make_plan([4 * PAGE])) is not None
        assert engine.keys(make_plan([engine.limit])) is None
