"""What an engine takes goes back when it is closed, or never comes to be open: memory, and the model's attention."""

from __future__ import annotations

import asyncio
import copy
import threading
import weakref

import pytest
from test_device_runner import again, interpreted
from tiny_engine import ask, make_engine, make_plan, tiny_model

from aiodisagg.engine.batch import Runner

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
PATIENCE_S = 60.0


async def test_a_closed_engine_keeps_neither_pages_nor_model(no_collector: None) -> None:
    model = copy.deepcopy(tiny_model("dense"))
    async with make_engine(model) as engine:
        assert (await ask(engine, make_plan([4]), max_tokens=2)).tokens
        held = [weakref.ref(engine._runner.pool.keys), weakref.ref(model)]
    del model
    assert all(what() is None for what in held)
    await engine.aclose()
    assert engine.stats().tokens_decoded == 2


def test_nor_does_one_whose_steps_are_graphs(no_collector: None) -> None:
    """Graphs referred to the runner that has them."""
    engine = interpreted(tiny_model("moe"), captures=lambda priority: again, ladder=(2,), prompts=(16,), row_width=64)
    runner = engine._runner.device_runner
    assert runner is not None and runner.graphs is not None and runner.prompt_graphs is not None
    held = [weakref.ref(what) for what in (runner, engine._runner.pool.keys, runner.decoder.layers[0].qkv)]
    del runner
    engine._runner.release()
    assert all(what() is None for what in held)


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_who_is_not_entered_gives_the_model_back(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had brought the model could use it nowhere else: its attention worked inside of an engine only."""
    model = copy.deepcopy(tiny_model("dense"))
    before, begun, gate = model.config._attn_implementation, threading.Event(), threading.Event()

    def warm_up(runner: Runner) -> None:
        begun.set()
        assert gate.wait(PATIENCE_S)
        assert runner.pool.size_bytes and model.config._attn_implementation != before, "it was taken from the thread"
        if how == "failed":
            raise MemoryError("no room for kernels")

    monkeypatch.setattr(Runner, "warm_up", warm_up)
    engine = make_engine(model)
    entering = asyncio.create_task(engine.__aenter__())
    assert await asyncio.to_thread(begun.wait, PATIENCE_S)
    if how == "cancelled":
        entering.cancel()
        await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError if how == "cancelled" else MemoryError):
        await entering
    assert model.config._attn_implementation == before
