"""Rows as they arrive: order, repetition, form."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tiny_engine import IMAGE, VIDEO, make_plan

from aiodisagg.engine.rows import RequestRows
from aiodisagg.errors import EngineError
from aiodisagg.models.base import ItemKind, PlannedItem, PromptPlan

H, WIDTH = 4, 12


def held(plan: PromptPlan, width: int | None = WIDTH, dtype: torch.dtype = torch.float32) -> RequestRows:
    return RequestRows("r", plan, hidden_size=H, width=width, dtype=dtype, device=torch.device("cpu"))


def test_the_front_is_before_the_first_missing_row() -> None:
    rows = held(make_plan([3, (1, 2, 2), 2, (1, 2, 3)]))  # text 3, image of 4, text 2, image of 6
    assert rows.front == 3
    rows.write(1, 0, torch.ones(6, WIDTH))
    assert rows.front == 3
    rows.write(0, 1, torch.ones(3, WIDTH))
    assert rows.front == 3
    rows.write(0, 0, torch.ones(1, WIDTH))
    assert rows.front == 15


def test_the_front_does_not_stop_inside_of_an_image_or_a_frame_pair() -> None:
    """Its other rows are on their way: computed in pieces, an image costs several reads of the weights."""
    rows = held(make_plan([3, (1, 2, 2), 2, (2, 1, 3)]))  # 3 of text, an image of 4, 2 of text, 3 + text + 3 of a video
    rows.write(0, 0, torch.ones(3, WIDTH))
    assert rows.front == 3
    rows.write(0, 3, torch.ones(1, WIDTH))
    rows.write(1, 0, torch.ones(5, WIDTH))
    assert rows.front == 13
    rows.write(1, 5, torch.ones(1, WIDTH))
    assert rows.front == 16


@pytest.mark.parametrize("seed", range(4))
def test_any_order_and_repetition_give_the_same_rows(seed: int) -> None:
    rng = random.Random(seed)
    plan = make_plan([2, (1, 4, 5), 3, (2, 2, 3), 1])
    items = [torch.randn(item.rows, WIDTH) for item in plan.items]
    pieces = [(i, at, at + 3) for i, item in enumerate(items) for at in range(0, len(item), 2)]
    rng.shuffle(pieces)
    rows = held(plan)
    for i, start, stop in pieces:
        rows.write(i, start, items[i][start:stop])
    assert rows.front == plan.tokens
    where, got = rows.take(0, plan.tokens)
    assert got is not None and torch.equal(got, torch.cat(items))
    assert set(plan.input_ids[where].tolist()) == {IMAGE, VIDEO}
    where, got = rows.take(10, 13)  # a range inside an item
    assert got is not None and where.tolist() == [0, 1, 2] and torch.equal(got, items[0][8:11])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bytes_are_rows(dtype: str) -> None:
    kind = getattr(torch, dtype)
    rows = held(make_plan([1, (1, 2, 2)]), dtype=kind)
    values = torch.randn(4, WIDTH).to(kind)
    raw = bytes(values.view(torch.uint8).numpy().reshape(-1))
    half = len(raw) // 2
    rows.write_bytes(0, 2, memoryview(raw)[half:], width=WIDTH, dtype=dtype)
    rows.write_bytes(0, 0, bytearray(raw[:half]), width=WIDTH, dtype=dtype)
    _, got = rows.take(0, 5)
    assert got is not None and torch.equal(got, values)


def test_bytes_of_another_dtype_are_cast() -> None:
    rows = held(make_plan([1, (1, 2, 2)]))
    values = torch.randn(4, WIDTH).to(torch.bfloat16)
    rows.write_bytes(0, 0, bytes(values.view(torch.uint8).numpy().reshape(-1)), width=WIDTH, dtype="bfloat16")
    _, got = rows.take(0, 5)
    assert got is not None and torch.equal(got, values.float())
    with pytest.raises(EngineError, match="int8"):
        rows.write_bytes(0, 0, b"1234", width=WIDTH, dtype="int8")
    with pytest.raises(EngineError, match="100 bytes"):
        rows.write_bytes(0, 0, bytes(100), width=WIDTH, dtype="bfloat16")


def test_rows_are_copied() -> None:
    rows = held(make_plan([1, (1, 2, 2)]))
    values = torch.ones(4, WIDTH)
    rows.write(0, 0, values)
    values.zero_()
    assert float(rows.take(0, 5)[1].sum()) == 4 * WIDTH  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("item", "start", "rows", "says"),
    [
        (1, 0, torch.ones(4, WIDTH), "has 1 items"),
        (-1, 0, torch.ones(4, WIDTH), "has 1 items"),
        (0, 1, torch.ones(4, WIDTH), r"rows \[1, 5\) of 4"),
        (0, -1, torch.ones(4, WIDTH), r"rows \[-1, 3\) of 4"),
        (0, 0, torch.ones(4, WIDTH + H), "16 elements"),
        (0, 0, torch.ones(4, WIDTH, dtype=torch.float64), "float64"),
        (0, 0, torch.ones(WIDTH), "shape"),
    ],
)
def test_wrong_rows_are_refused(item: int, start: int, rows: torch.Tensor, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        held(make_plan([1, (1, 2, 2)])).write(item, start, rows)


def test_without_a_layout_the_rows_of_a_request_must_agree() -> None:
    rows = held(make_plan([1, (1, 2, 2)]), width=None)
    with pytest.raises(EngineError, match="6 elements"):
        rows.write(0, 0, torch.ones(4, H + 2))
    rows.write(0, 0, torch.ones(2, 2 * H))
    with pytest.raises(EngineError, match="12 elements, wanted 8"):
        rows.write(0, 2, torch.ones(2, 3 * H))


def plan_of(ids: list[int], rows: int, spans: tuple[tuple[int, int], ...]) -> PromptPlan:
    item = PlannedItem("d", ItemKind.IMAGE, (1, 4, 4), rows, spans, (b"",))
    return PromptPlan(np.array(ids), np.zeros((3, len(ids)), dtype=np.int64), 0, (item,))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (plan_of([1, 9, 9, 2], 3, ((1, 3),)), "3 rows for 2 placeholders"),
        (plan_of([1, 9, 9, 9], 2, ((1, 3),)), "belong to no item"),
        (plan_of([1, 9, 9, 2], 4, ((1, 5),)), "not ascending ranges"),
        (plan_of([1, 9, 9, 2], 2, ((2, 3), (1, 2))), "not ascending ranges"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(plan: PromptPlan, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        held(plan)


def test_bytes_of_which_some_are_here_complete_the_item() -> None:
    """A second peer goes on where the first one's chunks did not end."""
    rows = held(make_plan([1, (1, 2, 2)]))
    values = torch.randn(4, WIDTH)
    raw = bytes(values.view(torch.uint8).numpy().reshape(-1))
    rows.write_bytes(0, 0, raw[: len(raw) // 2], width=WIDTH, dtype="float32")
    rows.write_bytes(0, 1, raw[len(raw) // 4 :], width=WIDTH, dtype="float32")
    assert rows.front == 5
    _, got = rows.take(0, 5)
    assert got is not None and torch.equal(got, values)


def test_an_item_is_asked_for_once() -> None:
    rows = held(make_plan([3, (1, 2, 2), 2, (1, 2, 3)]))
    rows.reuse(9)
    assert rows.ask() == (1,)
    rows.reuse(0)  # preempted: what was found before may be gone
    assert (rows.ask(), rows.ask()) == ((0,), ())
