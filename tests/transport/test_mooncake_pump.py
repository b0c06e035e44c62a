"""How often the pump's thread asks how a transfer stands."""

from __future__ import annotations

import asyncio
import threading
from typing import cast

import pytest

from aiodisagg.transport import mooncake_pump
from aiodisagg.transport.base import Slice
from aiodisagg.transport.mooncake_engine import DONE, PENDING, Engine
from aiodisagg.transport.mooncake_job import Job, Lane
from aiodisagg.transport.mooncake_pump import Pump

pytestmark = pytest.mark.anyio


class Clock:
    """Time that passes only while the pump sleeps."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class Wake(threading.Event):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is None:
            return super().wait()
        if not self.is_set():
            self.clock.sleep(timeout)
        return self.is_set()


class SlowEngine:
    """A transfer takes as many seconds as its size in MB; how often it was asked for."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.ends_s: dict[int, float] = {}
        self.asked: dict[int, int] = {}

    def submit(self, segment: str, source: int, destination: int, size_bytes: int) -> int:
        self.ends_s[size_bytes] = self.clock.now_s + size_bytes * 1e-6
        return size_bytes

    def status(self, transfer: int) -> int:
        self.asked[transfer] = self.asked.get(transfer, 0) + 1
        return DONE if self.clock.now_s >= self.ends_s[transfer] else PENDING


async def test_a_long_transfer_is_asked_for_rarely_and_its_end_noticed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(mooncake_pump, "time", clock)
    engine = SlowEngine(clock)
    pump = Pump("test", cast(Engine, engine), 4, 1, None, (), 30.0)
    first, pump._wake = pump._wake, Wake(clock)
    first.set()
    try:
        for size in (200_000, 1000):  # seconds of it, and a millisecond
            job = Job(Lane("peer", "segment", 0), [Slice(memoryview(bytes(size)), 0, 1)], size)
            began_s = clock.now_s
            pump.send(job)
            async with asyncio.timeout(60):
                await job.outcome
            took_s = size * 1e-6
            assert took_s <= clock.now_s - began_s <= took_s * 1.035 + 100e-6
        assert engine.asked[200_000] < 500, "and not every 50 us, which is 4,000 times"
    finally:
        pump.finish(0.0)
        assert await asyncio.to_thread(pump.join, 60)
