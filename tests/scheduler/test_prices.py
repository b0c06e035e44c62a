"""What prices learn: the scale at once, the parts with time, and to be lower from anything."""

from __future__ import annotations

import random

import pytest

from aiodisagg.scheduler.admission import Shed
from aiodisagg.scheduler.prices import NOTHING, Prices, Round, Work
from tests.scheduler.lines import PICTURE, TEXT, Front

TRUE = (0.05, 3e-4, 2e-5)


def true_cost(work: Work) -> float:
    return work.requests * TRUE[0] + work.tokens * TRUE[1] + work.patches * TRUE[2]


def test_the_first_lesson_sets_the_scale() -> None:
    prices = Prices()
    work = Work(8_000, 32_000, 8)
    ratio = prices.patch_s / prices.token_s
    prices.observe(Round(2000.0, work), saturated=True)
    assert prices.known and prices.of(work) == pytest.approx(2000.0)
    assert prices.patch_s / prices.token_s == pytest.approx(ratio)


def test_a_mix_teaches_what_each_part_costs() -> None:
    rng = random.Random(1)
    prices = Prices()
    for _ in range(250):
        works = [Work(rng.choice((50, 4_000)), rng.choice((0, 30_000))) for _ in range(8)]
        prices.observe(Round(sum(map(true_cost, works)), sum(works, NOTHING)), saturated=True)
    for work in (Work(4_000), Work(4_000, 30_000), Work(8_000, 60_000)):
        assert prices.of(work) == pytest.approx(true_cost(work), rel=0.1)


def test_one_odd_lesson_moves_prices_by_a_bounded_factor() -> None:
    prices = Prices()
    work = Work(8_000, 0, 8)
    prices.observe(Round(prices.of(work), work), saturated=True)
    before = prices.of(work)
    prices.observe(Round(1e9, work), saturated=True)
    assert before < prices.of(work) < 2 * before
    prices.observe(Round(1e-9, work), saturated=True)
    prices.observe(Round(1e-9, work), saturated=True)
    assert before / 2 < prices.of(work) < before


def test_an_idle_service_can_only_lower_prices() -> None:
    prices = Prices()
    work = Work(8_000, 0, 8)
    prices.observe(Round(1.0, work), saturated=False)
    assert not prices.known
    prices.observe(Round(10.0, work), saturated=True)
    prices.observe(Round(100.0, work), saturated=False)
    assert prices.of(work) == pytest.approx(10.0)
    for _ in range(50):
        prices.observe(Round(4.0, work), saturated=False)
        prices.observe(Round(100.0, work), saturated=False)
    assert prices.of(work) == pytest.approx(4.0, rel=0.12)


@pytest.mark.parametrize("off", [0.1, 0.5, 0.8])
def test_what_is_little_too_high_takes_longer_to_be_found_out(off: float) -> None:
    prices = Prices()
    work = Work(8_000, 0, 8)
    prices.observe(Round(1.0, work), saturated=True)
    for rounds, rest in ((5, 1.4), (45, 1.12), (150, 1.07)):
        for _ in range(rounds):
            prices.observe(Round(off, work), saturated=False)
        assert off <= prices.of(work) <= rest * off


def test_what_was_long_ago_does_not_hide_that_it_is_faster_now() -> None:
    prices = Prices()
    work = Work(8_000, 0, 8)
    prices.observe(Round(1.0, work), saturated=True)
    for took_s, rounds in ((1.0, 2_000), (0.5, 200)):
        for _ in range(rounds):
            prices.observe(Round(took_s, work), saturated=False)
    assert prices.of(work) == pytest.approx(0.5, rel=0.1)


def test_chance_does_not_lower_the_prices_of_an_idle_service() -> None:
    """Every other round is cheap by chance; with each of them as a reason the price was soon that of the cheapest."""
    rng = random.Random(2)
    prices = Prices()
    work = Work(8_000, 0, 8)
    prices.observe(Round(1.0, work), saturated=True)
    for _ in range(3_000):
        prices.observe(Round(sum(rng.uniform(0.0, 0.25) for _ in range(8)), work), saturated=False)
    assert prices.of(work) == pytest.approx(1.0, rel=0.1)


# -- what is a lesson -------------------------------------------------------------------------------------------


def step(front: Front, names: list[str], after: float, gap: float = 0.0) -> list[str]:
    """First tokens of one step of an engine, ``gap`` apart; who is released by that."""
    found = front.token(names[0], after)
    for name in names[1:]:
        found += front.token(name, gap)
    return found


@pytest.mark.parametrize("gap", [0.0, 1e-4, 1e-3])
@pytest.mark.parametrize("per_step", [3, 8, 11, 32])
def test_a_step_with_many_first_tokens_is_one_interval(per_step: int, gap: float) -> None:
    """Lessons of eight were of 7 gaps mostly, and of one step now and then: the price of 32 in 0.2 s was a gap's."""
    front = Front.of(10_000, min_in_flight=2 * per_step, window_s=1e-9, max_queue=10_000)
    for n in range(4_000):
        front.arrive(str(n), TEXT)
    for n in range(0, 2_000 // per_step * per_step, per_step):
        step(front, [str(n + i) for i in range(per_step)], 0.2, gap)
    assert front.price(TEXT) == pytest.approx((0.2 + (per_step - 1) * gap) / per_step, rel=0.05)


def test_an_idle_step_with_many_first_tokens_is_one_interval() -> None:
    """All that came meanwhile goes into the next step, and nobody waits."""
    front = Front.of(known=True, min_in_flight=100)
    front.queue.lanes[False].prices.token_s *= 1_000
    for n in range(2_000):
        for i in range(20):
            front.arrive(f"{n}.{i}", TEXT)
        step(front, [f"{n}.{i}" for i in range(20)], 0.2, 1e-4)
        for i in range(20):
            front.end(f"{n}.{i}")
    assert front.price(TEXT) == pytest.approx(0.2019 / 20, rel=0.1)


def test_a_lesson_bears_that_nobody_waits_for_a_moment() -> None:
    front = Front.of(min_in_flight=1)
    front.arrive("0")
    front.arrive("1")
    for n in range(20):
        front.token(str(n), after=1.0)  # the next is released: nobody waits
        front.tick(0.05)
        front.arrive(str(n + 2))
    assert front.price(PICTURE) == pytest.approx(1.05)


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
