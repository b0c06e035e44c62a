"""An engine that computes nothing any more says so; one that fails single requests does not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from tiny_engine import ask, decode, make_plan, make_rows, read, submit, tiny_model

from aiodisagg.device.vitals import LIMIT, Vitals
from aiodisagg.engine.config import EngineConfig
from aiodisagg.engine.engine import Engine, EngineRequest
from aiodisagg.engine.steps import StepWatcher
from aiodisagg.engine.types import SamplingParams
from aiodisagg.errors import EngineError

pytestmark = pytest.mark.anyio


POISON = 13
"""Tokens of a prompt that no device computes."""


class Broken:
    """Why, as it was told; an engine to tell it; and a device that fails when it is told to."""

    def __init__(self, watcher: StepWatcher | None = None) -> None:
        self.why: asyncio.Queue[str] = asyncio.Queue()
        config = EngineConfig(num_pages=128, token_budget=64, prefix_cache=False)
        self.engine = Engine(
            tiny_model("dense"), decode, frozenset(), config, broke=self.why.put_nowait, watcher=watcher
        )  # fmt: skip
        self.fails = False
        forward = self.engine._runner.forward

        def may_fail(batch: Any) -> Any:
            if self.fails:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if any(work.sequence.plan.tokens == POISON for work in batch):
                raise RuntimeError("poison")
            return forward(batch)

        self.engine._runner.forward = may_fail  # type: ignore[method-assign]

    async def refuse(self, count: int) -> None:
        self.fails = True
        for _ in range(count):
            with pytest.raises(EngineError, match="illegal memory access"):
                await ask(self.engine, make_plan([3]))
        self.fails = False


async def test_a_device_on_which_nothing_works_any_more() -> None:
    made = Broken()
    async with made.engine as engine:
        await ask(engine, make_plan([3]))
        assert not engine.broken and made.why.empty()
        await made.refuse(1)
        assert await made.why.get() == engine.broken and "1 in a row, this one with RuntimeError" in engine.broken
        assert engine.stats().failed == 1
        await ask(engine, make_plan([3]))
        assert not engine.broken


async def test_a_device_that_breaks_after_one_that_was_bad_itself() -> None:
    made = Broken()
    async with made.engine as engine:
        with pytest.raises(EngineError, match="poison"):
            await ask(engine, make_plan([POISON]))
        assert not engine.broken and made.why.empty()
        await made.refuse(1)
        assert await made.why.get() == engine.broken != ""


async def test_all_requests_of_a_step_on_a_broken_device() -> None:
    made = Broken()
    async with made.engine as engine:
        made.fails = True
        await asyncio.gather(*(ask(engine, make_plan([3])) for _ in range(LIMIT)), return_exceptions=True)
        assert await made.why.get() == engine.broken != ""


async def test_one_bad_request_again_and_again_among_good_ones_is_no_broken_device() -> None:
    made = Broken()
    async with made.engine as engine:
        for _ in range(2 * LIMIT):
            bad, good = await asyncio.gather(
                ask(engine, make_plan([POISON])), ask(engine, make_plan([3])), return_exceptions=True
            )
            assert isinstance(bad, EngineError) and not isinstance(good, BaseException)
        assert not engine.broken and made.why.empty()


async def test_bad_requests_alone_do_not_end_a_peer(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody asks anything good meanwhile; the engine tries something good by itself, on a page that is free again."""
    made = Broken()
    async with made.engine as engine:
        for _ in range(2 * LIMIT + 1):
            with pytest.raises(EngineError, match="poison"):
                await ask(engine, make_plan([POISON]))
        assert not engine.broken and made.why.empty()
        assert caplog.text.count("what is good works") == 2
        await made.refuse(LIMIT)
        assert await made.why.get() == engine.broken != "", "and a device that breaks then is still found out"
        stats = engine.stats()
        assert (stats.pages_used, stats.running, stats.waiting) == (0, 0, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["plan", "watcher"])
async def test_a_step_thread_that_a_bug_has_ended(where: str) -> None:
    """Its reader and those that come later are told why, and counted; whatever raised may raise again meanwhile."""

    class Watcher(StepWatcher):
        def prefill_waits(self, waits: bool) -> None:
            if where == "watcher":
                raise ValueError("cannot convert float NaN to integer")

    made = Broken(Watcher())

    def plan_step(now: float, *, whole: bool) -> Any:
        raise ValueError("cannot convert float NaN to integer")

    if where == "plan":
        made.engine._scheduler.plan_step = plan_step  # type: ignore[method-assign]
    async with made.engine as engine:
        with pytest.raises(EngineError, match="the engine stopped: ValueError"):
            await read(submit(engine, make_plan([3])))
        assert await made.why.get() == engine.broken == "its thread ended with ValueError"
        for _ in range(2):
            with pytest.raises(EngineError, match="the engine stopped: ValueError"):
                submit(engine, make_plan([3]))
        assert engine.stats().failed == 3


async def test_an_engine_that_is_closed_is_not_broken() -> None:
    made = Broken()
    async with made.engine as engine:
        await ask(engine, make_plan([3]))
    assert not engine.broken and made.why.empty()


async def test_rows_that_there_is_no_memory_for_fail_their_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever brings them brings them to others, too, and must not be told that they are wrong."""
    plan = make_plan([3, (1, 2, 2), 3])
    rows = make_rows(plan, 1)[0]
    async with Broken().engine as engine:
        refused, taken = submit(engine, plan), submit(engine, plan)

        def no_memory(*shape: Any, **how: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with monkeypatch.context() as patch:
            patch.setattr("aiodisagg.engine.rows.torch.empty", no_memory)
            engine.deliver(refused, 0, 0, rows)
        engine.deliver(taken, 0, 0, rows)
        with pytest.raises(EngineError, match="its rows could not be taken: OutOfMemoryError"):
            await read(refused)
        assert len((await read(taken)).tokens) == 8


async def test_rows_and_errors_of_a_request_that_is_over_do_not_reach_another_of_its_id() -> None:
    """A client may use an id again while threads deliver rows to the request that had it before."""
    plan, other = make_plan([3, (1, 2, 2), 3]), make_plan([3, (1, 2, 2), 3], seed=1)
    rows, others = make_rows(plan, 1), make_rows(other, 1, seed=1)
    sampling = SamplingParams(max_tokens=4)
    async with Broken().engine as engine:
        alone = await ask(engine, other, others, max_tokens=4)
        first = engine.submit(EngineRequest("again", plan, sampling))
        await first.admitted
        first.cancel()
        await read(first)
        second = engine.submit(EngineRequest("again", other, sampling))
        engine.deliver(first, 0, 0, rows[0])
        engine.fail(first, EngineError("again", "late"))
        assert engine._steps is not None
        engine._steps.end(first, EngineError("again", "later"))  # looked up before the first was over
        engine.deliver(second, 0, 0, others[0])
        assert (await read(second)).tokens == alone.tokens


async def test_an_id_may_be_used_again_while_a_step_still_holds_it() -> None:
    """As a client does that tries again after its own timeout."""
    async with Broken().engine as engine:
        first = submit(engine, make_plan([3]))
        held = first.request_id
        assert engine.name_for(held) == f"{held}~2" and engine.name_for("new") == "new"
        again = engine.submit(EngineRequest(engine.name_for(held), make_plan([3]), SamplingParams(max_tokens=2)))
        assert engine.name_for(held) == f"{held}~3"
        for handle in (first, again):
            await read(handle)
        assert engine.name_for(held) == held


def test_of_those_without_memory_different_ones_count() -> None:
    lost, tried = list[str](), list[int]()
    vitals = Vitals(lost.append)
    for _ in range(2 * LIMIT):
        vitals.failed("the same", MemoryError(), lambda: tried.append(1))
    for n in range(LIMIT - 1):
        assert not vitals.why
        vitals.failed(str(n), MemoryError(), lambda: tried.append(1))
    assert [vitals.why] == lost and not tried
    vitals.failed("one more", ValueError(), lambda: tried.append(1))
    assert len(lost) == 1 and not tried, "it is known"


def test_any_that_fails_may_have_broken_the_device() -> None:
    lost: list[str] = []
    vitals = Vitals(lost.append)

    def probe() -> None:
        raise RuntimeError("broken")

    vitals.worked()
    vitals.failed("first", torch.OutOfMemoryError(), probe)
    assert not lost, "of memory others have more"
    vitals.worked()
    vitals.failed("first", ValueError(), lambda: None)
    assert not lost, "that one was bad itself"
    vitals.failed("first", ValueError(), probe)
    assert lost == [vitals.why] == ["what it tried failed, 1 in a row, this one with ValueError"]


def test_where_all_want_for_memory_a_small_one_says_nothing() -> None:
    for others, tried in ((MemoryError(), 0), (ValueError(), 1)):  # and one more at once
        lost: list[str] = []
        vitals, probed = Vitals(lost.append), list[int]()
        vitals.failed("first", others, lambda: None)
        for n in range(LIMIT - 1):
            vitals.failed(str(n), torch.OutOfMemoryError(), lambda probed=probed: probed.append(1))  # type: ignore[misc]
        assert (len(lost), len(probed)) == (1 - tried, tried)


def test_what_is_good_clears_what_is_bad() -> None:
    lost: list[str] = []
    vitals, tried = Vitals(lost.append), list[int]()
    for n in range(3 * LIMIT):
        vitals.failed(str(n), ValueError(), lambda n=n: tried.append(n))  # type: ignore[misc]
    assert not lost and not vitals.why
    assert tried == list(range(3 * LIMIT))
