"""What prices learn: the scale at once, the parts with time, and to be lower from anything."""

from __future__ import annotations

import random

import pytest

from aiodisagg.scheduler.admission import Shed
from aiodisagg.scheduler.prices import Prices, Work
from tests.scheduler.lines import PICTURE, TEXT, Front

TRUE = (0.05, 3e-4, 2e-5)


def true_cost(work: Work) -> float:
    return work.requests * TRUE[0] + work.tokens * TRUE[1] + work.patches * TRUE[2]


def test_the_first_lesson_sets_the_scale() -> None:
    prices = Prices()
    work = Work(8_000, 32_000, 8)
    ratio = prices.patch_s / prices.token_s
    prices.observe(1000.0, Work(4_000, 16_000, 7), saturated=True)
    assert not prices.known
    prices.observe(1000.0, Work(4_000, 16_000, 1), saturated=True)
    assert prices.known and prices.of(work) == pytest.approx(2000.0)
    assert prices.patch_s / prices.token_s == pytest.approx(ratio)


def test_a_mix_teaches_what_each_part_costs() -> None:
    rng = random.Random(1)
    prices = Prices()
    for _ in range(2_000):
        work = Work(rng.choice((50, 4_000)), rng.choice((0, 30_000)))
        prices.observe(true_cost(work), work, saturated=True)
    for work in (Work(4_000), Work(4_000, 30_000), Work(8_000, 60_000)):
        assert prices.of(work) == pytest.approx(true_cost(work), rel=0.1)


def test_one_odd_interval_moves_prices_by_a_bounded_factor() -> None:
    prices = Prices()
    work = Work(8_000, 0, 8)
    prices.observe(prices.of(work), work, saturated=True)
    before = prices.of(work)
    prices.observe(1e9, work, saturated=True)
    assert before < prices.of(work) < 2 * before
    prices.observe(1e-9, work, saturated=True)
    prices.observe(1e-9, work, saturated=True)
    assert before / 2 < prices.of(work) < before


def test_an_idle_service_can_only_lower_prices() -> None:
    prices = Prices()
    work = Work(8_000, 0, 8)
    prices.observe(1.0, work, saturated=False)
    assert not prices.known
    prices.observe(10.0, work, saturated=True)
    prices.observe(100.0, work, saturated=False)
    assert prices.of(work) == pytest.approx(10.0)
    for _ in range(50):
        prices.observe(4.0, work, saturated=False)
    assert prices.of(work) == pytest.approx(4.0, rel=0.05)


def learned(front: Front) -> bool:
    return front.queue.lanes[True].prices.known


def test_only_intervals_with_somebody_waiting_set_prices() -> None:
    front = Front.of(min_in_flight=1)
    for n in range(30):
        front.arrive(str(n))
        front.token(str(n), after=2.0)
    assert not learned(front)
    for n in range(30, 50):
        front.arrive(str(n))
    for n in range(30, 39):
        front.token(str(n), after=2.0)  # the first begins the first interval
    assert learned(front)
    assert front.price(PICTURE) == pytest.approx(2.0)


def test_an_interval_in_which_nobody_waited_for_a_while_is_not_saturated() -> None:
    front = Front.of(min_in_flight=1)
    front.arrive("0")
    for n in range(30):
        front.tick(100.0)
        front.arrive(str(n + 1))
        assert front.token(str(n)) == [str(n + 1)]
    assert not learned(front)


def test_waiting_for_a_place_in_the_engine_is_part_of_the_price() -> None:
    front = Front.of(max_running=1)
    for n in range(20):
        front.arrive(str(n))
    for n in range(10):
        front.token(str(n), after=1.0)
        front.end(str(n), after=3.0)
    assert front.price(PICTURE) == pytest.approx(4.0)


def test_intervals_in_which_somebody_gave_up_teach_nothing() -> None:
    front = Front.of(min_in_flight=2)
    for n in range(60):
        front.arrive(str(n))
    for n in range(0, 40, 2):
        front.end(str(n), after=50.0)
        front.token(str(n + 1), after=2.0)
    assert not learned(front)
    for n in range(40, 50):
        front.token(str(n), after=2.0)
    assert front.price(PICTURE) == pytest.approx(2.0)


def test_the_latency_of_an_idle_service_is_no_price_but_part_of_the_prediction() -> None:
    front = Front.of(known=True)
    cost_s = front.price(TEXT)
    for n in range(100):
        front.arrive(str(n), TEXT)
        front.token(str(n), after=1.0)
        front.end(str(n))
    assert front.price(TEXT) == pytest.approx(cost_s)
    front.arrive("one", TEXT)
    (shed,) = front.arrive("hurried", TEXT, within=0.9)
    assert isinstance(shed, Shed) and shed.reason == "predicted"
    assert not isinstance(front.arrive("patient", TEXT, within=1.1)[0], Shed)
