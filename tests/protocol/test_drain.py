"""A sender that is about to end: what is open goes on, what is new goes elsewhere."""

from __future__ import annotations

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms

from .lists import KEY, OTHER, Sending, every, only


def test_a_sender_without_items_is_drained_at_once_and_says_so_once() -> None:
    sender = Sending()
    assert sender.do(ev.DrainBegan()) == [ev.Drained()]
    assert every(sender.want(), ev.Drained) == []


def test_a_new_item_is_refused_so_that_another_peer_takes_it() -> None:
    sender = Sending()
    sender.do(ev.DrainBegan())
    actions = sender.want()
    refuse = only(actions, ms.Refuse)
    assert (refuse.code, refuse.retryable) == ("draining", True)
    assert every(actions, ev.StartEncode) == [] and not sender.machine.items


def test_an_open_item_is_finished_first() -> None:
    sender = Sending()
    sender.want()
    assert sender.do(ev.DrainBegan()) == []
    sender.ready()
    write = only(sender.grant((0, 6)), ev.Write)
    assert only(sender.wrote(write), ms.Commit)
    assert only(sender.says(ms.Release(KEY, 1)), ev.Drained)


def test_an_open_item_may_resume_and_others_may_not_begin() -> None:
    sender = Sending()
    sender.want()
    sender.do(ev.DrainBegan())
    assert only(sender.want(epoch=2, media=None), ms.Offer).epoch == 2
    assert only(sender.want(OTHER), ms.Refuse).key == OTHER


def test_items_of_a_lost_link_are_not_waited_for() -> None:
    sender = Sending()
    sender.want()
    sender.want(OTHER, peer="M")
    sender.do(ev.DrainBegan())
    assert every(sender.do(ev.LinkLost("L")), ev.Drained) == []
    assert only(sender.says(ms.Release(OTHER, 1), "M"), ev.Drained)
    assert len(sender.machine.items) == 1
