"""How many requests at once: a service that does more with more gets more, one that does not gets no more for long."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest

from aiodisagg.scheduler.lanes_breadth import Breadth
from aiodisagg.scheduler.prices import Prices, Round, Work
from tests.scheduler.services import Steps, Towers, closed, open_loop

# -- services ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 12, 32])
@pytest.mark.parametrize("item_s", [0.5, 2.0])
def test_all_towers_work_and_little_waits_for_them(count: int, item_s: float) -> None:
    """With a window of 1 s and a price that falls as more are in flight, eight items of more than 1 s were all there
    ever was: a quarter of 32 towers."""
    service = closed(Towers(count, item_s), clients=100)
    service.run(60 * item_s)
    service.forget()
    service.run(150 * item_s)
    assert service.rate >= 0.94 * count / item_s
    assert service.number <= max(14, 1.6 * count, 1.1 * count / item_s)


@pytest.mark.parametrize(
    ("count", "item_s", "max_ttft_s"), [(16, 1.5, 5.0), (16, 1.0, 3.0), (16, 1.5, 2.5), (32, 1.5, 2.5), (16, 1.5, 1.9)]
)
def test_a_limit_on_first_tokens_keeps_no_tower_idle(count: int, item_s: float, max_ttft_s: float) -> None:
    service = open_loop(Towers(count, item_s), 1.3 * count / item_s, max_ttft_s=max_ttft_s)
    service.run(150 * item_s)
    service.forget()
    service.run(300 * item_s)
    assert service.rate >= 0.92 * count / item_s
    assert service.lates <= 0.2 * service.fates["served"]


@pytest.mark.parametrize("gap_s", [0.0, 5e-5, 2e-4, 1e-3])
def test_a_limit_on_first_tokens_keeps_no_step_empty(gap_s: float) -> None:
    """Up to 32 prompts a step of 0.2 s: eight at a time are a quarter of that, at four times the price."""
    service = open_loop(Steps(32, 0.2, gap_s), 240, Work(60), max_ttft_s=0.6)
    service.run(40)
    service.forget()
    service.run(60)
    true_s = (0.2 + 32 * gap_s) / 32
    assert service.rate >= 0.94 / true_s
    assert service.queue.lanes[0].prices.of(Work(60)) == pytest.approx(true_s, rel=0.1)
    assert service.lates <= 0.05 * service.fates["served"]


def test_when_towers_go_less_is_let_through() -> None:
    towers = Towers(32, 2.0)
    service = closed(towers, clients=100)
    service.run(100)
    assert len(service.queue.lanes[True]) == 32
    towers.count, towers.free_at = 4, towers.free_at[-4:]
    service.run(1000)
    service.forget()
    service.run(1600)
    assert service.rate >= 0.94 * 4 / 2.0 and service.number <= 14


def test_when_towers_come_they_are_found() -> None:
    towers = Towers(4, 2.0)
    service = closed(towers, clients=100)
    service.run(2000)
    towers.count = 24
    service.run(3000)
    service.forget()
    service.run(3200)
    assert service.rate >= 0.9 * 24 / 2.0


# -- trials -----------------------------------------------------------------------------------------------------

PRICE = Prices().of


def rounds(breadth: Breadth, count: int, rate: float, *, number: float | None = None) -> list[int]:
    """The limits after rounds at ``rate`` a second, with as many in flight as the limit or ``number``."""
    limits = []
    for _ in range(count):
        in_flight = breadth.limit if number is None else number
        work = Work(1_000 * 64, 4_000 * 64, 64)
        breadth.ended(Round(64 / rate, work, in_flight * 64 / rate), PRICE)
        limits.append(breadth.limit)
    return limits


def test_while_the_rate_grows_so_does_the_number_and_no_further() -> None:
    breadth = Breadth(8, 64, window_s=1.0, half_s=math.inf)
    found = []
    for _ in range(8):
        found += rounds(breadth, 1, min(breadth.limit, 32) / 2.0)
    assert found == [16, 16, 32, 32, 64, 64, 64, 32]  # one round settles, and the last took two to say no


def test_a_little_faster_is_a_matter_of_many_rounds() -> None:
    """A quarter more could be chance, of so few; but ten are found to be right in the end."""
    breadth = Breadth(8, 64, window_s=1.0, half_s=math.inf)
    limits = []
    for _ in range(200):
        limits += rounds(breadth, 1, min(breadth.limit, 10) / 2.0)
    assert limits[:10] == [16] * 9 + [8]
    assert statistics.mode(limits[-100:]) == 10


def test_trials_that_fail_become_rare_and_alternate() -> None:
    breadth = Breadth(8, 64, window_s=1.0, half_s=math.inf)
    limits = rounds(breadth, 200, 4.0)
    began = [n for n in range(1, 200) if limits[n] > limits[n - 1]]
    assert set(limits) == {8, 16}  # nothing below what was configured
    assert [later - earlier for earlier, later in itertools.pairwise(began)] == [8, 12, 20, 36, 68]


def test_below_what_was_configured_only_for_the_limit_on_first_tokens() -> None:
    breadth = Breadth(8, 64, window_s=0.1, half_s=0.5)
    assert min(rounds(breadth, 100, 20.0)) == 8  # 0.4 s
    assert breadth.limit == 8
    assert min(rounds(breadth, 400, 10.0)) == 5  # 0.8 s, 0.5 s


def test_a_trial_that_too_few_come_for_goes_on_until_it_is_one() -> None:
    breadth = Breadth(8, 64, window_s=1.0, half_s=math.inf)
    assert rounds(breadth, 1, 4.0) == [16]
    assert rounds(breadth, 50, 4.0, number=8.0) == [16] * 50
    assert rounds(breadth, 2, 4.0) == [16, 8]


def test_a_number_that_nobody_needs_is_not_tried() -> None:
    breadth = Breadth(8, 64, window_s=1.0, half_s=math.inf)
    assert rounds(breadth, 20, 4.0, number=5.0) == [8] * 20  # fewer come
    assert rounds(breadth, 20, 9.0) == [8] * 20  # the window lets more through anyway


def test_the_first_guess_fits_into_half_of_the_limit_until_something_was_tried() -> None:
    breadth = Breadth(8, 64, window_s=0.25, half_s=0.5)
    for price_s, limit in ((0.1, 5), (0.01, 8), (9.0, 1), (0.2, 3)):
        breadth.guess(price_s)
        assert breadth.limit == limit
    rounds(breadth, 1, 3 / 1.5)
    assert breadth.limit == 6
    breadth.guess(9.0)
    assert breadth.limit == 6


def test_without_a_limit_nothing_is_guessed() -> None:
    breadth = Breadth(8, 64, window_s=1.0, half_s=math.inf)
    breadth.guess(100.0)
    assert breadth.limit == 8


def test_other_work_in_a_trial_is_compared_by_its_price() -> None:
    """Half as many requests, of nearly four times the work."""
    breadth = Breadth(8, 64, window_s=1.0, half_s=math.inf)
    small, large = Work(64 * 1_000, 0, 64), Work(64 * 4_000, 0, 64)
    assert PRICE(large) > 3.5 * PRICE(small)
    breadth.ended(Round(16.0, small, 8 * 16.0), PRICE)
    for _ in range(2):
        breadth.ended(Round(32.0, large, 16 * 32.0), PRICE)
    assert breadth.limit == 32
