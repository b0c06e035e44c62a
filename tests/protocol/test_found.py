"""Event lists that once broke the machines, found by the world or by reading; each keeps what was learned."""

from __future__ import annotations

import math
from typing import Any

import pytest

from aiodisagg.errors import RemoteProtocolError
from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms
from aiodisagg.protocol.rows import Region

from . import truth
from .lists import KEY, OTHER, SIX, Receiving, Sending, every, only, want


def test_blocks_of_an_earlier_stay_return_when_the_peer_is_chosen_again() -> None:
    """An item left A with its link, was tried at B, and came back to A: A's new offer frees A's old blocks."""
    r = Receiving(blocks=4, window_blocks=2)
    r.open()
    r.do(ev.LinkLost("A"))
    assert only(r.do(ev.TimerFired(), after_s=1.5), ev.Place).avoid == {"A"}
    r.place(peer="B")
    r.do(ev.LinkLost("B", gone=True))
    assert r.pool.quarantined == 2
    r.do(ev.LinkUp("A"))
    r.place(peer="A")
    r.offer(peer="A")
    assert r.pool.quarantined == 0


def test_a_fence_in_the_current_epoch_frees_older_blocks_too() -> None:
    """As above, but A's first word in the new epoch is that its write failed."""
    r = Receiving(blocks=4, window_blocks=2)
    r.open()
    r.do(ev.LinkLost("A"))
    r.do(ev.TimerFired(), after_s=1.5)
    r.place(peer="B")
    r.do(ev.LinkLost("B", gone=True))
    r.place(peer="A")
    r.says(ms.Fenced(KEY, r.machine.items[KEY].epoch))
    assert r.pool.quarantined == 0


def test_the_cancel_after_a_reconnect_names_an_epoch_the_sender_obeys() -> None:
    """Blocks were lent in epoch 1, the peer was left in epoch 2: a cancel of epoch 1 would be ignored as stale."""
    r = Receiving()
    r.open()
    r.do(ev.LinkLost("A"))
    r.do(ev.LinkUp("A"))
    r.do(ev.LinkLost("A"))
    r.do(ev.TimerFired(), after_s=1.5)
    cancel = only(r.do(ev.LinkUp("A")), ms.Cancel)
    s = Sending()
    s.want(epoch=2)
    fenced = only(s.says(cancel), ms.Fenced)
    r.says(fenced)
    assert r.pool.quarantined == 0


def test_a_commit_of_a_lost_connection_is_no_offence() -> None:
    """A word that was under way when the link was lost may arrive before the next epoch begins."""
    r = Receiving()
    (lend, *_) = r.open()
    r.do(ev.LinkLost("A"))
    assert r.commit(lend) == []


def test_an_item_that_hears_a_lot_keeps_its_place_in_the_line() -> None:
    """Progress of a waiting item once sent it to the end of the line for blocks."""
    r = Receiving(blocks=1, rows_per_block=2)
    (lend,) = r.open(ms.ItemKey(9, 0), number=1)
    for key in (KEY, OTHER):
        r.open(key, number=1)
    r.says(ms.Progress(KEY, 1, "encoded", 0.0, 2))
    r.arrive(lend, ms.ItemKey(9, 0))
    assert [block.owner for block in r.pool.lent_to("A")] == [KEY]


def test_other_misfortunes_do_not_make_a_chunk_corrupt() -> None:
    """Failed writes and wrong checksums were counted together: one wrong chunk could end an item."""
    r = Receiving()
    lends = r.open()
    for _ in range(3):
        r.says(ms.Fenced(KEY, r.machine.items[KEY].epoch))
        r.do(ev.TimerFired(), after_s=2.0)
        lends = [lend for grant in every(r.offer(), ms.Grant) for lend in grant.lends]
    take = only(r.commit(lends[0]), ev.Take)
    assert not every(r.do(ev.RowsRefused(KEY, take.chunk)), ev.Fail)
    assert KEY in r.machine.items


def test_rows_that_are_refused_again_and_again_end_an_item_with_the_reason() -> None:
    """Without memory for its rows a request failed with "wrong checksums"."""
    r, why = Receiving(), "MemoryError('no room')"
    lends, failed = r.open(), list[ev.Fail]()
    for _ in range(20):
        take = only(r.commit(lends[0]), ev.Take)
        failed = every(r.do(ev.RowsRefused(KEY, take.chunk, why)), ev.Fail)
        if failed:
            break
        r.says(ms.Fenced(KEY, r.machine.items[KEY].epoch))
        r.do(ev.TimerFired(), after_s=2.0)
        lends = [lend for grant in every(r.offer(), ms.Grant) for lend in grant.lends]
    assert [fail.code for fail in failed] == ["undelivered"] and why in failed[0].message


def test_a_peer_that_wants_media_for_ever_is_left() -> None:
    """Every "send the media" was answered at once: two machines talking as fast as they can until the deadline."""
    r = Receiving()
    r.request()
    r.place()
    words = 0
    while KEY in r.machine.items and r.machine.items[KEY].peer == "A":
        r.offer(needs_media=True, ready=0)
        words += 1
        assert words < 20
    assert r.machine.items[KEY].peer is None


def test_rows_of_a_restarted_encode_reach_the_item_that_asked_meanwhile() -> None:
    """A cancelled job was wanted again before it had stopped: the second run filled a source that nobody looked at."""
    s = Sending()
    s.want()
    assert only(s.says(ms.Cancel(KEY, 1)), ev.CancelEncode)
    s.want(OTHER)
    again = s.do(ev.EncodeStopped(truth.digest_of(SIX), "cancelled", "", True))
    assert only(again, ev.DropSource) and only(again, ev.StartEncode)
    s.grant((0, 2), key=OTHER)
    assert only(s.ready(), ev.Write).stop == 2


def test_rows_of_a_cancelled_encode_are_not_written() -> None:
    """Its memory is dropped when it stops, so whoever asks meanwhile waits for the next run."""
    s = Sending()
    s.want()
    s.says(ms.Cancel(KEY, 1))
    s.want(OTHER)
    s.grant((0, 2), key=OTHER)
    assert not every(s.ready(stop=3), ev.Write)
    s.do(ev.EncodeStopped(truth.digest_of(SIX), "cancelled", "", True))
    assert only(s.ready(stop=2), ev.Write)


def test_a_write_from_a_failed_encode_is_never_restated() -> None:
    """The encode failed under a write: its memory was dropped, so what was written counts for nothing."""
    s = Sending()
    s.want()
    s.ready(stop=2)
    write = only(s.grant((0, 2)), ev.Write)
    only(s.do(ev.EncodeStopped(truth.digest_of(SIX), "oom", "", True)), ev.Fence)
    s.want(epoch=2)
    s.wrote(write)
    assert only(s.do(ev.WritesFenced("L", KEY)), ms.Offer).written == ()


def test_a_cancel_during_the_last_fence_is_answered() -> None:
    """The record was over but its write was not: the cancel was ignored and an older fence answered, or none."""
    s = Sending(retain_s=1.0)
    s.want(timeout_s=1.0)
    s.ready()
    write = only(s.grant((0, 2)), ev.Write)
    only(s.do(ev.TimerFired(), after_s=2.5), ev.Fence)
    s.says(ms.Cancel(KEY, 3))
    s.wrote(write)
    assert only(s.do(ev.WritesFenced("L", KEY)), ms.Fenced).epoch == 3


@pytest.mark.parametrize("span", [(5, 3), (2, 2), (0, 7), (2**61, 2**62)])
def test_a_grant_with_impossible_spans_is_a_protocol_error(span: tuple[int, int]) -> None:
    """Spans of a want were checked, those of a grant raised ValueError or were believed."""
    s = Sending()
    s.want()
    with pytest.raises(RemoteProtocolError):
        s.grant((0, 2), held=(span,))
    assert not s.machine.items["L", KEY].lends


@pytest.mark.parametrize("timeout_s", [math.nan, math.inf, -1.0])
def test_a_time_that_is_none_stops_no_timers(timeout_s: float) -> None:
    """Not-a-number at the head of the timers' heap would have stopped every other timer of the process."""
    with pytest.raises(RemoteProtocolError):
        ms.decode(ms.encode(want(timeout_s=timeout_s)), "L")


@pytest.mark.parametrize(
    "other",
    [
        {"grid_thw": (2**40, 1, 1)},
        {"grid_thw": (1, 6, 4)},
        {"kind": "video"},
        {"rows": 2**61, "grid_thw": (2**61, 1, 1)},
    ],
)
def test_a_want_that_lies_about_a_known_item_is_a_protocol_error(other: dict[str, Any]) -> None:
    """A cached digest with another grid gave the positions of that grid, or an overflow in the middle of a write."""
    s = Sending()
    s.want()
    s.ready()
    with pytest.raises(RemoteProtocolError):
        s.want(OTHER, **other)
    assert ("L", OTHER) not in s.machine.items


def test_a_want_of_epoch_zero_is_a_protocol_error() -> None:
    """Epochs begin at one; zero made a record that no want had filled."""
    with pytest.raises(RemoteProtocolError):
        Sending().want(epoch=0)


def test_files_go_as_soon_as_all_rows_exist() -> None:
    """A cached source kept its encoded files, which no capacity counts, for as long as its rows."""
    s = Sending()
    files = truth.spec(SIX).media
    s.want()
    s.ready(stop=2)
    source = s.machine.sources.get(truth.digest_of(SIX))
    assert source is not None and source.job.media == files, "it might have to be started again"
    s.ready()
    assert source.job.media == ()
    s.says(ms.Release(KEY, 1))
    assert not only(s.want(OTHER, media=None), ms.Offer).needs_media
    (write,) = every(s.grant((0, 6), key=OTHER), ev.Write)
    s.wrote(write)


def test_a_peer_whose_link_breaks_again_and_again_is_left() -> None:
    """A link that came back within its time began a new epoch without end; whoever dropped it at the item's words, a
    peer of other limits say, cut everybody else's items each time."""
    r = Receiving(max_attempts=3)
    r.open()
    for _ in range(2):
        r.do(ev.LinkLost("A"))
        only(r.do(ev.LinkUp("A")), ms.Want)
        r.offer()
    r.do(ev.LinkLost("A"))
    actions = r.do(ev.LinkUp("A"))
    assert only(actions, ev.Place).avoid == {"A"} and not every(actions, ms.Want)


def test_rows_that_come_between_two_cuts_count() -> None:
    r = Receiving(max_attempts=2, blocks=4)
    r.open(number=5)
    for _ in range(4):
        r.do(ev.LinkLost("A"))
        only(r.do(ev.LinkUp("A")), ms.Want)
        (grant,) = every(r.offer(), ms.Grant)
        r.arrive(grant.lends[0])


def test_small_regions_of_other_rows_than_the_chunks_are_a_protocol_error() -> None:
    r = Receiving()
    lend, *_ = r.open(meta=frozenset({Region.FILL_IDS}))
    chunk = ms.Chunk(lend.lease, lend.start, lend.stop, 7)
    right = r.meta(KEY, chunk)
    assert right is not None
    other = ms.Meta(right.start + 2, right.stop + 2, right.fill_ids, None, None)
    with pytest.raises(RemoteProtocolError, match="meta of rows"):
        r.says(ms.Commit(KEY, 1, chunk, other))
