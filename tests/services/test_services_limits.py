"""What a request is refused or given before and after its turn: its length, and time for rows that were lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aiodisagg import ImagePart
from aiodisagg.errors import PromptTooLong
from aiodisagg.language.trace import Traces
from tests.models.halves import chat, png
from tests.services.system import PATIENCE_S, system

pytestmark = pytest.mark.anyio


async def test_a_prompt_that_is_too_long_is_refused_though_no_encode_peer_is_there(moe: Path) -> None:
    async with system(moe, encoders=0, peer_wait_s=PATIENCE_S) as made, asyncio.timeout(PATIENCE_S / 2):
        with pytest.raises(PromptTooLong):
            await made.ask(chat(ImagePart(png(64, 64, 1)), "?"), 1 << 30)


async def test_nothing_is_made_of_a_prompt_that_is_too_long(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_positions(*_: Any, **__: Any) -> Any:
        raise AssertionError("positions of all of it")

    async with system(moe) as made:
        monkeypatch.setattr("aiodisagg.models.plan.mrope_positions", no_positions)
        with pytest.raises(PromptTooLong):
            await made.ask(chat("word " * (made.language.engine.limit + 1)), 1)


@pytest.mark.parametrize(("first_token_s", "left_s"), [(-1.0, 0.001), (2.0, 321.0)])
async def test_rows_that_were_lost_in_mid_answer_have_time_to_come_again(
    moe: Path, monkeypatch: pytest.MonkeyPatch, first_token_s: float, left_s: float
) -> None:
    """``timeout_s`` was until the last row is here, and it was."""
    async with system(moe, request_timeout_s=321.0) as made:
        language, seen = made.language, list[float]()
        plan = language._planner.plan(chat(ImagePart(png(64, 64, 1)), "?"))
        trace = Traces().begin("r")
        trace.born -= 60.0
        trace.admitted_s, trace.first_token_s = 1.0, first_token_s
        monkeypatch.setattr(language.rows, "request", lambda asked, left_s: seen.append(left_s))
        monkeypatch.setattr(language, "_items", SimpleNamespace(add=lambda key, item: None))
        request: Any = SimpleNamespace(room="room", keys=[], priority=0)
        language._ask(None, plan, request, trace, 10.0, [0])  # type: ignore[arg-type]
        assert seen == [left_s]
        monkeypatch.undo()
