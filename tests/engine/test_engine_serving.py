"""What users of the engine see besides tokens: ends, errors, cancels, limits, and neighbours that notice nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_engine import HIDDEN, ask, decode, deliver_all, make_engine, make_plan, make_rows, read, submit, tiny_model

from aiodisagg.engine.batch import Runner, Work, pool_bytes_on
from aiodisagg.engine.config import EngineConfig
from aiodisagg.engine.engine import Engine, EngineRequest
from aiodisagg.engine.pace import Pace
from aiodisagg.engine.schedule import Segment
from aiodisagg.engine.steps import StepWatcher
from aiodisagg.engine.types import FinishReason, SamplingParams, Usage
from aiodisagg.errors import ConfigError, EncodeFailed, EngineError, InvalidRequest, Overloaded, PromptTooLong
from aiodisagg.protocol.rows import RowLayout

pytestmark = pytest.mark.anyio


@contextmanager
def hooked(model: Any, hook: Any) -> Iterator[None]:
    """Calls ``hook(kwargs)`` before every forward."""
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: hook(kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


async def test_an_answer_ends_at_max_tokens_with_usage() -> None:
    async with make_engine(tiny_model("dense")) as engine:
        answer = await ask(engine, make_plan([5]), max_tokens=7)
    assert len(answer.tokens) == 7 and answer.last is not None
    assert answer.last.finish_reason is FinishReason.LENGTH
    assert answer.last.usage == Usage(prompt_tokens=5, completion_tokens=7)
    assert answer.text == decode(answer.tokens)


async def test_end_of_sequence_ends_it_and_can_be_ignored() -> None:
    model, plan = tiny_model("dense"), make_plan([5])
    async with make_engine(model) as engine:
        free = await ask(engine, plan, max_tokens=10)
    end = free.tokens[4]
    cut = free.tokens[: free.tokens.index(end) + 1]
    async with make_engine(model, eos=frozenset({end})) as engine:
        ended = await ask(engine, plan, max_tokens=10)
        ignored = await ask(engine, plan, max_tokens=10, ignore_eos=True)
    assert ended.tokens == cut and ended.reason is FinishReason.STOP
    assert ended.text == decode(cut[:-1])
    assert ignored.tokens == free.tokens and ignored.reason is FinishReason.LENGTH


async def test_a_stop_string_across_tokens() -> None:
    """Every token is given a text of two characters, so the stop string begins inside one and ends inside another."""

    def letters(ids: Any) -> str:
        return "".join(f"{'abcdefgh'[i % 8]}{'日本語文字大小中'[i // 8 % 8]}" for i in ids)

    model, plan = tiny_model("dense"), make_plan([6])
    engine = Engine(model, letters, frozenset(), EngineConfig(num_pages=32))
    async with engine:
        free = await ask(engine, plan, max_tokens=12)
        stop = free.text[5:8]
        assert free.text.find(stop) == 5
        cut = await ask(engine, plan, max_tokens=12, stop=("nowhere", stop))
        seen = ""
        async for delta in submit(engine, plan, max_tokens=12, stop=(stop,)):
            seen += delta.text
            assert free.text[:5].startswith(seen), "a piece of the stop string was shown"
    assert cut.text == free.text[:5] and cut.reason is FinishReason.STOP
    assert cut.tokens == free.tokens[:4] and cut.last is not None
    assert cut.last.usage == Usage(6, 4)


async def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_when_preempted() -> None:
    model = tiny_model("moe")
    plan = make_plan([4, (1, 3, 3), 4])
    rows = make_rows(plan, 3)
    sampling = {"temperature": 1.2, "top_p": 0.95, "top_k": 50, "max_tokens": 20}
    others = [make_plan([11 + i], seed=i) for i in range(4)]
    async with make_engine(model) as engine:
        alone = await ask(engine, plan, rows, seed=42, **sampling)
        different = await ask(engine, plan, rows, seed=43, **sampling)
        batch = [ask(engine, other, temperature=1.0, max_tokens=20) for other in others]
        *_, batched = await asyncio.gather(*batch, ask(engine, plan, rows, seed=42, **sampling))
    async with make_engine(model, num_pages=14, page_size=4) as engine:
        batch = [ask(engine, other, temperature=1.0, max_tokens=20) for other in others[:2]]
        *_, preempted = await asyncio.gather(*batch, ask(engine, plan, rows, seed=42, **sampling))
        assert engine.stats().preemptions > 0
    assert alone.tokens == batched.tokens == preempted.tokens != different.tokens


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("how", ["handle", "break", "task", "waiting"])
async def test_cancelling_frees_everything(how: str) -> None:
    model = tiny_model("dense")
    plan = make_plan([3, (1, 4, 4), 3])
    async with make_engine(model, num_pages=64, max_running=1 if how == "waiting" else 8) as engine:
        neighbour = asyncio.create_task(ask(engine, make_plan([4]), max_tokens=40))
        handle = submit(engine, plan, max_tokens=900)
        deliver_all(engine, handle, make_rows(plan, 1))
        if how == "break":
            async for _ in handle:
                break
        elif how == "task":
            started = asyncio.Event()

            async def consume() -> None:
                async for _ in handle:
                    started.set()

            task = asyncio.create_task(consume())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            handle.cancel()
            answer = await read(handle)
            assert answer.reason is FinishReason.CANCELLED and answer.last is not None
            assert answer.last.usage is not None
        assert len((await neighbour).tokens) == 40
        await ask(engine, make_plan([2]), max_tokens=1)  # the end of the cancelled one is behind this
        stats = engine.stats()
    assert (stats.pages_used, stats.rows_bytes, stats.running, stats.waiting) == (0, 0, 0, 0)
    assert stats.tokens_decoded < 400


async def test_who_waits_for_admission_learns_of_a_cancel() -> None:
    async with make_engine(tiny_model("dense"), num_pages=2) as engine:
        first = submit(engine, make_plan([2, (1, 4, 5), 3]))  # takes both pages and waits for rows
        await first.admitted  # else the second goes before it
        second = submit(engine, make_plan([20]))
        waiting = asyncio.create_task(second._wait_admitted())
        await asyncio.sleep(0)
        assert not waiting.done()
        second.cancel()
        with pytest.raises(EngineError, match="cancelled before"):
            await waiting


async def test_rows_that_are_nan_hurt_nobody_else() -> None:
    model = tiny_model("moe")
    plans = [make_plan([3, (1, 3, 4), 2 + i], seed=i) for i in range(4)]
    rows = [make_rows(plan, 3, seed=i) for i, plan in enumerate(plans)]
    async with make_engine(model, prefix_cache=False) as engine:
        good = await asyncio.gather(*(ask(engine, p, r) for p, r in zip(plans, rows, strict=True)))
        rows[1][0][5] = float("nan")
        handles = [submit(engine, plan) for plan in plans]
        for handle, item in zip(handles, rows, strict=True):
            deliver_all(engine, handle, item)
        results = await asyncio.gather(*(read(h) for h in handles), return_exceptions=True)
        # the pages of the poisoned one are used again by others
        again = await asyncio.gather(*(ask(engine, plans[0], rows[0]) for _ in range(6)))
    assert isinstance(results[1], EngineError) and "not finite" in str(results[1])
    kept = [r for i, r in enumerate(results) if i != 1]
    assert [k.tokens for k in kept] == [g.tokens for i, g in enumerate(good) if i != 1]  # type: ignore[union-attr]
    assert all(a.tokens == good[0].tokens for a in again)


async def test_a_request_that_makes_the_model_raise_fails_alone() -> None:
    model = tiny_model("moe")
    plans = [make_plan([3, (1, 3, 4), 2 + i], seed=i) for i in range(4)]
    rows = [make_rows(plan, 3, seed=i) for i, plan in enumerate(plans)]
    marked = 1234.5
    batches = []

    def raise_on_mark(kwargs: dict[str, Any]) -> None:
        batches.append(kwargs["inputs_embeds"].shape[1])
        if (kwargs["inputs_embeds"] == marked).any():
            raise RuntimeError("poison")

    async with make_engine(model, prefix_cache=False) as engine:
        good = await asyncio.gather(*(ask(engine, p, r) for p, r in zip(plans, rows, strict=True)))
        rows[2][0][5, 0] = marked
        with hooked(model, raise_on_mark):
            asked = (ask(engine, p, r) for p, r in zip(plans, rows, strict=True))
            results = await asyncio.gather(*asked, return_exceptions=True)
        stats = engine.stats()
    poisoned = results[2]
    assert isinstance(poisoned, EngineError) and "poison" in str(poisoned)
    assert isinstance(poisoned.__cause__, RuntimeError)
    kept = [r for i, r in enumerate(results) if i != 2]
    assert [k.tokens for k in kept] == [g.tokens for i, g in enumerate(good) if i != 2]  # type: ignore[union-attr]
    assert stats.failed == 1 and stats.retries <= 1 and stats.pages_used == 0


async def test_wrong_rows_fail_their_request_and_late_rows_nothing() -> None:
    model = tiny_model("dense")
    plan = make_plan([3, (1, 2, 2), 3])
    layout = RowLayout(HIDDEN, 2, "float32")
    engine = Engine(model, decode, frozenset(), EngineConfig(num_pages=32), layout=layout)
    async with engine:
        bad = [torch.zeros(4, 2 * HIDDEN), torch.zeros(5, 3 * HIDDEN), torch.zeros(4, 3 * HIDDEN).double()]
        for rows in bad:
            handle = submit(engine, plan)
            engine.deliver(handle, 0, 0, rows)
            with pytest.raises(EngineError, match="item 0"):
                await read(handle)
            engine.deliver(handle, 0, 0, torch.zeros(4, 3 * HIDDEN))  # it is over: no error, no effect
        handle = submit(engine, plan)
        raw = make_rows(plan, 2)[0].numpy().tobytes()
        engine.deliver_bytes(handle, 0, 0, raw, layout=layout)
        by_bytes = await read(handle)
        assert by_bytes.tokens == (await ask(engine, plan, make_rows(plan, 2))).tokens
        assert engine.stats().failed == 3
    with pytest.raises(ConfigError, match="layout"):
        Engine(model, decode, frozenset(), layout=RowLayout(HIDDEN, 2, "bfloat16"))


async def test_a_failed_item_fails_its_request() -> None:
    plan = make_plan([3, (1, 2, 2), 3])
    async with make_engine(tiny_model("dense")) as engine:
        handle = submit(engine, plan)
        await handle.admitted
        engine.fail(handle, EncodeFailed("abc", "no peer could"))
        with pytest.raises(EncodeFailed, match="no peer could"):
            await read(handle)
        with pytest.raises(EncodeFailed):
            await handle.admitted
        await ask(engine, make_plan([2]), max_tokens=1)
        assert engine.stats().pages_used == 0


async def test_limits_are_errors_at_submit() -> None:
    model = tiny_model("dense")
    async with make_engine(model, num_pages=2, max_running=1, max_waiting=1) as engine:
        assert engine.limit == 33
        with pytest.raises(PromptTooLong) as caught:
            submit(engine, make_plan([30]), max_tokens=4)
        assert (caught.value.tokens, caught.value.limit) == (34, 33)
        with pytest.raises(PromptTooLong):
            submit(engine, make_plan([33]), max_tokens=4, as_fits=True)
        assert len((await ask(engine, make_plan([30]), max_tokens=4, ignore_eos=True, as_fits=True)).tokens) == 3
        with pytest.raises(InvalidRequest, match="no tokens"):
            submit(engine, make_plan_empty())
        held = [submit(engine, make_plan([2, (1, 2, 2)]))]
        with pytest.raises(EngineError, match="in use"):
            engine.submit(EngineRequest(held[0].request_id, make_plan([2]), SamplingParams(max_tokens=1)))
        held.append(submit(engine, make_plan([2, (1, 2, 2)])))
        with pytest.raises(Overloaded):
            submit(engine, make_plan([2]))
        for handle in held:
            handle.cancel()
            await read(handle)
        assert len((await ask(engine, make_plan([30]), max_tokens=3)).tokens) == 3
    with pytest.raises(EngineError, match="closed"):
        submit(engine, make_plan([2]))
    async with make_engine(model, max_context=10) as engine:
        assert engine.limit == 10


@pytest.mark.parametrize("budget_ms", [20.0, 0.0])
async def test_prefill_beside_a_stream_is_bounded_by_what_steps_took(
    budget_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose steps take 0.2 ms a token by the clock that the step thread reads."""
    model, now, sizes = tiny_model("dense"), [0.0], []

    def compute(kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["inputs_embeds"].shape[1])
        now[0] += 0.0002 * sizes[-1]

    monkeypatch.setattr("aiodisagg.engine.worker.perf_counter", lambda: now[0])
    async with make_engine(model, token_budget=512, itl_budget_ms=budget_ms) as engine:
        with hooked(model, compute):
            stream = submit(engine, make_plan([70]), max_tokens=200)
            await stream.admitted
            answer = await ask(engine, make_plan([1000], seed=1), max_tokens=1)
            stream.cancel()
    assert len(answer.tokens) == 1 and sum(sizes) >= 1070
    if budget_ms:
        assert max(sizes) < 115 and sizes.count(1) < 200, "a step took more than its time, or nothing was prefilled"
        assert sum(size > 80 for size in sizes) >= 5, "steps were smaller than they had to be"
    else:
        assert max(sizes) == 512


async def test_every_step_is_timed() -> None:
    seen: list[int] = []
    async with make_engine(tiny_model("dense"), token_budget=64, itl_budget_ms=20.0) as engine:
        assert engine._pace is not None
        engine._pace.observe = lambda shape, seconds: seen.append(shape.prefill)  # type: ignore[method-assign]
        await ask(engine, make_plan([150]), max_tokens=3)
    assert seen == [64, 64, 22, 0, 0]


async def test_on_an_accelerator_a_step_that_reads_no_token_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each row that comes while it computes would be launched behind it as a step of its own."""
    waited: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    async with make_engine(tiny_model("dense")) as engine:
        runner = Runner.__new__(Runner)
        runner.__dict__ |= vars(engine._runner)
        runner.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
        runner.device_runner = SimpleNamespace(forward=lambda batch: (torch.zeros(0), 0))  # type: ignore[assignment]
        for samples, times in ((True, 0), (False, 1)):
            runner.forward([Work(Segment("a", 0, 4, samples), None, [])])  # type: ignore[arg-type]
            assert len(waited) == times


def make_plan_empty() -> Any:
    full = make_plan([1])
    return type(full)(full.input_ids[:0], full.positions[:, :0], 0, ())


@pytest.mark.usefixtures("no_leaks")
async def test_closing_ends_what_runs() -> None:
    model = tiny_model("dense")
    async with make_engine(model) as engine:
        running, stuck = submit(engine, make_plan([3]), max_tokens=1000), submit(engine, make_plan([2, (1, 2, 2)]))
        await running.admitted
        await stuck.admitted
    for handle in (running, stuck):
        with pytest.raises(EngineError, match="closed"):
            await read(handle)
    assert engine.stats().pages_used == 0
    assert not [t for t in threading.enumerate() if t.name == "aiodisagg-engine"]


async def test_a_reader_that_does_not_read_stops_nobody_and_loses_nothing() -> None:
    async with make_engine(tiny_model("dense")) as engine:
        slow = submit(engine, make_plan([4]), max_tokens=30)
        await ask(engine, make_plan([5]), max_tokens=60)
        deltas = [delta async for delta in slow]
    assert len(deltas) == 1 and len(deltas[0].token_ids) == 30
    assert deltas[0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("key", ["num_pages", "pool_bytes", "page_size", "token_budget", "max_running", "max_waiting"])
def test_settings_are_checked(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        EngineConfig(**{key: 0})


def test_a_pool_without_a_page_is_refused() -> None:
    with pytest.raises(ConfigError, match="pool_bytes"):
        Engine(tiny_model("dense"), decode, frozenset(), EngineConfig(pool_bytes=100))


def test_a_pool_of_no_stated_size_takes_what_a_gpu_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    gib, cpu, gpu = 1 << 30, torch.device("cpu"), torch.device("cuda:0")
    assert pool_bytes_on(cpu) == gib // 4
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * gib, 80 * gib))
    assert pool_bytes_on(gpu) == 10 * gib, "a tenth of all and two for a step are kept free"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * gib, 80 * gib))
    with pytest.raises(ConfigError, match="9216 of 81920 MiB are free"):
        pool_bytes_on(gpu)


@pytest.mark.parametrize("slowed", [True, False])
async def test_steps_that_others_slowed_teach_nothing_of_how_long_steps_take(
    monkeypatch: pytest.MonkeyPatch, slowed: bool
) -> None:
    class Beside(StepWatcher):
        def slowed(self) -> bool:
            return slowed

    seen: list[float] = []
    monkeypatch.setattr(Pace, "observe", lambda pace, shape, seconds: seen.append(seconds))
    config = EngineConfig(num_pages=128, token_budget=64, itl_budget_ms=50.0)
    async with Engine(tiny_model("dense"), decode, frozenset(), config, watcher=Beside()) as engine:
        await ask(engine, make_plan([5]), max_tokens=3)
    assert (not seen) if slowed else (len(seen) == 3 and min(seen) > 0)
