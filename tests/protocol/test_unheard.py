"""What ended while a peer had no link is told when it has one again: else it would work for nobody."""

from __future__ import annotations

import pytest

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms
from aiodisagg.protocol import receiving

from .lists import KEY, OTHER, Receiving, every, only


def moved(r: Receiving) -> None:
    """An item went from A, whose link was lost, to B; nothing can land any more in what A was lent."""
    r.open()
    (revoke,) = every(r.do(ev.LinkLost("A")), ev.Revoke)
    r.do(ev.LeasesRevoked(revoke.leases))
    only(r.do(ev.TimerFired(), after_s=1.5), ev.Place)
    r.place(peer="B")


def test_a_peer_that_returns_is_told_what_was_moved_meanwhile() -> None:
    """Cancel was said into a link that was down: the peer encoded each moved item again, for nobody."""
    r = Receiving()
    moved(r)
    assert r.do(ev.LinkUp("A")) == [ev.Send("A", ms.Cancel(KEY, 1))]


def test_nothing_is_told_of_an_item_that_is_the_peers_again() -> None:
    r = Receiving()
    moved(r)
    only(r.says(ms.Refuse(KEY, 2, "oom", "", True), "B"), ev.Place)
    assert r.place(peer="A").epoch == 3
    actions = r.do(ev.LinkUp("A"))
    assert not every(actions, ms.Cancel) and only(actions, ms.Want).epoch == 4
    r.offer()
    only(r.do(ev.ItemCancelled(KEY)), ms.Cancel)
    r.do(ev.LinkLost("A"))
    assert only(r.do(ev.LinkUp("A")), ms.Cancel).epoch == 4


def test_a_peer_that_returns_is_told_what_was_completed_meanwhile() -> None:
    r = Receiving()
    first, second, third = r.open()
    for lend in (first, second):
        r.arrive(lend)
    take = only(r.commit(third), ev.Take)
    r.do(ev.LinkLost("A"))
    assert every(r.do(ev.RowsTaken(KEY, take.chunk)), ev.Finish)
    assert r.do(ev.LinkUp("A")) == [ev.Send("A", ms.Cancel(KEY, 1))]


def test_what_was_released_over_a_link_is_not_told_again() -> None:
    r = Receiving()
    for lend in r.open():
        r.arrive(lend)
    r.do(ev.LinkLost("A"))
    assert r.do(ev.LinkUp("A")) == []


def test_a_cancel_that_a_lost_link_took_along_is_said_again_until_it_is_answered() -> None:
    """A link is dead for seconds before that is known, and what is said into it is lost."""
    r = Receiving()
    r.do(ev.LinkUp("A"))
    r.open()
    actions = r.do(ev.ItemCancelled(KEY))
    assert only(actions, ms.Cancel).epoch == 1
    r.do(ev.LeasesRevoked(only(actions, ev.Revoke).leases))
    for _ in range(2):
        r.do(ev.LinkLost("A"))
        assert r.do(ev.LinkUp("A")) == [ev.Send("A", ms.Cancel(KEY, 1))]
    assert r.says(ms.Fenced(KEY, 1)) == []
    r.do(ev.LinkLost("A"))
    assert r.do(ev.LinkUp("A")) == []


def test_nothing_is_remembered_for_a_process_that_ended() -> None:
    r = Receiving()
    moved(r)
    r.do(ev.LinkLost("A", gone=True))
    assert not r.machine._unheard and r.do(ev.LinkUp("A")) == []


def test_a_bounded_number_is_remembered_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "MOST_UNHEARD", 2)
    r = Receiving()
    keys = [KEY, OTHER, ms.ItemKey(3, 0)]
    for key in keys:
        r.request(key)
        r.place(key)
    r.do(ev.LinkLost("A"))
    for key in keys:
        r.do(ev.ItemCancelled(key))
    assert [cancel.key for cancel in every(r.do(ev.LinkUp("A")), ms.Cancel)] == keys[1:]
