"""Who gets a place: the tenant with the fewest, equals in turn, and nobody who has left."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import closing
from functools import partial

import pytest

from aiodisagg.peer.turns import Closed, Turns, Workers
from tests.services.system import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Crowd:
    """Takes places and keeps them until told to go; ``got`` in order. The first letter of a name is the tenant's."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.got = turns, list[str]()
        self._told: dict[str, asyncio.Event] = {}
        self._here: dict[str, asyncio.Task[None]] = {}

    async def come(self, *names: str) -> None:
        for name in names:
            self._told[name] = asyncio.Event()
            self._here[name] = asyncio.ensure_future(self._stay(name))
        await settled()

    async def _stay(self, name: str) -> None:
        async with self.turns.place(name[0]):
            self.got.append(name)
            await self._told[name].wait()

    async def go(self, *names: str) -> None:
        for name in names:
            self._told[name].set()
            await settled()

    async def leave(self, name: str) -> None:
        self._here[name].cancel()
        await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_equals_take_turns() -> None:
    turns = Turns(1)
    crowd = Crowd(turns)
    await crowd.come("a1", "a2", "a3", "b1", "c1", "b2")
    assert turns.waiting == 5
    await crowd.go("a1", "b1", "c1", "a2", "b2", "a3")
    assert crowd.got == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert repr(turns) == "<Turns 1 free, 0 held, 0 wait>"


async def test_who_has_the_fewest_gets_what_is_given_back() -> None:
    turns = Turns(4)
    crowd = Crowd(turns)
    await crowd.come(*(f"a{n}" for n in range(8)), *(f"b{n}" for n in range(4)))
    assert crowd.got == ["a0", "a1", "a2", "a3"]
    await crowd.go("a0", "a1")
    assert crowd.got[4:] == ["b0", "b1"], "until both have two"
    await crowd.go("b0")
    assert crowd.got[6:] == ["b2"], "whose places are given back soon does not have fewer for that"
    await crowd.go("a2")
    assert crowd.got[7:] == ["a4"]
    await crowd.go("b1", "b2", "b3", "a3", "a4", "a5", "a6", "a7")
    assert repr(turns) == "<Turns 4 free, 0 held, 0 wait>"


async def test_a_tenant_may_be_held_to_some_of_the_places() -> None:
    turns = Turns(3, most=2)
    crowd = Crowd(turns)
    await crowd.come("a1", "a2", "a3", "b1", "b2")
    assert crowd.got == ["a1", "a2", "b1"]
    await crowd.go("b1")
    assert crowd.got == ["a1", "a2", "b1", "b2"]
    await crowd.go("b2")
    assert repr(turns) == "<Turns 1 free, 2 held, 1 wait>"
    await crowd.go("a1")
    assert crowd.got[4:] == ["a3"]
    await crowd.go("a2", "a3")


async def test_who_leaves_holds_nothing() -> None:
    turns = Turns(1)
    crowd = Crowd(turns)
    await crowd.come("a1", "a2", "b1", "c1")
    await crowd.leave("a2")
    await crowd.leave("b1")
    assert turns.waiting == 1
    await crowd.leave("a1")
    assert crowd.got == ["a1", "c1"]
    await crowd.go("c1")
    assert repr(turns) == "<Turns 1 free, 0 held, 0 wait>"


async def test_who_leaves_in_the_moment_of_its_turn_gives_it_on() -> None:
    turns = Turns(1)
    crowd = Crowd(turns)
    await crowd.come("a1", "b1", "c1")
    turns._give_back("a")  # the second has its turn, and has not run yet
    await crowd.leave("b1")
    assert crowd.got == ["a1", "c1"] and turns.waiting == 0
    turns._held["a"] += 1  # undone
    turns._free -= 1
    await crowd.go("c1", "a1")


async def test_work_that_cannot_be_started_leaves_its_place() -> None:
    turns = Turns(1)

    def start() -> Future[None]:
        raise RuntimeError("no threads")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no threads"):
            await turns.work("a", start)


async def test_a_thread_keeps_its_place_when_nobody_waits_for_it_any_more() -> None:
    let, begun, running = threading.Event(), list[str](), threading.Event()

    def slow() -> None:
        begun.append("slow")
        running.set()
        let.wait()

    with closing(Workers(1, "test")) as workers:
        first = asyncio.ensure_future(workers.run("a", slow))
        second, third = (asyncio.ensure_future(workers.run(name, partial(begun.append, name))) for name in "ab")
        await asyncio.to_thread(running.wait)
        assert workers.waiting == 2
        for left in (first, second):
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
        await settled()
        assert (workers.waiting, begun) == (1, ["slow"])
        let.set()
        await third
        assert begun == ["slow", "b"]
        with pytest.raises(ZeroDivisionError):
            await workers.run("a", lambda: 1 // 0)
        assert await workers.run("a", lambda: 1) == 1


async def test_who_waits_when_it_is_closed_is_told() -> None:
    let, running, workers = threading.Event(), threading.Event(), Workers(1, "test")
    tasks = [asyncio.ensure_future(workers.run("a", lambda: running.set() or let.wait())) for _ in range(3)]
    await asyncio.to_thread(running.wait)
    closed = asyncio.ensure_future(asyncio.to_thread(workers.close))
    await eventually(lambda: workers._pool._shutdown)
    let.set()
    await closed
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert found[0] is True and [type(one) for one in found[1:]] == [Closed, Closed]
