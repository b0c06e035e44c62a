"""Entering a RowReceiver that is given up: its pool is memory that nobody else would ever close."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from aiodisagg.bench.synthetic import synthetic_model
from aiodisagg.language import rows
from aiodisagg.language.memory import RowMemory
from aiodisagg.language.rows import RowReceiver
from aiodisagg.peer.config import LanguageConfig
from tests.services.system import PATIENCE_S

pytestmark = pytest.mark.anyio


def receiver(folder: Path) -> RowReceiver:
    config = LanguageConfig(model=folder, transports=("memory",), pool_bytes=1 << 20)
    synthetic = synthetic_model(hidden_size=16, levels=3)
    return RowReceiver(config, synthetic, name="rows", deliver=lambda *_: None, ended=lambda *_: None)


async def test_a_pool_that_is_made_while_entering_is_cancelled_is_closed(
    tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread made it for nobody: 64 MiB, or a GiB for a GPU, for as long as the process lived."""
    begun, gate, made = threading.Event(), threading.Event(), list[RowMemory]()

    class Slow(RowMemory):
        def __init__(self, *arguments: Any) -> None:
            begun.set()
            assert gate.wait(PATIENCE_S)
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(rows, "RowMemory", Slow)
    entering = asyncio.create_task(receiver(tmp_path).__aenter__())
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    entering.cancel()
    await asyncio.sleep(0)
    gate.set()
    await asyncio.wait([entering], timeout=PATIENCE_S)
    assert entering.cancelled()
    assert ["closed" in repr(memory.arena) for memory in made] == [True]


async def test_so_is_one_of_who_is_cancelled_again_while_it_is_made(
    tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all who are left by a scope of anyio's, which cancels at every wait: the pool stayed."""
    begun, gate, closed = threading.Event(), threading.Event(), threading.Event()

    class Slow(RowMemory):
        def __init__(self, *arguments: Any) -> None:
            begun.set()
            assert gate.wait(PATIENCE_S)
            super().__init__(*arguments)

        def close(self) -> None:
            super().close()
            closed.set()

    monkeypatch.setattr(rows, "RowMemory", Slow)
    entering = asyncio.create_task(receiver(tmp_path).__aenter__())
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    while not entering.done():
        entering.cancel()
        await asyncio.sleep(0)
    gate.set()
    assert entering.cancelled() and await asyncio.to_thread(closed.wait, 10.0)
