"""Slack in virtual time: what a tower may do beside running streams."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiodisagg.scheduler.slack import Slack

MS = 1e-3


def alternate(slack: Slack, step_s: float, batch_s: float, steps: int) -> list[float]:
    """One core: steps and sub-batches take turns. The times between two tokens."""
    gaps = []
    for _ in range(steps):
        gap = step_s
        slack.stepped(step_s, 4)
        while slack.free:
            slack.spent(batch_s)
            gap += batch_s
        gaps.append(gap)
    return gaps


def test_a_tower_runs_freely_while_nothing_decodes() -> None:
    slack = Slack(50 * MS)
    for _ in range(100):
        assert slack.free
        slack.spent(1.0)
    slack.stepped(10 * MS, 4)
    assert slack.free, "what it did before there were streams is not owed to them"
    slack.stepped(10 * MS, 0)  # prefill alone
    assert slack.free


def test_tokens_come_within_the_budget_and_one_sub_batch() -> None:
    slack = Slack(50 * MS)
    gaps = alternate(slack, step_s=20 * MS, batch_s=7 * MS, steps=200)
    assert max(gaps) <= (50 + 7) * MS
    assert sum(gaps) / len(gaps) == pytest.approx(50 * MS, rel=0.05)  # and the slack is used, not wasted


def test_a_sub_batch_longer_than_the_budget_is_paid_for_by_the_steps_that_follow() -> None:
    slack = Slack(50 * MS)
    gaps = alternate(slack, step_s=20 * MS, batch_s=300 * MS, steps=100)
    stalls = [i for i, gap in enumerate(gaps) if gap > 21 * MS]
    assert all(gap < 321 * MS for gap in gaps)
    assert {after - before for before, after in pairwise(stalls)} <= {9, 10}  # 30 ms a step
    assert sum(gaps) / len(gaps) == pytest.approx(50 * MS, rel=0.1)


def test_slow_streams_leave_the_tower_its_share() -> None:
    """Steps that take longer than the budget leave nothing, but who waits for an image must not wait for ever."""
    slack = Slack(50 * MS, share=0.5)
    gaps = alternate(slack, step_s=80 * MS, batch_s=10 * MS, steps=100)
    assert sum(gaps) / len(gaps) == pytest.approx(120 * MS, rel=0.05)


def test_slack_is_not_hoarded() -> None:
    """Text requests decoded for a while; then images come."""
    slack = Slack(50 * MS)
    for _ in range(1000):
        slack.stepped(10 * MS, 4)
    gap = 0.0
    while slack.free:
        slack.spent(10 * MS)
        gap += 10 * MS
    assert gap <= 60 * MS


def test_what_is_owed_is_forgotten_when_the_last_stream_ends() -> None:
    slack = Slack(50 * MS)
    slack.stepped(10 * MS, 1)
    slack.spent(5.0)
    assert not slack.free
    slack.stepped(0.0, 0)
    assert slack.free and slack.earned_s == 0


@given(st.lists(st.floats(0.001, 0.2), min_size=1, max_size=50), st.floats(0.001, 0.3))
def test_any_steps_in_a_row_hold_no_more_tower_than_they_earn(steps: list[float], batch_s: float) -> None:
    budget = 50 * MS
    slack = Slack(budget)
    spent: list[float] = []
    for step_s in steps:
        slack.stepped(step_s, 3)
        before = slack.earned_s
        while slack.free:
            slack.spent(batch_s)
        spent.append(before - slack.earned_s)
    for i in range(len(steps)):
        for j in range(i + 1, len(steps) + 1):
            earned = sum(max(budget - step_s, 0.5 * step_s) for step_s in steps[i:j])
            assert sum(spent[i:j]) <= earned + max(budget, 0.1) + batch_s + 1e-9


@pytest.mark.parametrize("settings", [{"inter_token_s": 0.0}, {"inter_token_s": 0.05, "share": 0.0}])
def test_a_budget_under_which_nothing_would_be_encoded_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above zero"):
        Slack(**settings)
