"""Placement: least owed rows first, avoided peers last, equal inputs equal answers."""

from __future__ import annotations

from aiodisagg.scheduler.placement import Candidate, place


def test_least_owed_rows_first() -> None:
    assert place([Candidate("a", 40), Candidate("b", 3)], frozenset()) == "b"


def test_avoided_peers_only_if_there_is_no_other() -> None:
    peers = [Candidate("a", 40), Candidate("b", 3)]
    assert place(peers, frozenset({"b"})) == "a"
    assert place(peers, frozenset({"a", "b"})) == "b"


def test_nobody_there() -> None:
    assert place([], frozenset()) is None


def test_ties_do_not_depend_on_the_order_of_candidates() -> None:
    peers = [Candidate("b", 1), Candidate("a", 1)]
    assert place(peers, frozenset()) == place(reversed(peers), frozenset()) == "a"
