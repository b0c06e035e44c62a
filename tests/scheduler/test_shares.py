"""Shares of tenants that want different things: what one has had of one lane counts in the other, within reason."""

from __future__ import annotations

import random

import pytest

from aiodisagg.scheduler.admission import AdmissionConfig, AdmissionQueue
from aiodisagg.scheduler.prices import Work
from aiodisagg.scheduler.shares import DEBT_S, Tenant
from tests.scheduler.lines import ALICE, BOB, PICTURE, Front
from tests.scheduler.services import Service

WORDS = Work(2_000)
"""Text that costs as much as PICTURE: 0.042 s."""
CAROL = Tenant("carol")


def both(**config: float) -> Front:
    """One request at a time in each lane, at prices that stay what they are: no time goes by."""
    front = Front.of(10_000, min_in_flight=1, **config)
    assert front.price(WORDS) == pytest.approx(front.price(PICTURE)) == pytest.approx(0.042)
    return front


def fill(front: Front, name: str, count: int, work: Work, tenant: Tenant) -> None:
    for n in range(count):
        front.arrive(f"{name}{n}", work, tenant)


def text(front: Front, name: str, *numbers: int) -> None:
    for n in numbers:
        assert len(front.token(f"{name}{n}")) <= 1


def test_service_in_the_other_lane_takes_no_credit_from_those_that_wait() -> None:
    """Bob's text went ahead of the virtual time, which took Alice along: it was as if she had had as much."""
    front = both()
    fill(front, "a", 8, PICTURE, ALICE)
    fill(front, "b", 8, PICTURE, BOB)
    fill(front, "t", 6, WORDS, BOB)
    text(front, "t", *range(4))  # and a fifth is released
    # Of pictures, Alice has one more than Bob; of all, Bob has four more than she.
    assert " ".join(front.order("a0")) == "a0 a1 a2 a3 a4 a5 b0 a6 b1 a7 b2 b3 b4 b5 b6 b7"


def test_who_comes_to_a_lane_is_not_behind_for_what_happened_in_the_other() -> None:
    front = both()
    fill(front, "b", 60, WORDS, BOB)
    fill(front, "a", 8, PICTURE, ALICE)
    text(front, "b", *range(50))
    fill(front, "c", 3, PICTURE, CAROL)
    assert front.order("a0")[:6] == ["a0", "c0", "a1", "c1", "a2", "c2"]


def test_what_no_other_wanted_is_no_debt() -> None:
    """Bob had the engine to himself before he brought pictures."""
    front = both()
    fill(front, "t", 200, WORDS, BOB)
    text(front, "t", *range(199))
    front.token("t199")
    fill(front, "a", 5, PICTURE, ALICE)
    fill(front, "b", 3, PICTURE, BOB)
    assert front.order("a0") == ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "a4"]


def test_a_debt_has_an_end() -> None:
    """Bob's one picture waits while his text is served; then it waits for ``DEBT_S`` of Alice's, and for no more."""
    front = both(max_queue=10_000)
    fill(front, "a", 400, PICTURE, ALICE)
    fill(front, "b", 1, PICTURE, BOB)
    fill(front, "t", 800, WORDS, BOB)
    text(front, "t", *range(799))  # 33.6 s
    before = front.order("a0").index("b0")
    assert before == pytest.approx(DEBT_S / 0.042, abs=3)


def test_where_places_are_short_they_are_shared() -> None:
    """Alice wants the tower only and Bob the engine only; there is room in both, but for two requests behind them."""
    front = Front.of(2, min_in_flight=100)
    four = Work(4_000, 16_000)
    assert front.price(four) == pytest.approx(0.162)
    fill(front, "a", 6, four, ALICE)
    fill(front, "b", 12, WORDS, BOB)
    order = ["a0", "a1"]
    for name in order:
        order += front.end(name)
        if len(order) == 14:
            break
    assert [name[0] for name in order] == list("aabbbbabbbbabb")  # four of 0.042 s for one of 0.162 s


def test_the_weight_is_the_one_given_last() -> None:
    front = both()
    fill(front, "t", 1, WORDS, ALICE)  # of 1, and open all the time
    fill(front, "a", 6, PICTURE, Tenant("alice", 2.0))
    fill(front, "b", 3, PICTURE, BOB)
    assert [name[0] for name in front.order("a0")] == list("abaabaaba")


@pytest.mark.parametrize("weight", [0.3, 0.6])
@pytest.mark.parametrize("spread", [0.1, 0.9])
def test_one_that_uses_both_lanes_leaves_the_tower_to_one_that_wants_only_that(weight: float, spread: float) -> None:
    """Alice asks for pictures only, Bob for pictures and text, all the time. For however long, what they are charged
    for stays together; while text took Alice's credit, she fell behind by a third of the time that passed."""
    rng, free = random.Random(1), [0.0, 0.0]

    def serve(service: Service, name: str, now: float) -> None:
        _, work, _ = service.arrived[name]
        lane = work.patches > 0
        free[lane] = max(free[lane], now) + (work.patches / 50_000 if lane else work.tokens / 100_000)
        service.at(free[lane], lambda: service.done(name))

    def ask(tenant: Tenant, has_media: bool) -> None:
        size = rng.uniform(1 - spread, 1 + spread)
        work = Work(int(10_000 * size), int(40_000 * size)) if has_media else Work(int(20_000 * size))
        service.arrive(work, tenant)

    alice = Tenant("alice", weight)
    service = Service(AdmissionQueue(AdmissionConfig(), 64), serve)
    service.after = lambda name: ask(service.arrived[name][2], service.arrived[name][1].patches > 0)
    for _ in range(20):
        ask(alice, True)
        ask(BOB, True)
        ask(BOB, False)
    service.run(50)
    service.forget()
    behind_s = []
    for until in range(75, 1050, 25):
        service.run(until)
        behind_s.append(service.charged_s["bob"] - service.charged_s["alice"] / weight)
    largest_s = 0.8 * (1 + spread)
    assert max(behind_s) - min(behind_s) <= 2 * largest_s * (1 + 1 / weight)
    assert service.charged_s["alice"] > 200 * weight  # and the tower was shared indeed
