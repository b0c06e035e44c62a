"""In which steps a prompt is computed whose parts come one after another."""

from __future__ import annotations

import itertools
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiodisagg.scheduler.pieces import MOST, plan

PART_S, STEP_S = 1.0, 3.0


def cost(i: int, k: int) -> float:
    return STEP_S + PART_S * (k - i)


def test_one_part_is_computed_when_it_is_there() -> None:
    assert plan([5.0], cost) == (5.0, 9.0)
    assert plan([5.0], cost, since=7.0) == (7.0, 11.0)


def test_two_parts_are_one_step_unless_the_second_takes_longer_than_a_step_costs() -> None:
    assert plan([0.0, 2.9], cost) == (2.9, 7.9)
    first, done = plan([0.0, 3.1], cost)
    assert (first, done) == (0.0, 8.0)
    assert plan([0.0, 100.0], cost) == (0.0, 104.0)


def test_what_comes_while_nothing_can_be_computed_is_one_step() -> None:
    assert plan([0.0, 1.0, 2.0], cost, since=2.0) == (2.0, 8.0)


def _by_trying(at: list[float], since: float) -> float:
    """Every way to cut the parts into steps."""
    best = math.inf
    for count in range(1, len(at) + 1):
        for cuts in itertools.combinations(range(1, len(at)), count - 1):
            edges, done = [0, *cuts, len(at)], since
            for i, k in itertools.pairwise(edges):
                done = max(done, at[k - 1]) + cost(i, k)
            best = min(best, done)
    return best


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=7), st.integers(0, 12))
def test_no_other_way_is_sooner(gaps: list[int], since: int) -> None:
    at = [float(n) for n in itertools.accumulate(gaps)]
    first, done = plan(at, cost, float(since))
    assert done == pytest.approx(_by_trying(at, float(since)))
    assert first >= max(at[0], since)


def test_the_first_of_many_parts_stays_alone() -> None:
    """Sixty frame pairs to come, each far away: what is there is computed at once."""
    first, _ = plan([0.0, *(100.0 * i for i in range(1, 61))], cost)
    assert first == 0.0


def test_of_many_parts_neighbours_are_one() -> None:
    began = time.thread_time()  # of this thread alone: a machine may be busy
    first, done = plan([float(i) for i in range(5000)], cost)
    assert time.thread_time() - began < 1.0
    assert first < 5000 and 5003 < done < 5003 + 5000 / (MOST - 1) + STEP_S * MOST
