"""The path of accelerators, run on the CPU: the fused decoder behind the engine gives the plain loop's tokens."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reference_flash import Flash
from test_engine_exact import NEW, cases
from tiny_engine import HIDDEN, ask, make_engine, make_plan, make_rows, tiny_model

from aiodisagg.device.alone import Alone
from aiodisagg.device.graphs import TRIES, Capture, Captures
from aiodisagg.device.streams import Priority
from aiodisagg.engine import device_runner, kernels, triton_attention, triton_layers
from aiodisagg.engine import experts as experts_module
from aiodisagg.engine import graphs as graphs_module
from aiodisagg.engine.batch import EngineSequence, Work
from aiodisagg.engine.decoder import unsupported
from aiodisagg.engine.device_runner import DeviceRunner
from aiodisagg.engine.engine import Engine
from aiodisagg.engine.experts import Experts, choose_experts, run_grouped, run_loop
from aiodisagg.engine.flash import FlashPrefill
from aiodisagg.engine.graphs import PROMPTS, Size, StepGraphs, decode_sizes, prompt_sizes
from aiodisagg.engine.inputs import Piece, StepInputs
from aiodisagg.engine.kernels import Kernels, Shapes, choose_kernels, new_inputs
from aiodisagg.engine.rows import RequestRows
from aiodisagg.engine.schedule import Segment
from aiodisagg.engine.stream import RequestHandle
from aiodisagg.engine.types import SamplingParams

pytestmark = pytest.mark.anyio

CPU = torch.device("cpu")

LOOP = Experts({"loop": run_loop}, ((0, "loop"),))
GROUPED = Experts({"grouped": run_grouped}, ((0, "grouped"),))


def on_device(
    model: Any, experts: Experts, *, kernels: Kernels | None = None, settings: dict[str, Any] | None = None,
    **config: Any,
) -> Engine:  # fmt: skip
    """An engine over a copy of the model (its projections are joined) that steps as with an accelerator."""
    model = copy.deepcopy(model)
    engine = make_engine(model, **config)
    assert unsupported(model) is None
    runner = engine._runner
    runner.device_runner = DeviceRunner(
        model, runner.pool, token_budget=16, max_running=2, max_context=4096, kernels=kernels or Kernels(),
        experts=experts, **settings or {},
    )  # fmt: skip
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


TRITON = Kernels(
    triton_layers.add_norm,
    triton_layers.rotate_store,
    triton_attention.attend,
    triton_layers.route,
    fast=frozenset({"add_norm", "rotate_store", "attend", "route"}),
)


def interpreted(model: Any, *, kernels: Kernels = TRITON, **settings: Any) -> Engine:
    """As :func:`on_device`, by Triton's kernels."""
    experts = Experts(experts_module._candidates(), ((0, "triton"),))
    engine = on_device(model, experts, kernels=kernels, settings=settings)
    runner = engine._runner.device_runner
    assert runner is not None
    runner.decoder.layers = runner.decoder.layers[:2]  # interpreting a launch costs a tenth of a second
    return engine


def test_a_mixed_step_by_triton_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode, a later chunk with rows of an item, and a prompt, in one step."""
    monkeypatch.setattr(triton_attention, "splits", lambda entries, kv_heads: 2)
    engine = interpreted(tiny_model("moe"))
    runner, pool = engine._runner.device_runner, engine._runner.pool
    assert runner is not None
    fast, pieces = runner.decoder.kernels, [Piece(1, 18, [3, 1]), Piece(4, 7, [0]), Piece(3, 3, [5])]
    step = runner._new_inputs(8, 3, 0)
    ids, positions = np.arange(8), np.arange(24).reshape(3, 8)
    rows = torch.randn(8, 4 * HIDDEN)
    logits = []
    with torch.inference_mode():
        for chosen in (Kernels(), fast):
            runner.decoder.kernels = chosen
            torch.manual_seed(3)
            for cache in (pool.keys, pool.values):
                cache.normal_()
            step.fill(pieces, ids, positions, visual=np.array([2, 3]), sampled=[0, 4, 7])
            logits.append(runner.decoder(step, pool, rows))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
    engine._runner.release()


def test_a_padded_step_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph replays: two requests in a step for four, over a pool whose other slots are NaN."""
    monkeypatch.setattr(triton_attention, "splits", lambda entries, kv_heads: 2)
    engine = interpreted(tiny_model("moe"))
    runner, pool = engine._runner.device_runner, engine._runner.pool
    assert runner is not None
    pieces = [Piece(1, 20, [3, 1]), Piece(1, 2, [0])]
    draw = torch.Generator().manual_seed(1)
    ids, positions = np.array([5, 9]), np.array([[19, 1]] * 3)
    logits, kept = [], []
    for pad_to in (None, (4, 4, 0)):
        for cache in (pool.keys, pool.values):
            cache.fill_(float("nan"))
            for piece in pieces:
                slots = [piece.pages[i // 16] * 16 + i % 16 for i in range(piece.total - 1)]
                cache[:, slots] = torch.randn(4, piece.total - 1, 2, 16, generator=draw.manual_seed(len(slots)))
        step = runner._new_inputs(4, 4, 0)
        step.fill(pieces, ids, positions, pad_to=pad_to)
        with torch.inference_mode():
            logits.append(runner.decoder(step, pool, every=True)[:2].clone())
        kept.append(pool.keys.nan_to_num(nan=7.0))
    assert torch.isfinite(logits[0]).all()
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)  # products of other sizes round otherwise
    torch.testing.assert_close(kept[0], kept[1], atol=1e-5, rtol=1e-5)  # padding wrote nowhere
    engine._runner.release()


def test_experts_that_fail_or_differ_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is right, if slow."""
    shapes = Shapes(HIDDEN, 4, 2, 16, 8, 2, 16, torch.float32, torch.device("cpu"))
    gate_up, down = torch.randn(8, 48, HIDDEN), torch.randn(8, HIDDEN, 24)

    def wrong(*tensors: torch.Tensor) -> torch.Tensor:
        return run_loop(*tensors) * 1.1  # type: ignore[arg-type]

    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    def too_large(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 256:  # with more than 64 rows an expert other blocks are used
            raise RuntimeError("out of resource: shared memory")
        return run_loop(x, *others)

    ways = {"wrong": wrong, "broken": broken, "too large": too_large, "grouped": run_grouped}
    monkeypatch.setattr(experts_module, "_candidates", lambda: ways)
    found = choose_experts(shapes, gate_up, down)
    assert (set(found.ways), found.name_for(1)) == ({"grouped", "loop"}, "grouped")
    ways.pop("grouped")
    found = choose_experts(shapes, gate_up, down)
    assert found.name_for(1) == "loop"
    assert not found.captured


def test_kernels_that_fail_or_differ_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*args: Any, **named: Any) -> torch.Tensor:
        return kernels.add_norm(*args, **named) + 0.01

    def broken(*args: Any, **named: Any) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(triton_layers, "add_norm", off)
    monkeypatch.setattr(triton_attention, "attend", broken)
    found = choose_kernels(Shapes(HIDDEN, 4, 2, 16, 8, 2, 16, torch.float32, torch.device("cpu")))
    assert found.fast == {"rotate_store", "route"}
    assert (found.add_norm, found.attend) == (kernels.add_norm, kernels.attend)
    assert not found.padded


def test_a_model_with_another_layer_is_left_to_transformers() -> None:
    model = copy.deepcopy(tiny_model("text"))
    model.model.config.hidden_act = "gelu"
    assert unsupported(model) == "its activation is gelu"
    assert "no model.layers" in str(unsupported(torch.nn.Linear(1, 1)))


def inputs(tokens: int, segments: int) -> StepInputs:
    shapes = Shapes(8, 2, 1, 8, 0, 0, 16, torch.float32, torch.device("cpu"))
    return new_inputs(shapes, tokens=tokens, segments=segments, pages=segments)


def again(compute: Callable[[], None]) -> Callable[[], None]:
    """What a capture would launch again."""
    return compute


def test_a_batch_takes_the_smallest_size_that_has_room_for_it() -> None:
    graphs = StepGraphs(inputs(8, 8), lambda step: step.ids, decode_sizes((1, 2, 4, 8, 16)), again)
    assert [size.tokens for size in graphs.sizes] == [1, 2, 4, 8]  # no size that the inputs have no room for
    assert graphs.size_for(1, 1, 0) is None  # nothing is captured yet
    graphs.capture()
    assert [graphs.size_for(n, n, 0) for n in (1, 3, 9)] == [Size(1, 1, 0), Size(4, 4, 0), None]

    sizes = prompt_sizes(16, (64, 256), (0, 4, 64))
    graphs = StepGraphs(inputs(256, 80), lambda step: step.ids[:3], sizes, again, logits=3)
    graphs.capture()
    assert graphs.size_for(60, 0, 4) == Size(64, 0, 4 + PROMPTS)
    assert graphs.size_for(60, 5, 4) == Size(256, 64, 16 + PROMPTS), (
        "64 decodes leave no room for a prompt in 64 tokens"
    )
    assert graphs.size_for(64, 3, 4 + PROMPTS) == Size(64, 4, 4 + PROMPTS)
    assert graphs.size_for(65, 65, 0) is None and graphs.size_for(257, 0, 17) is None
    ids = graphs.run(graphs.sizes[0], [Piece(3, 3, [0])], np.arange(1, 4), np.zeros((3, 3)), sampled=[2])
    assert ids.tolist() == [1, 2, 3] and graphs.inputs.sampled.tolist() == [2, 0, 0]
    assert graphs.inputs.ids.tolist() == [1, 2, 3, *[0] * 61]


def test_where_kernels_want_keys_listed_a_large_step_needs_room_for_them() -> None:
    listed = new_inputs(Shapes(8, 2, 1, 8, 0, 0, 16, torch.float32, CPU), tokens=1024, segments=80, pages=80, keys=8192)
    sizes = prompt_sizes(16, (64, 1024), (0, 8), listed=True)
    graphs = StepGraphs(listed, lambda step: step.ids[:3], sizes, again, logits=3)
    graphs.capture()
    assert graphs.size_for(64, 0, 4, 100_000) == Size(64, 0, 4 + PROMPTS), "pages are read, of any number of keys"
    assert graphs.size_for(65, 0, 5, 8192) == Size(1024, 0, 64 + PROMPTS, 8192)
    assert graphs.size_for(65, 0, 5, 8193) is None, "these inputs have no room for more"


def test_prompts_that_cannot_be_captured_leave_decodes_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(graphs: StepGraphs) -> None:
        if max(size.tiles for size in graphs.sizes):
            raise RuntimeError("out of memory")

    monkeypatch.setattr(StepGraphs, "capture", capture)
    engine = interpreted(tiny_model("moe"), captures=lambda priority: again, ladder=(2,), prompts=(16,))
    runner = engine._runner.device_runner
    assert runner is not None
    runner.warm_up()
    assert runner.graphs is not None and runner.prompt_graphs is None and runner.replayed_tokens == 0
    engine._runner.release()


def test_steps_with_prompts_are_captured_to_go_before_others_and_decodes_after_them() -> None:
    asked: list[Priority] = []

    def captures(priority: Priority) -> Capture:
        def capture(compute: Callable[[], None]) -> Callable[[], None]:
            asked.append(priority)
            return compute

        return capture

    engine = interpreted(tiny_model("moe"), captures=captures, ladder=(2,), prompts=(16,))
    runner = engine._runner.device_runner
    assert runner is not None and runner.graphs is not None and runner.prompt_graphs is not None
    for graphs, priority in ((runner.graphs, Priority.DECODES), (runner.prompt_graphs, Priority.PROMPTS)):
        graphs._compute = lambda step: step.ids[:, None]
        graphs.capture()
        assert set(asked) == {priority} and len(asked) == len(graphs.sizes)
        asked.clear()
    assert runner.replayed_tokens == 16
    engine._runner.release()


def test_inputs_with_room_for_no_size_are_captured_for_none() -> None:
    graphs = StepGraphs(inputs(32, 80), lambda step: step.ids, prompt_sizes(16, (64,)), again, logits=3)
    graphs.capture()
    assert graphs.sizes == () and graphs.size_for(4, 0, 1) is None


@pytest.mark.parametrize("spoilt", [TRIES - 1, TRIES])
def test_a_spoilt_capture_is_tried_again(monkeypatch: pytest.MonkeyPatch, spoilt: int) -> None:
    tries = 0

    def capture(captures: Captures, compute: Callable[[], None]) -> Callable[[], None]:
        nonlocal tries
        tries += 1
        if tries <= spoilt:
            raise RuntimeError("a thread waited for the device")
        return compute

    monkeypatch.setattr(Captures, "_capture", capture)
    captures = object.__new__(Captures)  # made, it asks the driver for a stream
    if spoilt < TRIES:
        assert captures(print) is print
    else:
        with pytest.raises(RuntimeError, match="waited"):
            captures(print)
    assert tries == TRIES


class Counted(Alone):
    """Counts who had the device alone."""

    steps = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        with super().taken():
            assert self._word[0] == 1
            self.steps += 1
            yield


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what a token of padding computes means nothing
@pytest.mark.parametrize("listed", [False, True])
def test_replayed_steps_give_what_launched_ones_give(monkeypatch: pytest.MonkeyPatch, listed: bool) -> None:
    """Decodes, a chunk with rows of an item, and prompts, in batches smaller than the sizes they are padded to; prompts
    with pages, or with listed keys."""
    monkeypatch.setattr(triton_attention, "splits", lambda entries, kv_heads: 2)
    flash = Flash()
    chosen = replace(TRITON, attend=FlashPrefill(triton_attention.attend, flash)) if listed else TRITON
    for module in (graphs_module, device_runner):
        monkeypatch.setattr(module, "KEYS", (8, 64))
    monkeypatch.setattr(graphs_module, "LISTED_TOKENS", 16)
    model = tiny_model("moe")
    plan = make_plan([2, (1, 2, 3), 3])
    rows = make_rows(plan, 3)
    width = rows[0].shape[1]
    alone = Counted(torch.zeros(2, dtype=torch.int32))
    engine = interpreted(
        model, kernels=chosen, captures=lambda priority: again, ladder=(2,), prompts=(16,), row_width=width, alone=alone
    )
    runner = engine._runner.device_runner
    assert runner is not None and runner.graphs is not None and runner.prompt_graphs is not None
    runner.graphs.capture()
    monkeypatch.setattr(runner.prompt_graphs, "sizes", [s for s in runner.prompt_graphs.sizes if s.decodes in (0, 8)])
    runner.prompt_graphs.capture()
    assert alone.steps == 0, "what compiles is launched kernel by kernel"

    def sequence(name: str) -> EngineSequence:
        held = RequestRows(name, plan, hidden_size=HIDDEN, width=width, dtype=torch.float32, device=torch.device("cpu"))
        for i, item in enumerate(rows):
            held.write(i, 0, item)
        return EngineSequence(RequestHandle(name, lambda _: None), plan, SamplingParams(), held, lambda _: "")

    first, second = sequence("a"), sequence("b")
    for one in (first, second):
        one.generated.append(5)
    t = plan.tokens
    steps = [
        [Work(Segment("a", 0, t, True), first, [3, 1])],
        [Work(Segment("a", t, t + 1, True), first, [3, 1]), Work(Segment("b", 0, t - 1, False), second, [0, 2])],
        [Work(Segment("a", t, t + 1, True), first, [3, 1]), Work(Segment("b", t - 1, t, True), second, [0, 2])],
        [Work(Segment("b", t, t + 1, True), second, [0, 2])],
    ]
    found: list[list[torch.Tensor]] = []
    replayed = 0
    run = StepGraphs.run

    def counted(*args: Any, **named: Any) -> torch.Tensor:
        nonlocal replayed
        replayed += 1
        return run(*args, **named)

    monkeypatch.setattr(StepGraphs, "run", counted)
    with torch.inference_mode():
        for by_graph in (True, False):
            if not by_graph:
                runner.graphs = runner.prompt_graphs = None
            for cache in (engine._runner.pool.keys, engine._runner.pool.values):
                cache.fill_(float("nan"))
            found.append([])
            for step in steps:
                before = alone.steps
                found[-1].append(runner.forward(step)[0].clone())
                prompts = any(work.segment.tokens > 1 for work in step)
                assert alone.steps - before == (prompts and by_graph), "only prompts, and only as graphs"
    assert alone._word.tolist() == [0, 0]
    assert replayed == len(steps) and (flash.calls > 0) is listed
    for ours, wanted in zip(*found, strict=True):
        assert ours.shape == wanted.shape and torch.isfinite(wanted).all()
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    engine._runner.release()
