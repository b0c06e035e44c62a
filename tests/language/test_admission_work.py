"""What a request is priced for: what is to be done for it, and nothing that is here already."""

from __future__ import annotations

import numpy as np
import pytest

from aiodisagg.language.admission import work_of
from aiodisagg.models.base import ItemKind, PlannedItem, PromptPlan
from aiodisagg.scheduler.prices import Work


def picture(digest: str, *spans: tuple[int, int]) -> PlannedItem:
    grid = (len(spans), 4, 4)
    return PlannedItem(digest, ItemKind.IMAGE, grid, 4 * len(spans), spans, (b"",))


def plan(*items: PlannedItem) -> PromptPlan:
    return PromptPlan(np.zeros(100, dtype=np.int64), np.zeros((3, 100), dtype=np.int64), 0, items)


CHAT = plan(picture("a", (10, 14)), picture("video", (20, 24), (30, 34)), picture("b", (40, 44)))


@pytest.mark.parametrize(
    ("held", "rows", "work"),
    [
        (0, "", Work(100, 16 + 32 + 16)),
        (14, "", Work(86, 32 + 16)),
        (32, "", Work(68, 32 + 16)),  # of which a row is missing is encoded as a whole
        (34, "b", Work(66, 0)),
        (0, "ab", Work(100, 32)),
        (96, "", Work(4, 0)),
    ],
)
def test_what_is_in_pages_or_has_its_rows_here_costs_nothing(held: int, rows: str, work: Work) -> None:
    assert work_of(CHAT, held, rows.__contains__) == work


def test_a_picture_that_is_shown_twice_is_encoded_once() -> None:
    twice = plan(picture("a", (10, 14)), picture("a", (20, 24)))
    assert work_of(twice, 0, lambda digest: False) == Work(100, 16)
