"""The path of accelerators, run on the CPU: the fused decoder behind the engine gives the plain loop's tokens."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
from test_engine_exact import NEW, cases
from tiny_engine import ask, make_engine, tiny_model

from aiodisagg.engine.decoder import unsupported
from aiodisagg.engine.device_runner import DeviceRunner
from aiodisagg.engine.engine import Engine
from aiodisagg.engine.experts import Experts, run_grouped, run_loop
from aiodisagg.engine.kernels import Kernels

pytestmark = pytest.mark.anyio

LOOP = Experts({"loop": run_loop}, ((0, "loop"),))
GROUPED = Experts({"grouped": run_grouped}, ((0, "grouped"),))


def on_device(model: Any, experts: Experts, **config: Any) -> Engine:
    """An engine over a copy of the model (its projections are joined) that steps as with an accelerator."""
    model = copy.deepcopy(model)
    engine = make_engine(model, **config)
    assert unsupported(model) is None
    runner = engine._runner
    runner.device_runner = DeviceRunner(
        model, runner.pool, token_budget=16, max_running=2, max_context=4096, kernels=Kernels(), experts=experts
    )
    return engine


@pytest.mark.parametrize("experts", [LOOP, GROUPED], ids=["loop", "grouped"])
@pytest.mark.parametrize(("kind", "levels"), [("moe", 0), ("moe", 3), ("dense", 0), ("dense", 2), ("text", 0)])
async def test_batches_give_the_plain_loops_tokens(kind: str, levels: int, experts: Experts) -> None:
    """Mixed batches, chunks, and batches beyond the sizes that the runner was told."""
    expected = cases(kind, levels)
    if kind == "text":
        expected = [case for case in expected if not case[0].items]
    async with on_device(tiny_model(kind), experts) as engine:
        answers = await asyncio.gather(*(ask(engine, p, r, max_tokens=NEW) for p, r, _ in expected))
        stats = engine.stats()
    assert [a.tokens for a in answers] == [tokens for _, _, tokens in expected]
    assert stats.rows_used == sum(item.rows for plan, _, _ in expected for item in plan.items)
    assert max(size for size, _ in stats.batch_sizes) == len(expected)


async def test_level_after_the_last_layer() -> None:
    """As many levels as layers: the last one is added to what the final norm sees."""
    (plan, rows, expected), *_ = (c for c in cases("moe", 4) if c[0].items)
    async with on_device(tiny_model("moe"), GROUPED) as engine:
        assert (await ask(engine, plan, rows, max_tokens=NEW)).tokens == expected
