"""Placement: the earliest predicted finish among the best kind of peers; one request's items together."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiodisagg.scheduler import placement as module
from aiodisagg.scheduler.cost import PeerCosts, Rates, Size
from aiodisagg.scheduler.placement import (
    Backlog,
    PeerView,
    Placement,
    Standing,
    Wanted,
    computed_s,
    place,
    place_together,
)

UNIT = Rates(
    prepare_s=1.0, prepare_patch_s=1e-9, tower_s=1e-9, tower_patch_s=1.0, tower_square_s=1e-12,
    transfer_s=0.5, transfer_byte_s=1e-9,
)  # fmt: skip
"""Preparing takes a second, the tower a second a patch, a transfer half a second."""


def item(digest: str, patches: int = 1, prefill_s: float = 0.0) -> Wanted:
    return Wanted(digest, Size(patches, 0, 0), prefill_s)


def peer(
    name: str, ahead_s: float = 0.0, standing: Standing = Standing.READY, **held: float
) -> PeerView:  # fmt: skip
    return PeerView(name, PeerCosts(UNIT), Backlog(tower_s=ahead_s), standing, held)


def where(found: Placement | None) -> str:
    assert found is not None
    return found.peer


def whereabouts(found: tuple[Placement, ...]) -> list[tuple[str, float]]:
    return [(placement.peer, round(placement.finish_s, 3)) for placement in found]


def test_the_earliest_finish_counts_preparing_tower_and_transfer() -> None:
    found = place(item("x", 4), [peer("a", 7.0), peer("b", 3.0)])
    assert found is not None
    assert (found.peer, round(found.ready_s, 6), round(found.finish_s, 6), found.held) == ("b", 7.0, 7.5, False)
    assert where(place(item("x", 4), [peer("a", 0.5), peer("b", 0.75)])) == "a", "a tie: preparing hides the queue"


def test_a_faster_peer_with_a_longer_queue() -> None:
    fast = Rates(prepare_s=0.1, tower_patch_s=0.1, transfer_s=0.5, transfer_byte_s=1e-9)
    quick = PeerView("quick", PeerCosts(fast), Backlog(tower_s=5.0))
    assert where(place(item("x", 10), [peer("slow", 1.0), quick])) == "quick"
    assert where(place(item("x", 2), [peer("slow", 1.0), quick])) == "slow"


def test_who_holds_or_encodes_the_digest_wins() -> None:
    assert where(place(item("x"), [peer("a"), peer("b", 100.0, x=0.0)])) == "b"
    assert where(place(item("x"), [peer("a"), peer("b", 100.0, x=40.0)])) == "b", "being encoded"
    assert where(place(item("x"), [peer("a", x=3.0), peer("b", x=0.0)])) == "b"
    held = place(item("x"), [peer("b", 100.0, x=2.0)])
    assert held is not None and held.held and (held.ready_s, held.finish_s) == (2.0, 2.5)


SLOW = Rates(
    prepare_s=1.0, prepare_patch_s=1e-9, tower_s=1e-9, tower_patch_s=1.0, tower_square_s=1e-12,
    transfer_s=30.0, transfer_byte_s=1e-9,
)  # fmt: skip


def test_who_holds_the_digest_behind_a_slow_link_wins_only_if_that_is_not_much_slower_than_encoding_it() -> None:
    """It always won: a picture that a peer of another site had encoded came from there for ever, in 30 s instead of
    5.5, or 9.5 with the time that it costs others at the tower."""
    far = PeerView("far", PeerCosts(SLOW), holding={"x": 0.0})
    assert where(place(item("x", 4), [far, peer("near")])) == "near"
    assert where(place(item("x", 4), [far, peer("near", 100.0)])) == "far", "it would take longer still"
    assert where(place(item("x", 16), [far, peer("near")])) == "far", "nor are towers to work for little"
    assert where(place(item("x", 4), [far])) == "far"
    together = place_together([item("x", 4), item("y", 4), item("x", 4)], [far, peer("near")])
    assert [(one.peer, one.held) for one in together] == [("near", False), ("near", False), ("near", True)]
    making = PeerView("making", PeerCosts(UNIT), holding={"x": 60.0})
    assert where(place(item("x", 4), [making, peer("near")])) == "making", "it is not made twice at once"


def test_rows_that_exist_wait_for_those_that_do_and_not_for_what_is_still_to_be_encoded() -> None:
    behind = PeerView("b", PeerCosts(UNIT), Backlog(0.0, 90.0, 95.0), holding={"x": 0.0})
    held = place(item("x", 4), [peer("a"), behind])
    assert held is not None and (held.peer, held.ready_s, round(held.finish_s, 3)) == ("b", 0.0, 0.5)
    full = PeerView("b", PeerCosts(UNIT), Backlog(0.0, 90.0, 95.0, 40.0), holding={"x": 0.0})
    assert where(place(item("x", 4), [peer("a"), full])) == "a"
    assert where(place(item("x", 4), [peer("a", 90.0), full])) == "b"
    (first, second) = place_together([item("x", 4), item("y", 4)], [behind._replace(holding={"x": 0.0, "y": 0.0})])
    assert (round(first.finish_s, 3), round(second.finish_s, 3)) == (0.5, 1.0), "one after the other"


def test_rows_that_exist_do_not_wait_for_those_of_the_same_request_that_are_being_made() -> None:
    """They were encoded a second time elsewhere, as if the link were busy until the others are here."""
    both = PeerView("a", PeerCosts(UNIT), holding={"v": 3.0, "w": 0.0})
    found = place_together([item("v"), item("w")], [both, peer("b")])
    assert [(one.peer, one.held) for one in found] == [("a", True), ("a", True)]


def test_a_request_of_hundreds_of_pictures_tries_few_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand pictures, sixty-four peers and an own tower: eight orders kept the loop for two seconds."""
    tried: Mock = Mock(side_effect=module._assign)
    monkeypatch.setattr(module, "_assign", tried)
    peers = [peer(f"{number:02d}") for number in range(64)]
    wanted = [item(f"{number}", number % 7 + 1, 0.01) for number in range(1000)]
    assert len(place_together(wanted, peers, own="00")) == 1000
    assert tried.call_count == 2
    place_together(wanted[:64], peers[:2], own="00")
    assert tried.call_count >= 2 + 5, "as many as ever of a few"


def test_draining_and_suspect_peers_only_if_there_is_no_better_one() -> None:
    drains, suspect, busy = peer("d", 0.0, Standing.DRAINING), peer("s", 0.0, Standing.SUSPECT), peer("b", 9.0)
    assert where(place(item("x"), [drains, suspect, busy])) == "b"
    assert where(place(item("x"), [drains, suspect])) == "s"
    assert where(place(item("x"), [drains])) == "d"
    assert where(place(item("x"), [peer("d", 0.0, Standing.DRAINING, x=0.0), busy])) == "b", "it takes nothing new"


def test_nobody_there() -> None:
    assert place(item("x"), []) is None
    assert place_together([item("x"), item("y")], []) == ()


def test_one_digest_twice_is_encoded_once() -> None:
    found = place_together([item("x", 8), item("x", 8)], [peer("a"), peer("b")])
    assert [placement.peer for placement in found] == ["a", "a"]
    assert [placement.held for placement in found] == [False, True]


def test_items_of_a_request_are_spread_in_prompt_order() -> None:
    found = place_together([item(name, 2) for name in "wxyz"], [peer("a"), peer("b")])
    assert whereabouts(found) == [("a", 3.5), ("b", 3.5), ("a", 5.5), ("b", 5.5)]


def test_the_largest_first_where_that_ends_sooner_for_the_prompt() -> None:
    """In prompt order the long last item would follow a short one: 1+2+6.5 against 1+6+0.5."""
    wanted = [item("s", 2), item("t", 2), item("l", 6)]
    found = place_together(wanted, [peer("a"), peer("b")])
    assert whereabouts(found) == [("b", 3.5), ("b", 5.5), ("a", 7.5)]
    assert computed_s(wanted, found) == max(placement.finish_s for placement in found)


def test_prompt_order_where_computing_the_first_items_hides_the_last() -> None:
    """With prefill that takes long, having the first items early is worth more than ending together."""
    wanted = [item("s", 2, 8.0), item("t", 2, 8.0), item("l", 6, 1.0)]
    found = place_together(wanted, [peer("a"), peer("b")])
    assert whereabouts(found) == [("a", 3.5), ("b", 3.5), ("a", 9.5)]
    assert round(computed_s(wanted, found), 3) == 20.5


def test_the_device_that_computes_the_prompt_encodes_less_of_it() -> None:
    """In equal shares it could begin at 5 and would be done at 13.2; now it begins at 3.5, with two of them."""
    wanted = [item(name, 2, 2.0) for name in "wxyz"]
    found = place_together(wanted, [peer("a"), peer("b")], own="a", step_s=0.1)
    assert whereabouts(found) == [("a", 3.5), ("b", 3.5), ("b", 5.5), ("b", 7.5)]
    assert round(computed_s(wanted, found, own="a", step_s=0.1), 3) == 11.7
    elsewhere = place_together(wanted, [peer("a"), peer("b")], step_s=0.1)
    assert [one.peer for one in elsewhere] == ["a", "b", "a", "b"]
    assert round(computed_s(wanted, elsewhere, own="a", step_s=0.1), 3) == 13.2


def test_what_the_own_tower_has_is_taken_from_there_however_little_it_encodes() -> None:
    """It counted as its share, and others encoded a second time what was here already."""
    both = [peer("a", v=0.0, y=0.0), peer("b", v=0.0)]
    wanted = [item("v", 1, 2.0), item("y", 2, 5.0), item("q", 4, 1.0)]
    found = place_together(wanted, both, own="a", step_s=0.1)
    assert [(one.peer, one.held) for one in found] == [("a", True), ("a", True), ("b", False)]


def test_equal_shares_where_computing_is_nothing_or_the_other_is_busy() -> None:
    quick = place_together([item(name, 2, 0.01) for name in "wxyz"], [peer("a"), peer("b")], own="a", step_s=0.1)
    assert [one.peer for one in quick] == ["a", "b", "a", "b"]
    busy = place_together([item(name, 2, 2.0) for name in "wx"], [peer("a"), peer("b", 20.0)], own="a", step_s=0.1)
    assert [one.peer for one in busy] == ["a", "a"]


def test_steps_that_cost_something_are_counted() -> None:
    wanted = [item("x", 2, 1.0), item("y", 2, 1.0), item("z", 2, 1.0)]
    found = place_together(wanted, [peer("a"), peer("b"), peer("c", 1.0)])
    assert whereabouts(found) == [("a", 3.5), ("b", 3.5), ("c", 3.5)]
    assert computed_s(wanted, found, step_s=0.5) == computed_s(wanted, found) + 0.5, "all three in one"
    one_by_one = place_together(wanted, [peer("a")])
    assert round(computed_s(wanted, one_by_one, step_s=0.5) - computed_s(wanted, one_by_one), 3) == 0.5, (
        "while it waits"
    )


digests = st.sampled_from("uvwxyz")
wanteds = st.lists(st.builds(item, digests, st.integers(1, 9), st.floats(0, 5)), min_size=1, max_size=6)
views = st.lists(
    st.builds(
        lambda name, ahead, standing, held: PeerView(name, PeerCosts(UNIT), Backlog(tower_s=ahead), standing, held),
        st.sampled_from("abcdef"), st.floats(0, 20), st.sampled_from(Standing),
        st.dictionaries(digests, st.floats(0, 9), max_size=2),
    ),
    min_size=1, max_size=6, unique_by=lambda view: view.peer,
)  # fmt: skip
few = settings(max_examples=40)


@few
@given(wanteds, views, st.sampled_from(["", *"abc"]))
def test_single_flight(wanted: list[Wanted], peers: list[PeerView], own: str) -> None:
    """Of each digest at most one item is encoded, and none if a usable peer has it."""
    best = min(view.standing for view in peers)
    usable = [view for view in peers if view.standing == best]
    found = place_together(wanted, peers, own=own, step_s=0.1)
    assert len(found) == len(wanted) and {one.peer for one in found} <= {view.peer for view in usable}
    for digest in {entry.digest for entry in wanted}:
        encoded = [p for entry, p in zip(wanted, found, strict=True) if entry.digest == digest and not p.held]
        assert len(encoded) == (0 if any(digest in view.holding for view in usable) else 1)


@few
@given(wanteds, views, st.randoms())
def test_equal_inputs_give_equal_answers(wanted: list[Wanted], peers: list[PeerView], random: object) -> None:
    shuffled = list(peers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert place_together(wanted, peers) == place_together(wanted, shuffled)


@few
@given(wanteds, views)
def test_no_worse_than_prompt_order_and_no_finish_before_the_work(wanted: list[Wanted], peers: list[PeerView]) -> None:
    found = place_together(wanted, peers)
    for entry, placement in zip(wanted, found, strict=True):
        assert placement.finish_s >= placement.ready_s
        if not placement.held:
            assert placement.ready_s >= 1.0 + entry.size.patches


@few
@given(st.integers(1, 9), views)
def test_a_longer_queue_is_never_an_earlier_finish(patches: int, peers: list[PeerView]) -> None:
    found = place(item("q", patches), peers)
    longer = [PeerView(v.peer, v.costs, Backlog(tower_s=v.backlog.tower_s + 1.0), v.standing) for v in peers]
    later = place(item("q", patches), longer)
    assert found is not None and later is not None
    assert found.finish_s <= later.finish_s <= found.finish_s + 1.0 + 1e-6


def test_of_peers_that_are_as_good_as_known_one_by_chance_but_who_is_much_better_always() -> None:
    doubted = [PeerView(name, PeerCosts(UNIT), doubt=0.3) for name in "abcd"]
    given = [where(place(item(f"{number:032x}", 8), doubted)) for number in range(400)]
    assert all(60 < given.count(name) < 140 for name in "abcd")
    busy = [PeerView(name, PeerCosts(UNIT), Backlog(tower_s=20.0), doubt=0.3) for name in "abcd"]
    better = [*busy, PeerView("e", PeerCosts(UNIT), doubt=0.3)]
    assert sum(where(place(item(f"{number:032x}", 8), better)) == "e" for number in range(400)) > 390
    sure = [PeerView(name, PeerCosts(UNIT)) for name in "abcd"]
    assert {where(place(item(f"{number:032x}", 8), sure)) for number in range(400)} == {"a"}


def test_a_digest_goes_to_the_same_peer_whoever_places_it() -> None:
    """Language peers that want one picture at once ask one tower for it."""
    for number in range(20):
        wanted = item(f"{number:032x}", 8)
        found = {
            where(place(wanted, [PeerView(name, PeerCosts(UNIT), doubt=0.3) for name in names]))
            for names in ("abcd", "dcba")
        }
        assert len(found) == 1
