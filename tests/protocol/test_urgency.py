"""What an item's place before a tower is, on its way from a request to the job that encodes it."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms

from . import truth
from .lists import KEY, SIX, Receiving, Sending, only, want

URGENCY = ms.Urgency(8.0, -2, 4096)


def test_a_want_says_what_is_left_of_the_time_until_its_request_is_due() -> None:
    receiving = Receiving()
    receiving.do(ev.ItemRequested(KEY, replace(truth.spec(SIX), urgency=URGENCY), 60.0))
    receiving.now = 3.0
    assert receiving.place(peer="A").urgency == ms.Urgency(5.0, -2, 4096)
    again = receiving.says(ms.Refuse(KEY, 1, "oom", "out of memory", True), after_s=20.0)
    assert only(again, ev.Place)
    assert receiving.place(peer="B").urgency == ms.Urgency(0.0, -2, 4096)


def test_a_job_has_the_place_of_the_first_that_wanted_it() -> None:
    sending = Sending()
    assert only(sending.want(urgency=URGENCY), ev.StartEncode).urgency == URGENCY
    other = ms.ItemKey(2, 0)
    assert not [one for one in sending.want(other, urgency=ms.Urgency(1.0, 0, 1)) if isinstance(one, ev.StartEncode)]


def test_a_peer_that_says_nothing_of_it_goes_by_arrival() -> None:
    """A release that does not know of it leaves it out, and takes a want that has it."""
    older = msgspec.msgpack.decode(ms.encode(want(urgency=URGENCY)))[:-1]
    read = ms.decode(msgspec.msgpack.encode(older), "peer")
    assert isinstance(read, ms.Want) and read.urgency == ms.ARRIVAL and read == want()
