"""What towers are told of a request's place."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from aiodisagg.errors import DeadlineExceeded
from aiodisagg.language.admission import Admission, Turn
from aiodisagg.models.base import ItemKind, PlannedItem
from aiodisagg.protocol.messages import ItemKey, Urgency, Want, decode, encode
from aiodisagg.protocol.rows import ModelFingerprint
from aiodisagg.scheduler.admission import AdmissionConfig
from aiodisagg.scheduler.order import Order
from aiodisagg.scheduler.prices import Work

pytestmark = pytest.mark.anyio

MODEL = ModelFingerprint("Qwen3VL", 4, 0, "float32", "x")


def want_of(urgency: Urgency) -> Want:
    return Want(ItemKey(1, 0), 1, "d", "image", (1, 4, 6), 6, 0.0, (), (), MODEL, 60.0, (b"",), urgency)


ITEM = PlannedItem("digest", ItemKind.IMAGE, (1, 4, 6), 6, ((0, 6),), (b"",))


async def test_it_is_the_one_that_the_request_has_in_line() -> None:
    admission = Admission(AdmissionConfig(max_wait_s=10.0), 8)
    items = [ITEM, replace(ITEM, kind=ItemKind.VIDEO, grid_thw=(3, 4, 4))]
    assert admission.urgency(items, -2, 4.0) == Urgency(6.0, -2, 24 + 48)
    assert admission.urgency(items[:1], 0, 11.0) == Urgency(0.0, 0, 24)


async def test_who_may_take_less_time_is_due_sooner() -> None:
    admission = Admission(AdmissionConfig(max_wait_s=10.0, max_ttft_s=5.0), 8)
    assert [admission.urgency([ITEM], 0, 1.0, left).due_s for left in (None, 3.0, 60.0)] == [4.0, 2.0, 4.0]


async def test_who_never_becomes_due_can_be_said() -> None:
    """Infinity closed every link to encode peers."""
    want = want_of(Admission(AdmissionConfig(max_wait_s=math.inf), 8).urgency([ITEM], 0, 0.0))
    assert decode(encode(want), "peer") == want


async def test_where_the_line_goes_by_arrival_so_do_towers() -> None:
    admission = Admission(AdmissionConfig(order=Order.FIRST_COME, max_wait_s=10.0), 8)
    assert admission.urgency([ITEM, ITEM], 1, 4.0) == Urgency(6.0, 1, 0)


async def test_what_a_request_has_waited_before_its_turn_counts(skip: Callable[[float], None]) -> None:
    admission = Admission(AdmissionConfig(), 1)
    await admission.take(Turn("first", Work(1)))
    second = asyncio.ensure_future(admission.take(Turn("second", Work(1), timeout_s=10.0, spent_s=8.0)))
    await asyncio.sleep(0)
    skip(3.0)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(second, 5)
    admission.end("first")
    await admission.aclose()
