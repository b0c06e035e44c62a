"""Requests that come while a step is at work: they get pages at once, and their items can be encoded meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tiny_engine import (
    decode,
    deliver_all,
    eventually,
    make_engine,
    make_plan,
    make_rows,
    plain_loop,
    read,
    submit,
    tiny_model,
)

from aiodisagg.engine.config import EngineConfig
from aiodisagg.engine.engine import Engine, EngineRequest
from aiodisagg.engine.schedule import Step
from aiodisagg.engine.steps import StepWatcher
from aiodisagg.engine.stream import RequestHandle
from aiodisagg.engine.types import FinishReason, SamplingParams
from aiodisagg.errors import EngineError

pytestmark = pytest.mark.anyio

PATIENCE_S = 60.0


def watched_engine(watcher: StepWatcher) -> Engine:
    config = EngineConfig(num_pages=128, token_budget=64)
    return Engine(tiny_model("moe"), decode, frozenset(), config, watcher=watcher)


@asynccontextmanager
async def at_work(
    model: Any, *, error: Exception | None = None, **config: Any
) -> AsyncIterator[tuple[Engine, RequestHandle, Callable[[], None]]]:
    """An engine in the middle of the first step of a prompt of 20 tokens, which may raise; what lets it go on."""
    engine = make_engine(model, **config)
    entered, go, steps = threading.Event(), threading.Event(), list[Any]()
    forward = engine._runner.forward

    def held(batch: Any) -> Any:
        steps.append(batch)
        entered.set()
        assert go.wait(PATIENCE_S)
        if error is not None and len(steps) == 1:
            raise error
        return forward(batch)

    engine._runner.forward = held  # type: ignore[method-assign]
    async with engine:
        first = submit(engine, make_plan([20]))
        assert await asyncio.to_thread(entered.wait, PATIENCE_S)
        try:
            async with asyncio.timeout(PATIENCE_S):
                yield engine, first, go.set
        finally:
            go.set()


async def test_who_comes_during_a_step_is_let_in_before_its_end() -> None:
    model, plan = tiny_model("moe"), make_plan([3, (1, 4, 4), 2])
    rows = make_rows(plan, 3)
    async with at_work(model) as (engine, first, go_on):
        second = submit(engine, plan)
        assert await anext(second.needs()) == (0,)
        assert engine.stats().running == 2 and engine.stats().steps == 0
        deliver_all(engine, second, rows)  # and its rows are taken in
        go_on()
        answers = await asyncio.gather(read(first), read(second))
        assert engine.stats().pages_used == 0
    assert answers[0].tokens == plain_loop(model, make_plan([20]), [], 8)
    assert answers[1].tokens == plain_loop(model, plan, rows, 8)


@pytest.mark.parametrize("watched", ["planned", "begun"])
async def test_who_comes_between_a_plan_and_its_step_is_let_in_before_the_end_of_the_step(watched: str) -> None:
    """The thread has the table then, and has looked into its inbox."""
    there, go, computed, end = (threading.Event() for _ in range(4))

    class Slow(StepWatcher):
        def whole_prompts(self) -> bool:
            return self._holds("planned")

        def step_began(self) -> None:
            self._holds("begun")

        def _holds(self, where: str) -> bool:
            if where == watched and not go.is_set():
                there.set()
                assert go.wait(PATIENCE_S)
            return False

    plan = make_plan([3, (1, 4, 4), 2])
    engine = watched_engine(Slow())
    forward = engine._runner.forward

    def held(batch: Any) -> Any:
        computed.set()
        assert end.wait(PATIENCE_S)
        return forward(batch)

    engine._runner.forward = held  # type: ignore[method-assign]
    async with engine, asyncio.timeout(PATIENCE_S):
        first = submit(engine, make_plan([20]))
        assert await asyncio.to_thread(there.wait, PATIENCE_S)
        second = submit(engine, plan)
        go.set()
        try:
            assert await anext(second.needs()) == (0,)
            assert await asyncio.to_thread(computed.wait, PATIENCE_S) and engine.stats().steps == 0
        finally:
            end.set()
        deliver_all(engine, second, make_rows(plan, 3))
        answers = await asyncio.gather(read(first), read(second))
    assert [len(one.tokens) for one in answers] == [8, 8]


async def test_a_prompt_in_parts_goes_on_when_the_tower_is_done() -> None:
    """It was held back for the tower's sake, and no row comes that would wake the engine."""

    class Beside(StepWatcher):
        busy = True

        def whole_prompts(self) -> bool:
            return self.busy

        def tell_when_free(self, free: Callable[[], None]) -> None:
            self.free = free

    tower, plan, left = Beside(), make_plan([3, (1, 4, 4), 2, (1, 2, 2), 3]), threading.Event()
    rows = make_rows(plan, 3)
    engine = watched_engine(tower)
    plan_step = engine._scheduler.plan_step

    def told(now: float, *, whole: bool) -> Step:
        step = plan_step(now, whole=whole)
        if whole and not step.segments and any(r.ready > 3 for r in engine._scheduler._running):
            left.set()
        return step

    engine._scheduler.plan_step = told  # type: ignore[method-assign]
    async with engine, asyncio.timeout(PATIENCE_S):
        handle = submit(engine, plan)
        await handle.admitted
        engine.deliver(handle, 0, 0, rows[0])
        assert await asyncio.to_thread(left.wait, PATIENCE_S) and not engine.stats().tokens_prefilled
        tower.busy = False
        tower.free()
        await eventually(lambda: engine.stats().tokens_prefilled > 0)
        handle.cancel()
        await read(handle)


async def test_who_comes_with_a_prompt_that_needs_no_rows_is_told_of_during_the_step() -> None:
    came = []

    class Beside(StepWatcher):
        def prompt_came(self) -> None:
            came.append(computed.is_set())

    computed, end = threading.Event(), threading.Event()
    engine = watched_engine(Beside())
    forward = engine._runner.forward

    def held(batch: Any) -> Any:
        computed.set()
        assert end.wait(PATIENCE_S)
        return forward(batch)

    engine._runner.forward = held  # type: ignore[method-assign]
    plan = make_plan([3, (1, 4, 4), 2])
    async with engine, asyncio.timeout(PATIENCE_S):
        first = submit(engine, make_plan([20]))
        try:
            assert await asyncio.to_thread(computed.wait, PATIENCE_S)
            image, text = submit(engine, plan), submit(engine, make_plan([5]))
            assert came == [False, True], "of the first one, and of the text; the image's rows are not here"
        finally:
            end.set()
        deliver_all(engine, image, make_rows(plan, 3))
        await asyncio.gather(read(first), read(image), read(text))


async def test_pages_of_the_step_are_not_given_away() -> None:
    """Room for the one at work, and not for the next beside it."""
    model, plan = tiny_model("dense"), make_plan([30])
    async with at_work(model, num_pages=3) as (engine, first, go_on):
        second = submit(engine, plan)
        assert engine.stats().running == 1
        go_on()
        answers = await asyncio.gather(read(first), read(second))
    assert answers[0].tokens == plain_loop(model, make_plan([20]), [], 8)
    assert answers[1].tokens == plain_loop(model, plan, [], 8)


async def test_who_is_let_in_during_a_step_and_leaves_holds_nothing_after_it() -> None:
    async with at_work(tiny_model("dense")) as (engine, first, go_on):
        second = submit(engine, make_plan([3, (1, 4, 4), 2]))
        await second.admitted
        second.cancel()
        third = submit(engine, make_plan([9]))  # behind an end: after the step
        go_on()
        assert (await read(second)).reason is FinishReason.CANCELLED
        assert [len((await read(one)).tokens) for one in (first, third)] == [8, 8]
        await eventually(lambda: engine.stats().running == 0)
        assert engine.stats().pages_used == 0


async def test_a_step_that_raises_does_not_hurt_who_was_let_in_during_it() -> None:
    model, plan = tiny_model("dense"), make_plan([9])
    async with at_work(model, error=RuntimeError("broken")) as (engine, first, go_on):
        second = submit(engine, plan)
        await second.admitted
        go_on()
        with pytest.raises(EngineError, match="broken"):
            await read(first)
        answer = await read(second)
    assert answer.tokens == plain_loop(model, plan, [], 8)


async def test_a_cancellation_that_comes_late_is_not_the_next_ones_of_that_name() -> None:
    """A client may use an id again as soon as its answer has ended."""
    async with make_engine(tiny_model("moe")) as engine:
        asked = [EngineRequest("again", make_plan([6]), SamplingParams(max_tokens=n, ignore_eos=True)) for n in (1, 40)]
        first = engine.submit(asked[0])
        await read(first)
        second = engine.submit(asked[1])
        engine._steps.end(first, None)
        assert len((await read(second)).tokens) == 40
