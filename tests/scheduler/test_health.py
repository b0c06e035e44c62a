"""Hedges, poison, standing, and what heartbeats say of digests."""

from __future__ import annotations

from aiodisagg.scheduler.advertise import ADVERTISED, advertise, advertised
from aiodisagg.scheduler.health import HealthConfig, Hedges, Poison, Standings
from aiodisagg.scheduler.placement import Standing

CONFIG = HealthConfig(
    hedge_factor=3.0, hedge_slack_s=2.0, hedged_share=0.1, poison_s=100.0, confirm_s=5.0, suspect_s=30.0,
    suspect_most_s=100.0,
)  # fmt: skip


def test_an_item_is_overdue_long_after_its_prediction_and_named_once() -> None:
    hedges: Hedges[str] = Hedges(CONFIG)
    hedges.asked("short", 0.5, 10.0)
    hedges.asked("long", 5.0, 0.0)
    hedges.asked("made", 0.1, 0.0)
    hedges.settled("made")
    assert hedges.next_timer() == 12.5
    assert hedges.overdue(12.4) == []
    assert hedges.overdue(12.5) == ["short"] and hedges.overdue(12.5) == []
    assert hedges.overdue(15.0) == ["long"]
    assert hedges.next_timer() is None
    hedges.later("long", 1.0, 15.0)
    assert hedges.overdue(16.0) == ["long"]


def test_few_are_hedged_at_once() -> None:
    hedges: Hedges[str] = Hedges(CONFIG)
    assert hedges.allowed(3)
    hedges.hedged("a2")
    assert not hedges.allowed(3) and not hedges.allowed(19) and hedges.allowed(20)
    hedges.over("a2")
    assert hedges.allowed(3) and hedges.started == 1


def test_no_slack_no_hedges() -> None:
    hedges: Hedges[str] = Hedges(HealthConfig(hedge_slack_s=0.0))
    hedges.asked("x", 1.0, 0.0)
    assert hedges.next_timer() is None and hedges.overdue(1e9) == []


def test_an_item_that_two_encoders_die_of_is_refused_for_a_while() -> None:
    poison = Poison(CONFIG)
    poison.cut("one", ["x", "bystander"], 0.0)
    poison.died("one")
    assert poison.suspect("x", 0.0) and poison.suspect("bystander", 0.0) and not poison.refuses("x", 0.0)
    poison.encoded("bystander")
    assert not poison.suspect("bystander", 0.0)
    poison.cut("two", ["x"], 50.0)
    poison.died("two")
    assert poison.refuses("x", 149.0) and poison.refused == 1
    assert not poison.refuses("x", 150.0) and not poison.suspect("x", 150.0)


def test_one_encoder_dies_once_and_a_cut_link_is_no_death() -> None:
    poison = Poison(CONFIG)
    for now in (0.0, 1.0):
        poison.cut("one", ["x"], now)
        poison.died("one")
    assert poison.suspect("x", 1.0) and not poison.refuses("x", 1.0)
    poison.lives("one")
    assert not poison.suspect("x", 1.0)


def test_who_is_not_known_to_be_dead_did_not_die_of_an_item() -> None:
    """A network that was cut twice within a second made good media poison for ten minutes."""
    poison = Poison(CONFIG)
    poison.cut("one", ["x"], 0.0)
    assert poison.suspect("x", 0.0) and poison.unsure_s("x", 0.0) == 0.0
    poison.cut("two", ["x"], 1.0)
    assert not poison.refuses("x", 1.0) and poison.unsure_s("x", 1.0) == 4.0, "until the first is given up on"
    assert poison.unsure_s("x", 5.0) == 0.0 and poison.suspect("x", 5.0), "nothing was heard: it is tried on, alone"
    poison.died("two")
    assert not poison.refuses("x", 5.0) and poison.unsure_s("x", 5.0) == 0.0
    assert poison.unsure_s("x", 4.0) == 1.0
    poison.died("one")
    assert poison.refuses("x", 5.0) and poison.unsure_s("x", 5.0) == 0.0


def test_a_cut_that_comes_after_a_death_is_waited_for() -> None:
    poison = Poison(CONFIG)
    poison.cut("one", ["x"], 0.0)
    poison.died("one")
    poison.cut("two", ["x"], 2.0)
    assert poison.unsure_s("x", 2.0) == 5.0
    poison.lives("two")
    assert poison.unsure_s("x", 2.0) == 0.0 and not poison.refuses("x", 2.0)


def test_standing_is_what_membership_says_and_what_was_seen() -> None:
    standings = Standings(CONFIG)
    assert standings.of("a", 0.0) is Standing.READY
    standings.told("a", Standing.DRAINING)
    assert standings.of("a", 0.0) is Standing.DRAINING
    standings.told("a", Standing.READY)
    standings.failed("a", 0.0)
    assert standings.of("a", 0.0) is Standing.READY
    standings.failed("a", 1.0)
    assert standings.of("a", 30.9) is Standing.SUSPECT
    standings.told("a", Standing.DRAINING)
    assert standings.of("a", 30.9) is Standing.DRAINING, "no better for being a suspect"
    standings.told("a", Standing.READY)
    assert standings.of("a", 31.0) is Standing.READY, "forgiven"
    standings.failed("a", 31.0)
    standings.delivered("a")
    assert standings.of("a", 31.0) is Standing.READY
    standings.failed("a", 40.0)
    standings.failed("a", 40.0)
    standings.told("a", None)
    assert standings.of("a", 40.0) is Standing.READY, "whoever comes back under this name is somebody new"


def test_a_peer_that_fails_is_tried_with_one_item_ever_more_seldom_until_one_is_delivered() -> None:
    standings, now, waits = Standings(CONFIG), 0.0, []
    for _ in range(5):  # asked for together, they fail together
        standings.failed("a", now)
    for _ in range(5):
        began = now
        while standings.of("a", now) is Standing.SUSPECT:
            now += 1.0
        waits.append(now - began)
        standings.asked("a", now)
        assert standings.of("a", now) is Standing.SUSPECT, "others wait for how it ends"
        standings.failed("a", now + 0.5)
    assert waits == [30.0, 60.0, 100.0, 100.0, 100.0]
    standings.delivered("a")
    standings.asked("a", now)
    standings.failed("a", now)
    assert standings.of("a", now) is Standing.READY


def test_the_newest_digests_are_told_by_prefixes() -> None:
    digests = [f"{i:032x}"[::-1] for i in range(ADVERTISED + 5)]
    told = frozenset(advertise(digests))
    assert len(told) == ADVERTISED and max(map(len, told)) == 12
    assert all(advertised(digest, told) for digest in digests[:ADVERTISED])
    assert not any(advertised(digest, told) for digest in digests[ADVERTISED:])


class Moment(float):
    """A time that counts how often it is compared."""

    compared = 0

    def __add__(self, other: float) -> Moment:
        return Moment(float(self) + other)

    def __lt__(self, other: float) -> bool:
        Moment.compared += 1
        return float(self) < float(other)


def test_what_is_late_first_is_known_without_a_look_at_all_that_is_open() -> None:
    """Each placement looked at all: with four thousand open items a tenth of what an item costs."""
    hedges: Hedges[int] = Hedges(HealthConfig())
    for key in range(500):
        hedges.asked(key, 1.0, Moment(500 - key))
        assert hedges.next_timer() == 500 - key + 3.0
    for key in range(499):
        hedges.settled(key)
        assert hedges.next_timer() == 1 + 3.0
    assert Moment.compared < 500 * 20
    assert hedges.overdue(1e9) == [499] and hedges.next_timer() is None
