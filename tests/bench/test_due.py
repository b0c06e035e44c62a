"""Open loops measure from when a request was due: a loop that is late is part of what they measure."""

from __future__ import annotations

import time
from itertools import islice
from random import Random
from typing import Any, cast

import pytest

from aiodisagg.bench import overload_real
from aiodisagg.bench.control import _Caller
from aiodisagg.bench.workload import Gamma

pytestmark = pytest.mark.anyio


class Ready:
    """Every item is here at once."""

    def __init__(self, caller: _Caller) -> None:
        self._caller = caller

    def request(self, items: Any, timeout_s: float) -> None:
        for key, _ in items:
            self._caller.ended(key, None)


async def test_what_control_adds_counts_from_when_an_item_was_due() -> None:
    caller = _Caller(4)
    caller.receiver = cast(Any, Ready(caller))
    assert await caller._ask(time.perf_counter() - 5.0) >= 5.0
    assert await caller._ask() < 5.0


async def test_items_are_due_as_the_process_says_however_late_the_loop_is(monkeypatch: pytest.MonkeyPatch) -> None:
    caller, dues = _Caller(4), list[float]()

    async def asked(due: float | None = None) -> float:
        assert due is not None
        dues.append(due)
        return 0.0

    monkeypatch.setattr(caller, "_ask", asked)
    await caller.opened(20, 10_000.0, 3)
    arrivals = list(islice(Gamma(10_000.0).arrivals(Random(3)), 20))
    assert [due - dues[0] for due in dues] == pytest.approx([at - arrivals[0] for at in arrivals])


async def test_first_tokens_of_an_overloaded_service_count_from_when_requests_were_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = [overload_real._Asked(after_s, [], 0) for after_s in (0.0, 0.001, 0.003)]
    dues = list[float | None]()

    async def asked(service: Any, one: Any, due: float | None = None) -> None:
        dues.append(due)

    monkeypatch.setattr(overload_real, "_ask", asked)
    await overload_real._play(cast(Any, None), requests)
    first = cast(float, dues[0])
    assert [cast(float, due) - first for due in dues] == pytest.approx([0.0, 0.001, 0.003])
    dues.clear()
    await overload_real._play(cast(Any, None), requests, at_once=True)
    assert dues == [None] * 3
