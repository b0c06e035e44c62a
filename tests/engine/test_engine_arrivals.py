"""What the step thread learns of its steps, and what it does about rows that should be here."""

from __future__ import annotations

import asyncio
import math

import pytest
from tiny_engine import eventually, make_engine, make_plan, make_rows, read, submit, tiny_model

from aiodisagg.engine.arrivals import Arrivals

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("budget_ms", [0.0, 50.0])
async def test_a_first_token_tells_what_prefill_takes(budget_ms: float) -> None:
    """It is learned whether or not anything is bounded by it; placement wants to know."""
    async with make_engine(tiny_model("moe"), token_budget=64, itl_budget_ms=budget_ms) as engine:
        handles = [submit(engine, make_plan([50 * n], seed=n), max_tokens=2) for n in range(1, 6)]
        await asyncio.gather(*map(read, handles))
        last = submit(engine, make_plan([150], seed=9), max_tokens=2)
        assert last.prefill is None
        await read(last)
    found = last.prefill
    assert found is not None and found.observed >= 12 and 0 <= found.error < 1
    assert found.step_s + 150 * found.token_s > 0


async def test_rows_that_are_late_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody says anything any more: the step thread looks again by itself."""
    plan = make_plan([20, (1, 4, 4), 2, (1, 4, 4), 2, (1, 3, 4), 5])
    rows = make_rows(plan, 2)
    async with make_engine(tiny_model("moe"), token_budget=512, itl_budget_ms=50.0) as engine:
        asked: list[float] = []

        def begins(start: int, ready: int, later: list[tuple[float, int]]) -> bool:
            asked.append(later[0][0] if later else 0.0)
            return asked[-1] > 0.1

        monkeypatch.setattr(engine._pace, "begins", begins)
        handle = submit(engine, plan, max_tokens=2)
        await handle.admitted
        for item in (0, 1):
            engine.deliver(handle, item, 0, rows[item])
        async with asyncio.timeout(30):
            await eventually(lambda: engine.stats().tokens_prefilled > 0)
        assert engine.stats().tokens_prefilled == plan.tokens - 5 - 12, "up to the image that is late"
        assert len(asked) < 40, "each time twice as long"
        engine.deliver(handle, 2, 0, rows[2])
        await read(handle)


def test_rows_are_expected_as_fast_as_those_before_and_are_late_half_as_long_again_after_that() -> None:
    rows = Arrivals(0.0, 10)
    assert rows.expected([20, 30], 40, 0.5) == ([], math.inf)
    rows.moved(20, 1.0)
    assert rows.expected([30], 40, 1.0) == ([(1.0, 30), (2.0, 40)], 1.5)
    rows.moved(30, 3.0)  # from now on it counts what came between two moves
    assert rows.expected([], 40, 3.5) == ([(1.5, 40)], 2.5)
    assert rows.expected([], 40, 6.5) == ([(3.5, 40)], 3.5), "late: as long again as since the last move"


def test_rows_that_came_at_once_are_one_move() -> None:
    rows = Arrivals(0.0, 0)
    rows.moved(10, 1.0)
    rows.moved(20, 1.0)
    assert rows.expected([], 40, 1.0) == ([(1.0, 40)], 1.5)
