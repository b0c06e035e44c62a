"""How many connections that have not proved themselves a listener bears, and for how long."""

from __future__ import annotations

import asyncio

import pytest

from aiodisagg import strangers
from aiodisagg.strangers import Strangers

pytestmark = pytest.mark.anyio


class Ended(asyncio.Queue[tuple[int, str]]):
    """Who was sent away, and why."""

    def __call__(self, one: int, why: str) -> None:
        self.put_nowait((one, why))

    def now(self) -> list[int]:
        return [self.get_nowait()[0] for _ in range(self.qsize())]


def crowd(count: int, ended: Ended) -> Strangers[int]:
    known: Strangers[int] = Strangers(600.0, ended)
    for one in range(count):
        known.add(one)
    return known


async def test_the_oldest_of_too_many_that_had_their_time_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "GRACE_S", 0.0)
    ended = Ended()
    known = crowd(66, ended)
    assert ended.now() == [0, 1] and 0 not in known and 2 in known
    assert known.discard(2) and not known.discard(2) and not known.discard(0)
    known.add(66)
    assert ended.now() == [], "there was room"
    known.close()
    assert sorted(ended.now()) == list(range(3, 67)) and len(known) == 0


async def test_a_crowd_has_its_time_to_prove_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "GRACE_S", 0.05)
    ended = Ended()
    known = crowd(200, ended)
    assert ended.now() == []
    for one in range(2, 200, 2):
        known.discard(one)
    async with asyncio.timeout(20):
        assert [(await ended.get())[0] for _ in range(37)] == [0, *range(1, 73, 2)]
    assert len(known) == 64 and ended.empty()
    known.close()


async def test_there_are_never_more_than_descriptors_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "GRACE_S", 600.0)
    monkeypatch.setattr(strangers, "MOST", 100)
    ended = Ended()
    known = crowd(103, ended)
    assert ended.now() == [0, 1, 2] and len(known) == 100
    known.close()


async def test_a_few_are_sent_away_in_time_and_in_order() -> None:
    ended = Ended()
    known: Strangers[int] = Strangers(0.05, ended)
    known.add(1)
    known.add(2)
    known.discard(1)
    known.add(3)
    async with asyncio.timeout(20):
        assert [await ended.get(), await ended.get()] == [(2, "no greeting in 0.05 s"), (3, "no greeting in 0.05 s")]
    assert len(known) == 0
