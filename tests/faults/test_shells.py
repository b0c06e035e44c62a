"""Worlds of several language and encode peers with their real shells, as those of ``tests/protocol`` with machines."""

from __future__ import annotations

import asyncio
import logging
import random as chance
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import pytest

from aiodisagg.encode import service
from aiodisagg.language import sharing, take
from aiodisagg.peer import planes

from .shells import Shells
from .virtual import TimedPipeline, VirtualLoop, WildTransport

WORLDS = 16
EXPECTED = ("rows could not be delivered", "wrong checksum", "is poison")


def run(seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Shells:
    random = Random(seed)
    chance.seed(seed)
    world = Shells(seed, folder, random)
    monkeypatch.setattr(service, "EncodePipeline", partial(TimedPipeline, world.weather))
    monkeypatch.setattr(planes, "make_transport", lambda *_: WildTransport(world.weather))
    monkeypatch.setattr(take, "INLINE_BYTES", 0)
    monkeypatch.setattr(sharing, "INLINE_BYTES", 0)
    loop = VirtualLoop(random)
    loop.set_exception_handler(lambda _, context: world.problems.append(str(context)))
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(world.run())
    return world


@pytest.mark.timeout(300)
def test_whatever_happens_to_shells_every_item_ends_once_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: None, caplog: pytest.LogCaptureFixture
) -> None:
    ends: Counter[str] = Counter()
    struck: Counter[str] = Counter()
    for seed in range(WORLDS):
        caplog.clear()
        world = run(seed, tmp_path, monkeypatch)
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        assert not [line for line in said if not any(expected in line for expected in EXPECTED)], seed
        assert not world.problems, seed
        struck += world.struck
        for words in world.words:
            ends.update(words.ends.values())
    assert len(struck) == 6 and ends["success"] > 10 * WORLDS and ends["deadline"], (struck, ends)
