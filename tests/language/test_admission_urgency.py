"""What towers are told of a request's place."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aiodisagg.language.admission import Admission
from aiodisagg.models.base import ItemKind, PlannedItem
from aiodisagg.protocol.messages import Urgency
from aiodisagg.scheduler.admission import AdmissionConfig
from aiodisagg.scheduler.order import Order

pytestmark = pytest.mark.anyio

ITEM = PlannedItem("digest", ItemKind.IMAGE, (1, 4, 6), 6, ((0, 6),), (b"",))


async def test_it_is_the_one_that_the_request_has_in_line() -> None:
    admission = Admission(AdmissionConfig(max_wait_s=10.0), 8)
    items = [ITEM, replace(ITEM, kind=ItemKind.VIDEO, grid_thw=(3, 4, 4))]
    assert admission.urgency(items, -2, 4.0) == Urgency(6.0, -2, 24 + 48)
    assert admission.urgency(items[:1], 0, 11.0) == Urgency(0.0, 0, 24)


async def test_where_the_line_goes_by_arrival_so_do_towers() -> None:
    admission = Admission(AdmissionConfig(order=Order.FIRST_COME, max_wait_s=10.0), 8)
    assert admission.urgency([ITEM, ITEM], 1, 4.0) == Urgency(6.0, 1, 0)
