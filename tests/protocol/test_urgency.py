"""What an item's place before a tower is, on its way from a request to the job that encodes it."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms

from . import truth
from .lists import KEY, SIX, Receiving, Sending, every, only, want

URGENCY = ms.Urgency(8.0, -2, 4096)


def test_a_want_says_what_is_left_of_the_time_until_its_request_is_due() -> None:
    receiving = Receiving()
    receiving.do(ev.ItemRequested(KEY, replace(truth.spec(SIX), urgency=URGENCY), 60.0))
    receiving.now = 3.0
    assert receiving.place(peer="A").urgency == ms.Urgency(5.0, -2, 4096)
    again = receiving.says(ms.Refuse(KEY, 1, "oom", "out of memory", True), after_s=20.0)
    assert only(again, ev.Place)
    assert receiving.place(peer="B").urgency == ms.Urgency(0.0, -2, 4096)


def test_a_job_has_the_best_place_of_those_that_wanted_it_before_it_began() -> None:
    sending = Sending(capacity_bytes=24 * truth.ROW_BYTES)  # of the first job
    first = only(sending.want(ms.ItemKey(9, 0), number=7), ev.StartEncode)
    for room, urgency in ((1, ms.Urgency(8.0, 0, 64)), (2, ms.Urgency(9.0, -1, 4096)), (3, ms.Urgency(2.0, 0, 4))):
        assert not every(sending.want(ms.ItemKey(room, 0), urgency=urgency), ev.StartEncode)
    sending.says(ms.Cancel(ms.ItemKey(9, 0), 1))
    started = only(sending.do(ev.EncodeStopped(first.digest, "cancelled", "", True)), ev.StartEncode)
    assert started.urgency == ms.Urgency(9.0, -1, 4096)


def test_who_waits_on_says_how_little_time_is_left_of_it() -> None:
    sending = Sending(capacity_bytes=24 * truth.ROW_BYTES)
    first = only(sending.want(ms.ItemKey(9, 0), number=7), ev.StartEncode)
    for epoch, due_s in ((1, 9.0), (2, 4.0)):
        sending.want(epoch=epoch, urgency=ms.Urgency(due_s, 0, 4))
    sending.says(ms.Cancel(ms.ItemKey(9, 0), 1))
    stopped = sending.do(ev.EncodeStopped(first.digest, "cancelled", "", True))
    assert only(stopped, ev.StartEncode).urgency == ms.Urgency(4.0, 0, 4)


def test_a_job_that_was_cancelled_has_the_place_of_who_wants_it_again() -> None:
    sending = Sending()
    digest = only(sending.want(urgency=URGENCY), ev.StartEncode).digest
    sending.says(ms.Cancel(KEY, 1))
    other = ms.Urgency(9.0, 5, 8192)
    assert not every(sending.want(ms.ItemKey(2, 0), urgency=other), ev.StartEncode)
    stopped = sending.do(ev.EncodeStopped(digest, "cancelled", "", True))
    assert only(stopped, ev.StartEncode).urgency == other


def test_who_joins_and_goes_first_has_the_question_asked_once_more_until_rows_exist() -> None:
    receiving = Receiving()
    receiving.do(ev.ItemRequested(KEY, replace(truth.spec(SIX), urgency=URGENCY), 60.0))
    receiving.place(peer="A")
    receiving.offer(ready=0)
    receiving.now = 3.0
    assert receiving.do(ev.ItemHurried(KEY, ms.Urgency(7.0, -2, 4096))) == [], "who waits already is due in 5 s"
    again = only(receiving.do(ev.ItemHurried(KEY, ms.Urgency(9.0, -3, 8))), ms.Want)
    assert (again.urgency, again.epoch, again.media) == (ms.Urgency(9.0, -3, 8), 2, None)
    receiving.offer(ready=3)
    assert receiving.do(ev.ItemHurried(KEY, ms.Urgency(0.0, -4, 8)), after_s=1.0) == []
    receiving.says(ms.Refuse(KEY, 2, "oom", "out of memory", True), after_s=1.0)
    assert receiving.do(ev.ItemHurried(KEY, ms.Urgency(9.0, -5, 8))) == [], "there is nobody to be told"
    assert receiving.place(peer="B").urgency == ms.Urgency(0.0, -4, 8)


def test_a_job_that_has_begun_is_told_of_who_goes_first_and_that_it_is_to_be_alone() -> None:
    sending = Sending()
    digest = only(sending.want(urgency=URGENCY), ev.StartEncode).digest
    for room, urgency in ((2, ms.Urgency(9.0, -2, 4096)), (3, ms.Urgency(1.0, 0, 4))):
        assert not every(sending.want(ms.ItemKey(room, 0), urgency=urgency), ev.ChangeEncode)
    better, alone = ms.Urgency(1.0, -3, 4096), ms.Urgency(9.0, 0, 4)
    changed = only(sending.want(epoch=2, media=None, urgency=better), ev.ChangeEncode)
    assert changed == ev.ChangeEncode(digest, better, False)
    changed = only(sending.want(ms.ItemKey(4, 0), urgency=alone, alone=True), ev.ChangeEncode)
    assert changed == ev.ChangeEncode(digest, better, True)
    assert not every(sending.want(ms.ItemKey(5, 0), urgency=alone), ev.ChangeEncode), "it stays so"
    sending.ready()
    assert not every(sending.want(ms.ItemKey(6, 0), urgency=ms.Urgency(0.0, -9), alone=True), ev.ChangeEncode)


def test_what_waits_for_room_is_started_alone_if_any_of_those_that_want_it_says_so() -> None:
    sending = Sending(capacity_bytes=144)
    first = only(sending.want(ms.ItemKey(9, 0), number=7), ev.StartEncode)
    for room, alone in ((1, False), (2, True), (3, False)):
        assert not every(sending.want(ms.ItemKey(room, 0), alone=alone), ev.StartEncode)
    sending.says(ms.Cancel(ms.ItemKey(9, 0), 1))
    stopped = sending.do(ev.EncodeStopped(first.digest, "cancelled", "", True))
    assert not first.alone and only(stopped, ev.StartEncode).alone


@pytest.mark.parametrize(("fields", "expected"), [(1, want(urgency=URGENCY)), (2, want())])
def test_a_peer_that_says_nothing_of_it_goes_by_arrival_and_in_company(fields: int, expected: ms.Want) -> None:
    """A release that does not know of it leaves it out, and takes a want that has it."""
    older = msgspec.msgpack.decode(ms.encode(want(urgency=URGENCY, alone=True)))[:-fields]
    assert ms.decode(msgspec.msgpack.encode(older), "peer") == expected
    newer = [*msgspec.msgpack.decode(ms.encode(expected)), "what a later release says"]
    assert ms.decode(msgspec.msgpack.encode(newer), "peer") == expected
