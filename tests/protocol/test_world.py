"""Both machines, both pools, a bad network and dying peers: safe at every step, finished at the end."""

from __future__ import annotations

import time
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .plans import FAULTS, STRICT, draw
from .world import World

_progress = {"examples": 0, "steps": 0, "since": time.monotonic()}


def _count(world: World) -> None:
    _progress["examples"] += 1
    _progress["steps"] += world.steps
    if _progress["examples"] % 1000 == 0:
        spent = time.monotonic() - _progress["since"]
        print(f"{_progress['examples']} worlds, {_progress['steps']} steps, {spent:.0f} s", flush=True)


@pytest.mark.timeout(0)
@given(st.randoms(use_true_random=False))
def test_every_world_is_safe_and_comes_to_rest(random: Random) -> None:
    """Links are cut, processes crash and freeze, writes fail and bytes are corrupt; no single message is lost."""
    world = World(draw(random, strict=False))
    world.run()
    _count(world)


@pytest.mark.timeout(0)
@given(st.randoms(use_true_random=False))
@settings(max_examples=max(1, settings().max_examples // 2))
def test_items_that_are_hurried_are_as_safe(random: Random) -> None:
    world = World(draw(random, strict=False), hurried=True)
    world.run()
    _count(world)


@pytest.mark.timeout(0)
@given(st.randoms(use_true_random=False))
@settings(max_examples=max(1, settings().max_examples // 2))
def test_single_messages_may_vanish_repeat_or_come_late(random: Random) -> None:
    """More than a link promises: single messages are lost, repeated, and delivered on a later connection."""
    world = World(draw(random, strict=True))
    world.run()
    _count(world)


def test_the_worlds_are_wild_enough() -> None:
    """Every kind of fault strikes and every kind of consequence is seen, so that the tests above mean something."""
    struck: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for seed in range(300):
        world = World(draw(Random(seed)))
        world.run()
        struck.update(world.struck)
        seen.update(world.ended.values())
        for process in world.network.processes.values():
            counters = process.machine.counters
            seen.update(outcome for outcome in ("resent", "refused", "received") if counters.total(outcome))
            seen["hits"] += process.name.startswith("E") and process.machine.sources.hits > 0
        seen["quarantined"] += world.quarantined > 0
        seen["windows"] += world.windows > 1
    assert set(struck) == {*FAULTS, *STRICT}
    for what in ("success", "deadline", "cancelled", "crashed", "bad_media", "resent", "refused", "hits"):
        assert seen[what] >= 2, (what, seen)
    assert seen["quarantined"] >= 10 and seen["windows"] >= 10
