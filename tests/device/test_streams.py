"""Who goes first on a device: what torch is asked for, since only a GPU can show what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from aiodisagg.device.streams import Priority, own_stream
from aiodisagg.device.vitals import Vitals
from aiodisagg.encode import tower
from aiodisagg.encode.gate import OpenGate
from aiodisagg.engine import worker
from aiodisagg.engine.config import EngineConfig
from aiodisagg.engine.engine import Engine
from tests.engine.tiny_engine import tiny_model

NOBODY: Any = None
"""Nobody is asked for anything."""


def test_prompts_go_before_the_tower_and_the_tower_before_decodes() -> None:
    assert sorted(Priority) == [Priority.PROMPTS, Priority.TOWER, Priority.DECODES]
    assert max(Priority) == 0, "torch knows no lower one"


def test_a_stream_begins_behind_all_that_was_launched_before(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []

    class Stream:
        def __init__(self, device: torch.device, priority: int) -> None:
            said.append(("made", str(device), priority))

    @contextlib.contextmanager
    def use(stream: Stream) -> Iterator[None]:
        said.append("used")
        yield
        said.append("left")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append(("waited", str(device))))
    with own_stream("cuda:1", Priority.TOWER):
        pass
    assert said == [("waited", "cuda:1"), ("made", "cuda:1", -1), "used", "left"]


def test_a_cpu_has_no_streams() -> None:
    with own_stream("cpu", Priority.PROMPTS):
        assert torch.ones(1).sum() == 1


def test_the_towers_thread_and_the_engines_ask_for_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Priority]] = []

    def ask(device: torch.device | str, priority: Priority) -> contextlib.nullcontext[None]:
        asked.append((str(device), priority))
        return contextlib.nullcontext()

    monkeypatch.setattr(tower, "own_stream", ask)
    monkeypatch.setattr(worker, "own_stream", ask)
    thread = tower.Tower(
        NOBODY, batch_patches=1, began=NOBODY, made=NOBODY, gate=OpenGate(), to_host=True, device="cpu",
        vitals=Vitals(NOBODY), picture=NOBODY,
    )  # fmt: skip
    thread.start()
    thread.close()

    async def run() -> None:
        async with Engine(tiny_model("dense"), lambda ids: "", frozenset(), EngineConfig(num_pages=8, token_budget=64)):
            pass

    asyncio.run(run())
    assert asked == [("cpu", Priority.TOWER), ("cpu", Priority.PROMPTS)]
