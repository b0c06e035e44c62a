"""Media that come faster than the link takes them wait; they do not end the link."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from aiodisagg.link.config import LinkConfig

from .pair import pair

pytestmark = pytest.mark.anyio
KiB = 1024


async def test_many_large_items_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    """Twenty items of 256 KiB are asked for at once over a link that lets 1 MiB wait."""
    config = LinkConfig(high_water_bytes=64 * KiB, max_unsent_bytes=1024 * KiB)
    from . import pair as module

    plain = module.item_of
    monkeypatch.setattr(
        module,
        "item_of",
        lambda seed, rows: dataclasses.replace(plain(seed, rows), media=(b"%d" % seed, bytes(256 * KiB))),
    )
    async with pair(tmp_path, "memory", link=config) as made:
        lost: list[object] = []
        made.watch(
            made.receiver.driver, lambda event: lost.append(event) if type(event).__name__ == "LinkLost" else None
        )
        await made.fetch([(seed, 4) for seed in range(1, 21)])
        assert not lost
