"""Media that come faster than the link takes them wait, and those that no frame can hold fail; the link goes on."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from aiodisagg.link.config import LinkConfig
from aiodisagg.protocol.events import LinkLost

from . import pair as module
from .pair import Pair, pair

pytestmark = pytest.mark.anyio
KiB = 1024


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items have files of 256 KiB, but for the first one."""
    plain = module.item_of

    def item_of(seed: int, rows: int) -> object:
        item = plain(seed, rows)
        return dataclasses.replace(item, media=(b"%d" % seed, bytes(256 * KiB))) if seed else item

    monkeypatch.setattr(module, "item_of", item_of)


def losses(made: Pair) -> list[object]:
    """Links that will be lost."""
    lost: list[object] = []
    made.watch(made.receiver.driver, lambda event: lost.append(event) if isinstance(event, LinkLost) else None)
    return lost


async def test_many_large_items_at_once(tmp_path: Path, large: None, no_leaks: None) -> None:
    """Twenty items of 256 KiB are asked for at once over a link that lets 1 MiB wait."""
    config = LinkConfig(high_water_bytes=64 * KiB, max_unsent_bytes=1024 * KiB)
    async with pair(tmp_path, "memory", link=config) as made:
        lost = losses(made)
        await made.fetch([(seed, 4) for seed in range(1, 21)])
        assert not lost


@pytest.mark.parametrize("own", [True, False], ids=["of this side", "of the other side"])
async def test_an_item_larger_than_a_frame_fails_at_once_and_alone(
    own: bool, tmp_path: Path, large: None, no_leaks: None
) -> None:
    """It was asked for until its deadline; where only the other side's frames are that small, every attempt cut the
    link, and with it everybody else's items."""
    small = LinkConfig(max_frame_bytes=128 * KiB)
    links = {"link": small} if own else {"encode_link": small}
    async with pair(tmp_path, "memory", **links) as made:  # type: ignore[arg-type]
        lost = losses(made)
        outcome = await asyncio.gather(made.fetch([(1, 4)]), made.fetch([(0, 4)]), return_exceptions=True)
        assert "too_large: " in str(outcome[0]) and f"do not fit a frame of {128 * KiB}" in str(outcome[0])
        assert outcome[1] and not lost
