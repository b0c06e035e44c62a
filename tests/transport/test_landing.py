"""The gate: ``revoke`` returns after the copy in progress and before any later one."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aiodisagg.transport.landing import Landing
from aiodisagg.transport.testing import Lender
from tests.conftest import LOOPS

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]


async def test_settled_waits_for_the_copy_in_progress_on_another_thread(no_leaks: None) -> None:
    lender, pool = Lender(), bytearray(100)
    landing = Landing(memoryview(pool), lender.admit)
    lease, other = lender.lend(0, 50), lender.lend(50, 50)
    inside, go_on = threading.Event(), threading.Event()

    def copy() -> None:
        target = landing.enter(0, 50, lease)
        assert target is not None
        inside.set()
        go_on.wait(60)
        target[:] = b"x" * 50
        landing.leave(lease)

    thread = threading.Thread(target=copy)
    thread.start()
    await asyncio.to_thread(inside.wait, 10)
    lender.withdraw(lease)
    await landing.settled([other])  # a copy under another lease holds nobody up
    settled = asyncio.ensure_future(landing.settled([lease]))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not settled.done()
    go_on.set()
    await asyncio.wait_for(settled, 60)
    assert pool[:50] == b"x" * 50
    assert landing.enter(0, 50, lease) is None
    thread.join()


async def test_a_copy_that_is_asking_when_its_lease_is_withdrawn_is_waited_for(no_leaks: None) -> None:
    """The race that counting before asking is for: ``admit`` said yes, the copy has not begun."""
    asked, answer = threading.Event(), threading.Event()

    def admit(offset: int, size_bytes: int, lease: int) -> bool:
        asked.set()
        answer.wait(60)
        return True  # decided before the lease was withdrawn

    landing = Landing(memoryview(bytearray(10)), admit)
    entered: list[memoryview | None] = []
    thread = threading.Thread(target=lambda: entered.append(landing.enter(0, 10, 7)))
    thread.start()
    await asyncio.to_thread(asked.wait, 10)
    settled = asyncio.ensure_future(landing.settled([7]))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not settled.done()
    answer.set()
    thread.join()
    assert entered[0] is not None
    assert not settled.done()
    landing.leave(7)
    await asyncio.wait_for(settled, 60)


async def test_what_is_outside_or_cannot_be_admitted_is_refused(no_leaks: None) -> None:
    def admit(offset: int, size_bytes: int, lease: int) -> bool:
        raise RuntimeError("the owner's bug")

    landing = Landing(memoryview(bytearray(10)), admit)
    assert [landing.enter(*range_, 1) for range_ in ((-1, 2), (9, 2), (0, 11), (0, -1), (2**70, 1), (0, 5))] == [
        None
    ] * 6
    await landing.settled()
    await landing.aclose()
    assert landing.enter(0, 5, 1) is None
