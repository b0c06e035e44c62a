"""The driver feeds a machine one event at a time and keeps one timer, on every loop."""

from __future__ import annotations

import asyncio

import pytest

from aiodisagg.peer.driver import Driver
from tests.conftest import LOOPS

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]


class Late:
    """A machine whose timer is already due, until it has fired ``fires`` times."""

    def __init__(self, fires: int) -> None:
        self.left, self.heard = fires, 0
        self.done = asyncio.Event()

    def handle(self, event: str, now: float) -> list[str]:
        if event == "timer":
            self.left -= 1
        else:
            self.heard += 1
        if not self.left:
            self.done.set()
        return []

    def next_timer(self) -> float | None:
        return 0.0 if self.left else None


async def test_a_timer_that_is_overdue_fires_and_may_be_armed_again() -> None:
    """uvloop's handle of a timer that is due at once is not a TimerHandle: a busy process met it with every event."""
    machine = Late(fires=3)
    driver: Driver[str, str] = Driver(machine, lambda action: None, lambda: "timer")
    driver.feed("one")
    driver.feed("two")  # the timer is armed, overdue and has not fired yet
    async with asyncio.timeout(60):
        await machine.done.wait()
    assert (machine.heard, machine.left) == (2, 0)
    driver.close()
