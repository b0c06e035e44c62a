"""Two receivers that say different things of one digest: one of them lies, and the other one must not suffer much."""

from __future__ import annotations

import pytest

from aiodisagg.errors import RemoteProtocolError
from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms

from . import truth
from .lists import KEY, OTHER, SIX, Sending, every, only

WRONG = (1, 6, 4)
"""As many patches as the image of six rows has, in another shape."""


def test_a_lie_of_one_peer_does_not_close_the_link_of_another() -> None:
    """The honest want was called a lie: its link was closed, with all its items, as often as it came back."""
    s = Sending()
    s.want(KEY, peer="M", grid_thw=WRONG)
    (action,) = s.want(OTHER)
    assert isinstance(action, ev.Send) and isinstance(action.message, ms.Refuse)
    assert (action.peer, action.message.key, action.message.epoch) == ("L", OTHER, 1)
    assert action.message.retryable and set(s.machine.items) == {("M", KEY)}


def test_what_is_cached_says_nothing_of_who_asks() -> None:
    s = Sending()
    s.want(KEY, peer="M", grid_thw=WRONG)
    s.ready()
    s.says(ms.Release(KEY, 1), "M")
    assert only(s.want(OTHER), ms.Refuse).retryable


def test_a_peer_that_contradicts_itself_lies() -> None:
    s = Sending()
    s.want()
    s.want(OTHER, peer="M")
    with pytest.raises(RemoteProtocolError):
        s.want(ms.ItemKey(3, 0), grid_thw=WRONG)
    with pytest.raises(RemoteProtocolError):
        s.want(epoch=2, grid_thw=WRONG)


def test_an_item_whose_write_may_still_move_is_refused_after_the_fence() -> None:
    """A refusal says that nothing of the item moves any more."""
    s = Sending()
    s.want()
    s.ready(stop=2)
    write = only(s.grant((0, 2)), ev.Write)
    only(s.do(ev.EncodeStopped(truth.digest_of(SIX), "oom", "", True)), ev.Fence)
    s.want(epoch=2, media=None)  # the rows are gone, and the files are needed
    s.want(OTHER, peer="M", grid_thw=WRONG)
    assert s.want(epoch=3) == [] and s.want(epoch=3) == []
    assert s.wrote(write) == []
    (refuse,) = every(s.do(ev.WritesFenced("L", KEY)), ms.Refuse)
    assert (refuse.key, refuse.epoch, refuse.retryable) == (KEY, 3, True)
    assert ("L", KEY) not in s.machine.items
