"""Blocks that a stopped peer keeps are told of, once, and what is over is not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest

from aiodisagg.peer import planes
from aiodisagg.peer.planes import Planes

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Stopped:
    """A transport whose peers answer when they run again."""

    def __init__(self) -> None:
        self.runs = asyncio.Event()

    async def revoke(self, peer: str, leases: Sequence[int]) -> None:
        await self.runs.wait()


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.put_nowait(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    handler = Heard()
    monkeypatch.setattr(planes, "logger", logging.Logger("planes"))
    planes.logger.addHandler(handler)
    return handler


def stopped_planes(monkeypatch: pytest.MonkeyPatch, slow_s: float) -> tuple[Planes, Stopped]:
    monkeypatch.setattr(planes, "SLOW_S", slow_s)
    made, transport = Planes(("ipc",), "127.0.0.1"), Stopped()
    made.open_transports["ipc"] = transport  # type: ignore[assignment]
    return made, transport


async def test_a_peer_that_keeps_blocks_is_named_once(monkeypatch: pytest.MonkeyPatch, heard: Heard) -> None:
    """A stopped process held the pool, and nothing said so."""
    made, transport = stopped_planes(monkeypatch, 0.0)
    async with asyncio.TaskGroup() as group:
        for leases in ((1, 2, 3), (4,)):
            group.create_task(made.revoke("A", leases))
        async with asyncio.timeout(60):
            line = await heard.lines.get()
        assert line.startswith("WARNING peer A keeps 4 blocks of the pool"), line
        group.create_task(made.revoke("A", (5,)))
        for _ in range(3):
            group.create_task(made.revoke("B", (6,)))
        async with asyncio.timeout(60):
            assert (await heard.lines.get()).startswith("WARNING peer B keeps 3 blocks"), "and A is not named again"
        transport.runs.set()
    assert heard.lines.empty()


async def test_a_peer_that_answers_or_is_not_asked_any_more_is_not_named(
    monkeypatch: pytest.MonkeyPatch, heard: Heard
) -> None:
    made, transport = stopped_planes(monkeypatch, 0.02)
    task = asyncio.create_task(made.revoke("A", (1,)))
    transport.runs.set()
    await task
    transport.runs.clear()
    task = asyncio.create_task(made.revoke("A", (2,)))
    late = asyncio.Event()
    asyncio.get_running_loop().call_soon(task.cancel)
    await asyncio.wait([task])
    asyncio.get_running_loop().call_later(0.05, late.set)
    await late.wait()
    assert heard.lines.empty() and not made._watches and not made._revoking
