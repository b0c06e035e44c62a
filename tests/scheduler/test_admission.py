"""Who goes next, exactly: lanes, classes, cost, tenants, deadlines, a full queue."""

from __future__ import annotations

import math

import pytest

from aiodisagg.errors import ConfigError, InvalidTransition
from aiodisagg.scheduler.admission import AdmissionConfig, Arrived, Charged, Ended, FirstToken, Shed
from aiodisagg.scheduler.order import Order
from aiodisagg.scheduler.prices import Work
from aiodisagg.scheduler.shares import MAX_TENANTS, Tenant
from tests.scheduler.lines import ALICE, BIG, BOB, PICTURE, TEXT, Front, knows, released

# -- what is let through ----------------------------------------------------------------------------------------


def test_equal_requests_go_in_the_order_of_their_arrival() -> None:
    front = Front.of(min_in_flight=2)
    assert [released(front.arrive(name)) for name in "abcde"] == [["a"], ["b"], [], [], []]
    assert front.order("a", "b") == list("abcde")


def test_a_lane_that_is_full_of_images_does_not_hold_up_text() -> None:
    front = Front.of(min_in_flight=1)
    front.arrive("images", BIG)
    assert front.arrive("more images", BIG) == []
    assert released(front.arrive("text", TEXT)) == ["text"]


def test_the_window_counts_predicted_work_and_what_is_done_of_it() -> None:
    front = Front.of(known=True, min_in_flight=1, window_s=2.5 * 0.042)
    assert front.price(PICTURE) == pytest.approx(0.042)
    assert [released(front.arrive(name)) for name in "abcd"] == [["a"], ["b"], ["c"], []]
    assert released(front.tick(0.02)) == []  # of 0.126 s, 0.106 are left: too much for a window of 0.105
    assert released(front.tick(0.002)) == ["d"]


def test_no_window_before_anything_is_known() -> None:
    front = Front.of(min_in_flight=3, window_s=1e-9)
    assert [released(front.arrive(name)) for name in "abcd"] == [["a"], ["b"], ["c"], []]


def test_a_limit_on_first_tokens_keeps_most_of_the_line_where_order_counts() -> None:
    """Eight at once would be half a second of work ahead of whoever comes; a quarter of it is the window then."""
    front = Front.of(known=True, min_in_flight=8, max_ttft_s=0.4)
    names = [str(n) for n in range(9)]
    let = [name for name in names if released(front.arrive(name))]
    assert len(let) == 5  # the fifth finds 4 * 0.042 s, below half of the limit


def test_places_in_the_engine_bound_both_lanes() -> None:
    front = Front.of(max_running=2)
    assert released(front.arrive("a", PICTURE)) == ["a"] and released(front.arrive("b", TEXT)) == ["b"]
    assert front.arrive("c", TEXT) == [] and front.arrive("d", PICTURE) == []
    assert front.token("a") == [] and front.end("a") == ["c"]
    assert front.end("b") == ["d"]


# -- within a tenant --------------------------------------------------------------------------------------------


def test_cheap_requests_pass_dear_ones_but_not_their_like() -> None:
    front = Front.of(min_in_flight=1)
    for name, work in (("first", BIG), ("dear", BIG), ("cheap", PICTURE), ("alike", Work(990, 3_900))):
        front.arrive(name, work)
    assert front.order("first") == ["first", "cheap", "alike", "dear"]


def test_a_class_goes_before_the_next_whatever_it_costs() -> None:
    front = Front.of(min_in_flight=1)
    for name, work, priority in (("first", BIG, 0), ("low", PICTURE, 1), ("high", BIG, -1), ("middle", PICTURE, 0)):
        front.arrive(name, work, priority=priority)
    assert front.order("first") == ["first", "high", "middle", "low"]


def test_nobody_is_passed_beyond_the_aging_bound() -> None:
    """The dear one can wait for 8 pictures of 0.042 s more than what stands before it, and does, for no more."""
    front = Front.of(known=True, min_in_flight=1, window_s=1e-9, max_wait_s=0.322 + 8.5 * 0.042)
    assert front.price(BIG) == pytest.approx(0.322)
    front.arrive("first", BIG)
    front.arrive("dear", BIG)
    for n in range(12):
        front.arrive(f"cheap {n}", PICTURE)
    order = front.order("first")
    assert order.index("dear") == 1 + 8


def test_who_has_waited_for_the_aging_bound_is_passed_by_no_class() -> None:
    front = Front.of(min_in_flight=1, max_wait_s=5.0)
    front.arrive("first")
    front.arrive("old", priority=8)
    front.tick(5.0)
    front.arrive("young", priority=-8)
    assert front.order("first") == ["first", "old", "young"]


def test_between_lanes_the_order_is_the_same() -> None:
    def second(wait: float, low: int, high: int) -> list[str]:
        front = Front.of(max_running=1, max_wait_s=5.0)
        front.arrive("first", TEXT)
        front.arrive("images", PICTURE, priority=low)
        front.tick(wait)
        front.arrive("text", TEXT, priority=high)
        return front.end("first")

    assert second(4.9, 1, 0) == second(4.9, 0, 0) == ["text"]
    assert second(4.9, 0, 1) == ["images"]
    assert second(5.0, 1, 0) == second(5.0, 0, 0) == ["images"]


def test_who_is_due_goes_by_arrival_in_whatever_lane() -> None:
    front = Front.of(max_running=1, max_wait_s=5.0)
    front.arrive("first", TEXT)
    for n in range(3):
        front.arrive(f"i{n}", PICTURE, priority=1)
        front.arrive(f"t{n}", TEXT)
    front.tick(5.0)
    order = ["first"]
    for name in order:
        order += front.end(name)
    assert order == ["first", "i0", "t0", "i1", "t1", "i2", "t2"]


def test_first_come_first_served_knows_classes_but_neither_lanes_nor_sizes() -> None:
    front = Front.of(min_in_flight=1, order=Order.FIRST_COME)
    front.arrive("first", BIG)
    for name, work, priority in (("dear", BIG, 0), ("text", TEXT, 0), ("low", TEXT, 1), ("last", PICTURE, 0)):
        assert front.arrive(name, work, priority=priority) == []
    assert front.order("first") == ["first", "dear", "text", "last", "low"]


def test_who_is_in_a_hurry_when_it_comes_passes_nobody_for_that() -> None:
    front = Front.of(known=True, min_in_flight=1, window_s=1e-9)
    front.arrive("first")
    front.arrive("patient")
    front.arrive("hurried", within=0.15)
    assert front.order("first") == ["first", "patient", "hurried"]


# -- tenants ----------------------------------------------------------------------------------------------------


def test_a_flood_waits_for_itself_only() -> None:
    front = Front.of(min_in_flight=1)
    for n in range(6):
        front.arrive(f"a{n}", tenant=ALICE)
    front.arrive("b0", tenant=BOB)
    front.arrive("b1", tenant=BOB)
    assert front.order("a0") == ["a0", "b0", "a1", "b1", "a2", "a3", "a4", "a5"]


def test_twice_the_weight_is_twice_the_service() -> None:
    front = Front.of(min_in_flight=1)
    for n in range(6):
        front.arrive(f"a{n}", tenant=Tenant("alice", 2.0))
    for n in range(3):
        front.arrive(f"b{n}", tenant=BOB)
    order = front.order("a0")
    assert [name[0] for name in order] == list("abaabaaba")


def test_shares_are_of_cost_and_not_of_requests() -> None:
    front = Front.of(min_in_flight=1)
    four = Work(4 * PICTURE.tokens, 4 * PICTURE.patches, requests=4)
    for n in range(8):
        front.arrive(f"a{n}", tenant=ALICE)
    for n in range(2):
        front.arrive(f"b{n}", four, tenant=BOB)
    assert [name[0] for name in front.order("a0")] == list("abaaaabaaa")


def test_who_was_away_comes_back_without_savings() -> None:
    front = Front.of(min_in_flight=1)
    front.arrive("b0", tenant=BOB)
    for n in range(9):
        front.arrive(f"a{n}", tenant=ALICE)
    assert front.token("b0") == ["a0"]
    for n in range(4):
        assert front.token(f"a{n}") == [f"a{n + 1}"]
    for n in range(1, 4):
        front.arrive(f"b{n}", tenant=BOB)
    assert front.order("a4") == ["a4", "b1", "a5", "b2", "a6", "b3", "a7", "a8"]


def test_generated_tokens_are_charged_when_they_are_known() -> None:
    front = Front.of(min_in_flight=1)
    for name in ("a0", "a1", "a2"):
        front.arrive(name, tenant=ALICE)
    for name in ("b0", "b1", "b2", "b3"):
        front.arrive(name, tenant=BOB)
    assert front.token("a0") == ["b0"]
    charged = [d for d in front.queue.handle(Ended("a0", 1_050), front.now) if isinstance(d, Charged)]
    assert charged == [Charged("alice", pytest.approx(0.042))]
    # Alice's first request cost her as much as two.
    assert front.order("b0") == ["b0", "b1", "a1", "b2", "a2", "b3"]


def test_tenants_that_are_gone_are_forgotten() -> None:
    front = Front.of(max_queue=10)
    front.arrive("stays", tenant=BOB)
    for n in range(MAX_TENANTS + 600):
        front.arrive(str(n), tenant=Tenant(f"t{n}"))
        front.end(str(n))
    assert len(front.queue._shares._flows) <= MAX_TENANTS + 1
    front.end("stays")
    assert not front.queue._shares._flows


# -- a full queue -----------------------------------------------------------------------------------------------


def shed_by(front: Front, name: str, tenant: Tenant = ALICE, priority: int = 0) -> tuple[str, str]:
    (shed,) = front.arrive(name, tenant=tenant, priority=priority)
    assert isinstance(shed, Shed) and 1.0 <= shed.retry_after_s <= 60.0
    return shed.request_id, shed.reason


def test_a_full_queue_turns_newcomers_away() -> None:
    front = Front.of(min_in_flight=1, max_queue=2)
    for name in "abc":
        front.arrive(name)
    assert shed_by(front, "d") == ("d", "queue_full")
    assert front.order("a") == list("abc")


def test_who_goes_at_once_takes_no_place_in_a_full_queue() -> None:
    front = Front.of(min_in_flight=1, max_queue=2)
    for name in "abc":
        front.arrive(name)
    assert released(front.arrive("text", TEXT)) == ["text"]
    assert front.order("a") == list("abc")


def test_a_full_queue_makes_room_for_a_better_class() -> None:
    front = Front.of(min_in_flight=1, max_queue=2)
    for name in "abc":
        front.arrive(name, priority=1)
    assert shed_by(front, "d", priority=0) == ("c", "displaced")
    assert shed_by(front, "e", priority=1) == ("e", "queue_full")
    assert front.order("a") == ["a", "d", "b"]


def test_the_tenant_with_most_for_its_weight_makes_room_in_a_full_queue() -> None:
    front = Front.of(min_in_flight=1, max_queue=6)
    for n in range(4):
        front.arrive(f"a{n}", tenant=Tenant("alice", 3.0))
    for n in range(3):
        front.arrive(f"b{n}", tenant=BOB)
    assert shed_by(front, "c0", Tenant("carol")) == ("b2", "displaced")
    assert shed_by(front, "c1", Tenant("carol")) == ("c1", "queue_full")
    assert shed_by(front, "a4", Tenant("alice", 3.0)) == ("b1", "displaced")


# -- leaving ----------------------------------------------------------------------------------------------------


def test_who_leaves_the_line_makes_room_at_once() -> None:
    front = Front.of(min_in_flight=1, max_queue=1)
    front.arrive("a")
    front.arrive("b")
    assert front.end("b") == []
    assert front.arrive("c") == []
    assert front.end("a") == ["c"]


def test_who_leaves_before_its_first_token_makes_room_at_once() -> None:
    front = Front.of(min_in_flight=1)
    front.arrive("a")
    front.arrive("b")
    assert front.end("a") == ["b"]
    assert front.queue.running == 1


@pytest.mark.parametrize(
    "event",
    [Arrived("in line", TEXT, ALICE), Arrived("running", TEXT, ALICE), FirstToken("in line"), FirstToken("nobody"),
     FirstToken("streams"), Ended("nobody")],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_changes_nothing(event: Arrived | FirstToken | Ended) -> None:
    front = Front.of(min_in_flight=1)
    for name in ("streams", "running", "in line"):
        front.arrive(name)
    assert front.token("streams") == ["running"]
    before = repr(front.queue), front.queue._shares._open
    with pytest.raises(InvalidTransition):
        front.queue.handle(event, 0.0)
    assert (repr(front.queue), front.queue._shares._open) == before
    assert front.order("running") == ["running", "in line"]


@pytest.mark.parametrize("key", ["max_queue", "max_ttft_s", "max_wait_s", "window_s", "min_in_flight"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_settings_are_checked(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        AdmissionConfig(**{key: value})  # type: ignore[arg-type]


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of short-first, first-come"):
        AdmissionConfig(order="longest")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"weight": 0.0}, {"weight": math.inf}, {"weight": math.nan}, {"name": ""}])
def test_tenants_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Tenant(**wrong)  # type: ignore[arg-type]


def test_knowing_is_of_one_lane() -> None:
    front = Front.of(min_in_flight=1, max_ttft_s=0.3)
    knows(front.queue.lanes[True])
    front.arrive("a", PICTURE)
    (shed,) = front.arrive("b", BIG)
    assert isinstance(shed, Shed)
    assert released(front.arrive("text", Work(1_000_000))) == ["text"]
