"""A peer's book: what lies ahead of a new item, and what its open items teach about costs."""

from __future__ import annotations

import pytest

from aiodisagg.scheduler.book import PeerBook
from aiodisagg.scheduler.cost import PeerCosts, Rates, Size
from aiodisagg.scheduler.placement import PeerView, Wanted, place

UNIT = Rates(
    prepare_s=1e-9, prepare_patch_s=0.1, tower_s=1e-9, tower_patch_s=1.0, tower_square_s=1e-12,
    transfer_s=1e-9, transfer_byte_s=0.01,
)  # fmt: skip


def book() -> PeerBook[str]:
    return PeerBook(PeerCosts(UNIT))


def ask(at: PeerBook[str], key: str, patches: int, now: float = 0.0, digest: str = "") -> None:
    digest, size = digest or key, Size(patches, 0, 100)
    view = PeerView("p", at.costs, at.backlog(now), holding=at.holding([digest], now))
    placed = place(Wanted(digest, size), [view])
    assert placed is not None
    at.asked(key, digest, size, placed, now)


def ahead(at: PeerBook[str], now: float = 0.0) -> tuple[float, float, float]:
    found = at.backlog(now)
    return round(found.prepare_s, 6), round(found.tower_s, 6), round(found.transfer_s, 6)


def test_work_lies_ahead_until_it_is_seen_to_be_done() -> None:
    at = book()
    ask(at, "x", 10)
    ask(at, "y", 20)
    assert ahead(at) == (3.0, 30.0, 2.0)
    at.entered("x", "preparing", 0.001, 0.0)
    at.entered("x", "prepared", 1.0, 1.0)
    assert ahead(at, 1.0) == (2.0, 30.0, 2.0)
    at.entered("x", "encoding", 0.1, 1.0)
    assert ahead(at, 5.0) == (2.0, 26.0, 2.0), "it has been in the tower for four seconds"
    at.entered("x", "encoded", 10.0, 11.0)
    at.ready("x", 11.0)
    assert ahead(at, 11.0) == (2.0, 20.0, 2.0)
    at.arrived("x", 100, 12.0)
    at.left("x")
    assert ahead(at, 12.0) == (2.0, 20.0, 1.0)
    at.left("y")
    assert ahead(at, 12.0) == (0.0, 0.0, 0.0) and at.size_bytes == 0 and not at.open


def test_threads_share_what_is_to_be_prepared() -> None:
    at = book()
    at.costs.prepare_threads = 4
    ask(at, "x", 10)
    ask(at, "y", 20)
    assert ahead(at) == (0.75, 30.0, 2.0)


def test_an_item_that_leaves_takes_its_work_with_it() -> None:
    at = book()
    ask(at, "x", 10)
    ask(at, "y", 20)
    at.left("x")
    at.left("x")
    assert ahead(at) == (2.0, 20.0, 1.0)


def test_the_link_is_busy_with_rows_that_exist_until_they_are_here() -> None:
    at = book()
    ask(at, "x", 10)
    ask(at, "y", 10)
    assert at.backlog(0.0).there_s == 0.0
    at.ready("x", 11.0)
    at.ready("x", 11.0)
    assert round(at.backlog(11.0).there_s, 6) == 1.0
    at.left("y")
    assert round(at.backlog(11.0).there_s, 6) == 1.0
    at.left("x")
    assert at.backlog(11.0).there_s == 0.0


def test_an_item_that_is_given_up_in_the_tower_holds_up_nobody() -> None:
    at = book()
    ask(at, "x", 10)
    ask(at, "y", 20)
    at.entered("x", "encoding", 0.1, 1.0)
    at.left("x")
    assert at.in_tower() == [] and ahead(at, 5.0) == (2.0, 20.0, 1.0)


def test_what_two_asked_for_is_known_until_both_have_left() -> None:
    at = book()
    ask(at, "x", 10, digest="one")
    ask(at, "y", 10, digest="one")
    at.left("x")
    assert at.knows(["one"]) and at.holding(["one"], 0.0).keys() == {"one"}
    at.left("y")
    assert not at.knows(["one"]) and not at.holding(["one"], 0.0)


def test_stages_teach_costs() -> None:
    at = book()
    for now in range(0, 3000, 100):
        ask(at, "x", 10, now, f"digest {now}")
        at.entered("x", "preparing", 5.0, now)
        at.entered("x", "prepared", 2.0, now + 2.0)
        at.entered("x", "encoding", 50.0, now + 52.0)
        at.entered("x", "encoded", 30.0, now + 82.0)
        at.ready("x", now + 82.0)
        at.arrived("x", 100, now + 86.0)
        at.left("x")
    found = at.costs.predict(Size(10, 0, 100))
    assert found.prepare_s == pytest.approx(2.0, rel=0.05)
    assert found.tower_s == pytest.approx(30.0, rel=0.05)
    assert found.transfer_s == pytest.approx(4.0, rel=0.05)
    assert at.costs.finishes == 29 and at.costs.finish_error > 0.3, "it waited for a tower that was said to be free"


def test_the_first_items_of_a_peer_teach_nothing_of_the_way() -> None:
    """It opens with them: pools are mapped and pinned, which takes a hundred times as long as rows do."""
    at = book()
    for key in "xy":
        ask(at, key, 10, 0.0, key)
    for key in "xy":
        at.ready(key, 80.0)
        at.arrived(key, 100, 380.0)
        at.left(key)
    assert at.costs.transfer.observed == at.costs.finishes == 0
    ask(at, "z", 10, 400.0, "z")
    at.ready("z", 480.0)
    at.arrived("z", 100, 484.0)
    assert at.costs.transfer.observed == at.costs.finishes == 1


def through(at: PeerBook[str], key: str, came: float, left: float) -> None:
    at.entered(key, "encoding", 0.1, came)
    at.entered(key, "encoded", left - came, left)
    at.ready(key, left)


def test_items_that_leave_the_tower_together_are_one_batch() -> None:
    at = book()
    for key in "xyz":
        ask(at, key, 10)
    for key in "xy":
        at.entered(key, "encoding", 0.1, 1.0)
    for key in "xy":
        at.entered(key, "encoded", 40.0, 41.0)
    assert at.costs.tower.observed == 0, "perhaps more of the batch are to leave"
    through(at, "z", 41.0, 51.0)
    assert at.costs.tower.observed == 1
    assert at.costs.tower.error == pytest.approx(0.5), "20 s were expected of both together"


def test_an_item_that_came_while_another_was_in_the_tower_is_timed_from_when_that_left() -> None:
    """Items of ten patches, in the tower by pieces: 20 s each, though some were in it for longer."""
    at = book()
    for key in "wxyz":
        ask(at, key, 10)
    at.entered("w", "encoding", 0.1, 0.0)
    at.entered("x", "encoding", 0.1, 15.0)
    at.entered("w", "encoded", 20.0, 20.0)
    at.entered("y", "encoding", 0.1, 35.0)
    at.entered("x", "encoded", 25.0, 40.0)
    at.entered("z", "encoding", 0.1, 59.0)
    at.entered("y", "encoded", 25.0, 60.0)
    assert at.costs.tower.observed == 2
    assert at.costs.predict(Size(10, 0)).tower_s == pytest.approx(20.0, rel=0.01)


def test_work_for_others_between_two_items_is_not_theirs() -> None:
    at = book()
    for key, came in (("x", 0.0), ("y", 500.0), ("z", 1000.0)):
        ask(at, key, 10)
        through(at, key, came, came + 20.0)
    assert at.costs.predict(Size(10, 0)).tower_s == pytest.approx(20.0, rel=0.01)


def test_progress_that_only_tells_of_more_rows_is_no_stage() -> None:
    at = book()
    ask(at, "x", 10)
    at.entered("x", "encoding", 0.1, 1.0)
    at.entered("x", "encoded", 0.0, 5.0)
    assert at.in_tower() == ["x"]
    at.entered("x", "encoded", 10.0, 11.0)
    assert at.in_tower() == []


def test_disturbed_items_teach_nothing() -> None:
    at = book()
    ask(at, "x", 10)
    at.disturbed()
    at.entered("x", "prepared", 900.0, 900.0)
    at.ready("x", 900.0)
    at.arrived("x", 100, 1000.0)
    costs = at.costs
    assert (costs.prepare.observed, costs.transfer.observed, costs.finishes) == (0, 0, 0)


def test_rows_of_an_item_are_held_from_when_they_are_made() -> None:
    at = book()
    assert at.holding(["x"], 0.0) == {}
    ask(at, "x", 10)
    assert at.holding(["x", "y"], 4.0) == pytest.approx({"x": 7.0})
    at.ready("x", 9.0)
    assert at.holding(["x"], 9.0) == {"x": 0.0}
    at.left("x")
    assert at.holding(["x"], 10.0) == {"x": 0.0}
    ask(at, "again", 10, 11.0, "x")
    assert ahead(at, 11.0) == (0.0, 0.0, 1.0), "nothing has to be encoded"
    at.entered("again", "preparing", 0.1, 12.0)
    at.left("again")
    assert at.holding(["x"], 13.0) == {}, "it had to be encoded again: the peer had dropped it"


def test_a_heartbeat_tells_of_others_work_which_then_melts_away() -> None:
    at = book()
    ask(at, "x", 10)
    at.heard(10, 0.0)
    assert ahead(at) == (1.0, 10.0, 1.0), "all of it is ours"
    at.heard(4106, 0.0)
    assert at.backlog(0.0).tower_s == pytest.approx(10 + 4096, rel=0.01)
    assert at.backlog(4.0).tower_s == pytest.approx(10 + 4092, rel=1e-3)
    assert ahead(at, 1e6) == (1.0, 10.0, 1.0)


def test_what_a_heartbeat_told_stays_if_no_other_tells_less_for_a_while() -> None:
    """Alike ones are not passed on: others' work before a tower that hangs melted away, and it looked idle."""
    at = book()
    at.heard(10, 0.0)
    told = at.backlog(0.0).tower_s
    assert at.backlog(4.9).tower_s == pytest.approx(told - 4.9)
    assert at.backlog(5.0).tower_s == at.backlog(59.0).tower_s == told
    assert at.backlog(60.0).tower_s == 0.0


def test_what_was_said_with_an_item_counts_until_the_next_heartbeat_is_due() -> None:
    """It is of a moment, and newer than the heartbeat; heartbeats like the last one are not passed on."""
    at = book()
    at.heard(5000, 0.0)
    by_heartbeat = at.backlog(0.0).tower_s
    at.told(100, 1.0)
    assert at.backlog(1.0).tower_s == pytest.approx(100, rel=0.01)
    assert at.backlog(2.0).tower_s == pytest.approx(99, rel=0.01)
    assert at.backlog(6.0).tower_s == by_heartbeat
    at.told(0, 6.0)
    assert at.backlog(6.0).tower_s == 0.0


def test_a_tower_that_hangs_does_not_work_on_what_waits_behind() -> None:
    at = book()
    ask(at, "x", 10)
    ask(at, "y", 20)
    at.entered("x", "encoding", 0.1, 0.0)
    assert ahead(at, 9.0)[1] == 21.0 and ahead(at, 100.0)[1] == 20.0


def test_a_video_that_lets_another_go_between_its_parts_teaches_nothing() -> None:
    """All of its patches seemed to take as long as its last part."""
    at = book()
    for key, patches in (("video", 100), ("image", 10), ("next", 10), ("last", 10)):
        ask(at, key, patches)
    at.entered("video", "encoding", 0.1, 0.0)
    at.entered("video", "encoding", 0.0, 90.0)  # nine of ten parts
    through(at, "image", 90.0, 110.0)
    at.entered("video", "encoded", 120.0, 120.0)
    through(at, "next", 120.0, 140.0)
    through(at, "last", 140.0, 160.0)
    assert at.costs.predict(Size(10, 0)).tower_s == pytest.approx(20.0, rel=0.1)


def test_a_heartbeat_that_tells_of_more_work_than_there_can_be_is_only_a_peer_to_avoid() -> None:
    """Whatever it says, items are placed."""
    at = book()
    at.heard(10**400, 0.0)
    ask(at, "x", 10)
    assert 1e12 < at.backlog(1.0).tower_s < float("inf")
