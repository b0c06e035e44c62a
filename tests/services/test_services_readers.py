"""Readers that are slow to take their answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from aiodisagg import SamplingParams
from aiodisagg.models.base import ImagePart
from tests.models.halves import chat, png
from tests.services.system import PATIENCE_S, eventually, system

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


async def test_readers_that_pause_hold_up_nobody_once_the_engine_is_done_with_their_answers(moe: Path) -> None:
    """They kept their turns: an idle engine, and a line before it that nobody left."""
    async with system(moe, max_running=2) as made:
        language = made.language
        sampling = SamplingParams(max_tokens=8, ignore_eos=True)
        messages = [chat(ImagePart(png(64, 64, n)), "What is it?") for n in range(2)]
        paused = [language.generate(one, sampling, request_id=f"r{n}") for n, one in enumerate(messages)]
        found = [list((await anext(deltas)).token_ids) for deltas in paused]
        async with asyncio.timeout(PATIENCE_S):
            assert len(await made.ask(chat("the third"), 4)) == 4
        await eventually(lambda: not language.engine.stats().running and not language._items._open)
        assert list(language.traces.open) == ["r0", "r1"], "their answers are not out"
        for tokens, deltas in zip(found, paused, strict=True):
            tokens += [token async for delta in deltas for token in delta.token_ids]
        assert [len(tokens) for tokens in found] == [8, 8]
        await made.quiet()
        assert [trace.output_tokens for trace in language.traces.recent()] == [4, 8, 8]
