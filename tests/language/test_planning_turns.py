"""Who is planned when: tenants in turn, and nobody for whom nobody waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import closing
from typing import Any, cast

import pytest

from aiodisagg.language.planning import Planning
from aiodisagg.models.base import ChatMessage, PromptPlan
from aiodisagg.peer.turns import Closed
from tests.services.system import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Slow:
    """Plans when it is let; ``begun`` in order."""

    def __init__(self) -> None:
        self.let, self.begun = threading.Semaphore(0), list[Any]()

    def plan(self, messages: Sequence[ChatMessage]) -> PromptPlan:
        self.begun.append(messages)
        self.let.acquire()
        if messages == cast(Any, "bad"):
            raise ValueError("bad")
        return cast(PromptPlan, messages)


def started(planning: Planning, what: str) -> asyncio.Task[PromptPlan]:
    return asyncio.ensure_future(planning.plan(cast(Any, what), what[0]))


async def test_tenants_take_turns() -> None:
    slow = Slow()
    with closing(Planning(slow.plan, threads=1)) as planning:
        tasks = [started(planning, what) for what in ("a1", "a2", "a3", "a4", "b1", "c1", "b2")]
        await eventually(lambda: planning.waiting == 6)
        slow.let.release(7)
        assert await asyncio.gather(*tasks) == ["a1", "a2", "a3", "a4", "b1", "c1", "b2"]
        assert slow.begun == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
        assert planning.waiting == 0


async def test_who_leaves_the_line_is_not_planned_and_who_leaves_a_thread_keeps_it_busy() -> None:
    slow = Slow()
    with closing(Planning(slow.plan, threads=1)) as planning:
        first, second, third = (started(planning, what) for what in ("a1", "a2", "b1"))
        await eventually(lambda: slow.begun == ["a1"] and planning.waiting == 2)
        for task in (second, first):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert planning.waiting == 1
        for _ in range(20):
            await asyncio.sleep(0)
        assert slow.begun == ["a1"], "its thread is at work still"
        slow.let.release(2)
        assert await third == "b1" and slow.begun == ["a1", "b1"]
        slow.let.release()
        assert await started(planning, "a3") == "a3"


async def test_who_waits_when_it_is_closed_is_told() -> None:
    slow = Slow()
    planning = Planning(slow.plan, threads=1)
    tasks = [started(planning, what) for what in ("a1", "a2", "b1")]
    await eventually(lambda: planning.waiting == 2)
    closed = asyncio.ensure_future(asyncio.to_thread(planning.close))
    await eventually(lambda: planning._workers._pool._shutdown)
    slow.let.release()
    await closed
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert found[0] == "a1" and [type(one) for one in found[1:]] == [Closed, Closed]


async def test_a_plan_that_fails_leaves_its_place_to_the_next() -> None:
    slow = Slow()
    slow.let.release(3)
    with closing(Planning(slow.plan, threads=1)) as planning:
        bad, good = started(planning, "bad"), started(planning, "good")
        with pytest.raises(ValueError, match="bad"):
            await bad
        assert await good == "good" and await started(planning, "more") == "more"
