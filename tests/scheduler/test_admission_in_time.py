"""Who is in time and who is not: deadlines, the service's own limit, and what is learned of both."""

from __future__ import annotations

import pytest

from aiodisagg.scheduler.admission import Expire, FirstToken, Release, Shed
from aiodisagg.scheduler.prices import Work
from tests.scheduler.lines import BIG, PICTURE, TEXT, Front, released


def test_who_cannot_be_in_time_is_shed_at_once_and_told_when_to_come_back() -> None:
    front = Front.of(known=True, min_in_flight=1, window_s=1e-9, max_ttft_s=10.0)
    front.arrive("a", Work(0, 600_000))
    assert front.price(Work(0, 600_000)) == pytest.approx(3.002)
    assert released(front.arrive("b", Work(0, 600_000))) == []
    assert released(front.arrive("c", Work(0, 600_000))) == []
    (shed,) = front.arrive("d", Work(0, 600_000))
    assert shed == Shed("d", "predicted", pytest.approx(4 * 3.002 - 10.0))
    assert front.order("a") == ["a", "b", "c"]
    for name in "abc":
        front.end(name)
    assert not front.queue._shares._flows, "nobody is here, and nobody owes anything"


def test_a_deadline_counts_like_the_limit_of_the_service() -> None:
    front = Front.of(known=True, min_in_flight=1, window_s=1e-9)
    front.arrive("a", Work(0, 600_000))
    (shed,) = front.arrive("b", Work(0, 600_000), within=5.0)
    assert shed == Shed("b", "predicted", pytest.approx(1.004))
    assert front.arrive("c", Work(0, 600_000), within=7.0) == []


def test_nothing_is_shed_by_prices_that_nobody_knows() -> None:
    front = Front.of(min_in_flight=1, max_ttft_s=1e-3)
    front.arrive("a", BIG)
    assert front.arrive("b", BIG) == []


def test_an_idle_lane_takes_what_looks_hopeless_and_learns_better() -> None:
    front = Front.of(known=True, max_ttft_s=0.1)
    before = front.price(BIG)
    assert before > 0.1
    for n in range(40):
        assert released(front.arrive(f"a{n}", BIG)) == [f"a{n}"]
        front.token(f"a{n}", after=0.01)
        front.end(f"a{n}")
    assert front.price(BIG) < before / 3


def test_a_deadline_that_has_passed_costs_nothing() -> None:
    front = Front.of(min_in_flight=1)
    assert front.arrive("now", within=0.0) == [Expire("now", 0.0)]
    front.arrive("a")
    front.arrive("c", within=1.0)
    front.arrive("b", within=2.0)
    assert front.queue.next_timer() == 1.0
    assert front.tick(1.0) == [Expire("c", 1.0)]
    assert front.queue.next_timer() == 2.0
    assert front.token("a", after=0.9) == ["b"]
    assert front.queue.next_timer() is None
    assert front.tick(1.0) == []  # who was released is not our business any more


def test_who_can_no_longer_be_in_time_is_not_released() -> None:
    front = Front.of(known=True, min_in_flight=1, window_s=1e-9)
    front.arrive("a", PICTURE)
    front.arrive("late", BIG, within=1.0)
    front.arrive("next", BIG)
    (shed, release) = front.do(FirstToken("a"), after=0.7)
    assert isinstance(shed, Shed) and (shed.request_id, shed.reason) == ("late", "late")
    assert release == Release("next", pytest.approx(0.7))
    for name in ("a", "next"):
        front.end(name)
    assert not front.queue._shares._flows, "nobody is here, and nobody owes anything"


def test_who_would_be_late_behind_what_is_in_flight_is_not_released() -> None:
    front = Front.of(known=True, min_in_flight=2, window_s=1e-9)
    front.arrive("a", BIG)
    front.arrive("b", BIG)
    assert front.arrive("late", PICTURE, within=0.75) == []  # 0.644 s are in flight
    (shed,) = front.do(FirstToken("a"), after=0.5)  # and 0.322 s are, still
    assert isinstance(shed, Shed) and (shed.request_id, shed.reason) == ("late", "late")


def test_a_latency_of_bad_times_does_not_shed_who_only_waited_for_a_place() -> None:
    """Encoders hung for a while. Only a first token shows that they do not any more, and the engine is full of text."""
    front = Front.of(known=True, max_running=1, max_ttft_s=2.0)
    front.queue.lanes[True].latency_s = 10.0
    front.arrive("text", TEXT)
    assert front.arrive("picture", PICTURE) == []
    front.token("text", after=0.1)
    assert front.end("text") == ["picture"]


def test_first_tokens_that_come_before_their_time_are_predicted_so() -> None:
    """Those of a batch come together, and the last of them earlier than the work before it says."""
    front = Front.of(known=True, min_in_flight=2, window_s=1e-9)
    front.arrive("a", BIG)
    front.arrive("b", BIG)
    front.queue.lanes[True].latency_s = -0.1
    assert front.arrive("in time", PICTURE, within=0.6) == []
    front.queue.lanes[True].latency_s = -10.0
    (shed,) = front.arrive("never", PICTURE, within=0.04)
    assert shed == Shed("never", "predicted", 1.0)


def test_the_limit_of_the_service_passes_in_line() -> None:
    front = Front.of(min_in_flight=1, max_ttft_s=3.0)
    front.arrive("a")
    front.arrive("b")
    (shed,) = front.tick(3.0)
    assert isinstance(shed, Shed) and (shed.request_id, shed.reason) == ("b", "late")
