"""A chat goes on: pictures whose pages are still there are neither asked for, encoded nor sent."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import pytest

from aiodisagg.errors import NoEncodePeer
from aiodisagg.models.base import ImagePart
from tests.models.halves import chat, png
from tests.models.halves import truth as true_tokens
from tests.services.system import System, system

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

TOKENS = 8
truth = functools.partial(true_tokens, tokens=TOKENS)
FIRST = chat(ImagePart(png(96, 128, 21)), "A harbour, early in the day. What do you see in it?")
TURN = [*FIRST, *chat("Boats, and a man who mends a net.", role="assistant")]


def counts(made: System) -> tuple[int, int, int]:
    """(items encoded, items found at the encode peer, bytes of rows received)."""
    (encoder,) = made.encoders
    received = made.language.receiver.counters.total("received")
    return encoder.pipeline.items_encoded, encoder.sender.sources.hits, received


def stages(made: System) -> list[str]:
    return [item.stage for item in made.language.traces.recent()[-1].items]


async def test_a_second_turn_costs_no_vision(moe: Path) -> None:
    again = [*TURN, *chat("Which of them is the largest?")]
    with_new = [*TURN, *chat("And in this one?", ImagePart(png(64, 64, 22)))]
    async with system(moe) as made:
        assert await made.ask(FIRST, TOKENS) == truth(moe, FIRST)
        before = counts(made)
        assert before[0] == 1 and stages(made) == ["complete"]
        assert await made.ask(again, TOKENS) == truth(moe, again)
        assert counts(made) == before and stages(made) == ["reused"]
        assert await made.ask(with_new, TOKENS) == truth(moe, with_new)
        row_bytes = made.language.rows.layout.row_bytes
        assert counts(made) == (2, 0, before[2] + 4 * row_bytes) and stages(made) == ["reused", "complete"]
        found = dict(line.rsplit(" ", 1) for line in made.language.metrics().splitlines() if not line.startswith("#"))
    assert float(found["aiodisagg_prefix_hits_total"]) == 2
    assert float(found["aiodisagg_prefix_tokens_total"]) >= 2 * 16 and float(found["aiodisagg_kv_pages_idle"]) > 0


async def test_a_chat_whose_pictures_are_in_pages_goes_on_without_encode_peers(moe: Path) -> None:
    again, other = [*TURN, *chat("Which of them is the largest?")], chat(ImagePart(png(96, 128, 23)), "And here?")
    async with system(moe, cache_bytes=0, peer_wait_s=0.05, failover_s=0.0) as made:
        assert await made.ask(FIRST, TOKENS) == truth(moe, FIRST)
        async with asyncio.timeout(30):
            await made.encoders.pop().__aexit__(None, None, None)
            await made.linked(0)
            assert await made.ask(again, TOKENS) == truth(moe, again)
            held = [made.language.engine.held(*made.language._plan(one)) for one in (again, other, chat("Hi"))]
            picture = made.language._plan(again)[0].items[0]
            assert held[0] >= picture.spans[-1][1] and held[0] % 16 == 0 and held[1:] == [0, 0]
            for asked in ([*again, *other], other):
                with pytest.raises(NoEncodePeer):
                    await made.ask(asked, TOKENS)
    async with system(moe, cache_bytes=0, prefix_cache=False, peer_wait_s=0.05, failover_s=0.0) as made:
        assert await made.ask(FIRST, TOKENS) == truth(moe, FIRST)
        async with asyncio.timeout(30):
            await made.encoders.pop().__aexit__(None, None, None)
            await made.linked(0)
            assert made.language.engine.held(*made.language._plan(again)) == 0
            with pytest.raises(NoEncodePeer):
                await made.ask(again, TOKENS)


async def test_pages_that_are_gone_when_their_prompt_is_let_in(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for an encode peer then as any other, and no longer."""
    async with system(moe, cache_bytes=0, peer_wait_s=0.05, failover_s=0.0) as made:
        async with asyncio.timeout(30):
            await made.encoders.pop().__aexit__(None, None, None)
            await made.linked(0)
            monkeypatch.setattr(made.language.engine, "held", lambda plan, keys: plan.tokens - 1)
            with pytest.raises(NoEncodePeer):
                await made.ask(FIRST, TOKENS)
        assert made.language.engine.stats().running == 0


async def test_another_picture_of_the_same_size_is_another_prompt(moe: Path) -> None:
    other = chat(ImagePart(png(96, 128, 23)), "A harbour, early in the day. What do you see in it?")
    async with system(moe) as made:
        assert await made.ask(FIRST, TOKENS) == truth(moe, FIRST)
        assert await made.ask(other, TOKENS) == truth(moe, other)
        assert counts(made)[0] == 2


@pytest.mark.parametrize("overlap", [True, False])
async def test_what_measurements_switch_off_changes_no_answer(moe: Path, overlap: bool) -> None:
    async with system(moe, prefix_cache=False, cache_bytes=0, overlap=overlap, itl_budget_ms=0.0) as made:
        for _ in range(2):
            assert await made.ask(FIRST, TOKENS) == truth(moe, FIRST)
        assert counts(made)[1] == 1 and stages(made) == ["complete"]
        assert made.language.engine.stats().tokens_reused == 0
