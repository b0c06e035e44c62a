"""Thousands of items that wait for blocks: what an event costs does not grow with them."""

from __future__ import annotations

from collections import UserDict
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms
from aiodisagg.protocol.blocks import BlockPool
from aiodisagg.protocol.lines import Line

from .lists import Receiving

MANY = 400


class Counting(UserDict[Any, Any]):
    """Counts how often something is looked up."""

    looked = 0

    def __getitem__(self, key: Any) -> Any:
        type(self).looked += 1
        return super().__getitem__(key)


def test_items_of_a_peer_that_has_its_share_are_passed_over_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event looked at all of them, a tenth of the processor's time with four thousand."""
    r = Receiving(blocks=16, window_blocks=1)
    for peer in "AB":
        r.do(ev.LinkUp(peer))
    for room in range(1, MANY + 1):
        r.open(ms.ItemKey(room, 0))
    assert r.pool.free and len(r.machine._eager) > MANY - 16
    monkeypatch.setattr(Counting, "looked", 0)
    r.machine.items = Counting(r.machine.items)  # type: ignore[assignment]
    (lend,) = r.open(ms.ItemKey(MANY + 1, 0), peer="B")
    r.arrive(lend, ms.ItemKey(MANY + 1, 0), "B")
    assert Counting.looked < 50


def test_a_word_of_one_item_looks_at_its_own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    r = Receiving(blocks=MANY, window_blocks=1)
    r.do(ev.LinkUp("A"))
    for room in range(1, MANY // 2):
        r.open(ms.ItemKey(room, 0))
    found: Mock = Mock(side_effect=r.pool.lent_to)
    monkeypatch.setattr(r.pool, "lent_to", lambda *of: found(*of))
    looked = 0
    r.open(ms.ItemKey(MANY, 0))
    for call in found.call_args_list:
        looked += len(BlockPool.lent_to(r.pool, *call.args))
    assert looked < 5


def test_a_line_asks_of_each_peer_once_and_not_of_each_item() -> None:
    line, may = Line(), Mock(side_effect=lambda peer: peer == "B")
    for room in range(MANY):
        line.add(ms.ItemKey(room, 0), "A")
    line.add(ms.ItemKey(MANY, 0), "B")
    assert line.first(may) == ms.ItemKey(MANY, 0) and may.call_count <= 3


@given(st.lists(st.tuples(st.sampled_from((True, True, False)), st.integers(0, 9), st.sampled_from("ABC")), min_size=8))
def test_the_first_of_those_that_may_whatever_came_and_went(steps: list[tuple[bool, int, str]]) -> None:
    line, plain = Line(), dict[ms.ItemKey, str]()
    for comes, number, peer in steps:
        key = ms.ItemKey(number, 0)
        if comes:
            assert line.add(key, peer) is (key not in plain)
            plain.setdefault(key, peer)
        else:
            line.remove(key)
            plain.pop(key, None)
        for able in ("", "A", "B", "C", "AB", "AC", "BC", "ABC"):
            expected = next((key for key, other in plain.items() if other in able), None)
            assert line.first(able.__contains__) == expected
        assert list(line) == list(plain) and len(line) == len(plain)
    for key in list(plain):
        line.remove(key)
    assert not line._by_peer
