"""What others shipped and their users hit, each as the list of events that showed it; none may come back here."""

from __future__ import annotations

import pytest

from aiodisagg.errors import RemoteProtocolError
from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms
from aiodisagg.protocol.events import State
from aiodisagg.protocol.rows import Region

from . import truth
from .lists import KEY, OTHER, Receiving, Sending, every, only, want

BIG = 7
"""An image of 24 rows."""


def lends_of(actions: list[object]) -> list[ms.Lend]:
    return [lend for grant in every(actions, ms.Grant) for lend in grant.lends]


def test_resume_queues_work() -> None:
    """A resume that only changed a state left the sender with nothing to do, and the item hung."""
    s = Sending()
    s.want()
    s.ready()
    s.wrote(only(s.grant((0, 2)), ev.Write))
    s.do(ev.LinkLost("L"))
    s.do(ev.LinkUp("L"))
    assert only(s.want(epoch=2, held=((0, 2),)), ms.Offer).ready == 6
    assert only(s.grant((2, 4), epoch=2, first=200), ev.Write).start == 2
    r = Receiving()
    r.open()
    r.do(ev.LinkLost("A"))
    assert only(r.do(ev.LinkUp("A")), ms.Want).epoch == 2
    assert lends_of(r.offer())


def test_rows_not_multiple_of_block() -> None:
    """Block numbers computed by dividing rows held pointed into the wrong block when rows did not fill it."""
    r = Receiving(blocks=2, rows_per_block=4)
    first, second = r.open()
    assert (first.start, first.stop, second.start, second.stop) == (0, 4, 4, 6)
    r.arrive(first, start=0, stop=3)
    r.do(ev.LinkLost("A"))
    assert only(r.do(ev.LinkUp("A")), ms.Want).held == ((0, 3),)
    again = lends_of(r.offer())
    assert [(lend.start, lend.stop) for lend in again] == [(3, 6)]
    take = only(r.commit(again[0]), ev.Take)
    assert take.offset == again[0].offset and take.size_bytes == 3 * truth.ROW_BYTES
    assert only(r.do(ev.RowsTaken(KEY, take.chunk)), ev.Finish)


def test_a_later_window_still_finds_aux() -> None:
    """The item's head went with the first block only; whoever read it at the second found nothing."""
    s = Sending()
    s.want(meta=(Region.FILL_IDS, Region.MROPE, Region.AUX))
    s.ready()
    first = s.wrote(only(s.grant((0, 2), (2, 4)), ev.Write))
    second = s.wrote(only(first, ev.Write))
    s.want(epoch=2, held=((0, 4),), meta=(Region.AUX,))
    third = s.wrote(only(s.grant((4, 6), epoch=2, first=200), ev.Write))
    for actions in (first, second, third):
        meta = only(actions, ms.Commit).meta
        assert meta is not None and meta.aux == truth.meta("item-2")[Region.AUX]


def test_receivers_of_one_item_have_ledgers_of_their_own() -> None:
    """Readers shared one notion of what was left; some resumed, some did not, and they waited for each other."""
    s = Sending()
    s.want(peer="L")
    s.want(peer="M", held=((0, 4),))
    s.ready()
    assert only(s.grant((0, 2), peer="L"), ev.Write).start == 0
    assert only(s.grant((4, 6), peer="M"), ev.Write).start == 4
    s.says(ms.Cancel(KEY, 1), "L")
    assert s.machine.items["M", KEY].state is State.TRANSFERRING


def test_a_resume_is_asked_for_once() -> None:
    """The condition for a resume stayed true from tick to tick, so that each tick resumed again."""
    r = Receiving()
    r.open()
    r.do(ev.LinkLost("A"))
    only(r.do(ev.LinkUp("A")), ms.Want)
    for _ in range(5):
        assert not r.do(ev.TimerFired(), after_s=0.1)
    r.offer()
    assert not every(r.offer(), ms.Want), "a repeated answer"
    assert r.machine.items[KEY].epoch == 2


def test_the_same_block_again_is_another_lease() -> None:
    """A new allocation happened to get the same block numbers, and "nothing changed" was concluded from that."""
    r = Receiving(blocks=1, rows_per_block=2)
    (first,) = r.open()
    (second,) = lends_of(r.arrive(first))
    assert second.offset == first.offset and second.lease != first.lease
    s = Sending()
    s.want()
    s.ready()
    s.wrote(only(s.says(ms.Grant(KEY, 1, (first,), ())), ev.Write))
    assert only(s.says(ms.Grant(KEY, 1, (second,), ((0, 2),))), ev.Write).lease == second.lease


def test_only_a_whole_ledger_is_success() -> None:
    """ "Last" came from a default instead of what the peer had allocated; a finished item became unfinished again."""
    r = Receiving(blocks=1, rows_per_block=4)
    (lend,) = r.open()
    (rest,) = lends_of(r.arrive(lend))
    assert r.machine.items[KEY].state is State.TRANSFERRING and (rest.start, rest.stop) == (4, 6)
    done = r.arrive(rest)
    assert only(done, ev.Finish) and only(done, ms.Release)
    for message in (ms.Progress(KEY, 1, "encoded", 0.0, 6), ms.Commit(KEY, 1, ms.Chunk(rest.lease, 4, 6, 7), None)):
        assert r.says(message) == []
    assert KEY not in r.machine.items


def test_deepstack_goes_with_its_rows_in_every_chunk() -> None:
    """DeepStack went with the first block only, though each row has its own: all others lost it, resumed ones too."""
    r = Receiving(blocks=2, rows_per_block=2)
    waiting = r.open()
    sizes = []
    while waiting:
        take = only(r.commit(waiting.pop(0)), ev.Take)
        sizes.append(take.size_bytes)
        waiting += lends_of(r.do(ev.RowsTaken(KEY, take.chunk)))
    assert sizes == [2 * truth.LAYOUT.row_bytes] * 3
    assert r.machine.counters.total("received", region=Region.DEEPSTACK) == len(truth.packed("item-2")) * 2 // 3


def test_positions_of_windows_do_not_mix_axes() -> None:
    """Positions were stored axis by axis in each window; put one behind the other they were scrambled."""
    s = Sending()
    s.want(number=BIG, meta=(Region.MROPE,))
    s.ready(BIG)
    got = b""
    actions = s.grant((0, 5), (5, 6), (6, 24))
    while writes := every(actions, ev.Write):
        actions = s.wrote(writes[0])
        meta = only(actions, ms.Commit).meta
        assert meta is not None and meta.mrope is not None and meta.aux is None
        got += meta.mrope
    assert got == truth.meta("item-7")[Region.MROPE]


def test_two_resumes_lose_nothing() -> None:
    """Only the first partial window was put aside; the second was freed without a copy."""
    r = Receiving(blocks=3, rows_per_block=2)
    waiting = r.open(number=BIG)
    for resume in range(3):
        r.arrive(waiting[0])
        r.do(ev.LinkLost("A"))
        held = only(r.do(ev.LinkUp("A")), ms.Want).held
        assert held == ((0, 2 * (resume + 1)),)
        waiting = lends_of(r.offer())
        assert waiting[0].start == 2 * (resume + 1)


def test_blocks_are_freed_once_and_only_when_fenced() -> None:
    """Old blocks were freed before the writer had stopped, and again on failure: two requests shared blocks."""
    r = Receiving(blocks=2, rows_per_block=2)
    r.open()
    actions = r.do(ev.ItemCancelled(KEY))
    leases = only(actions, ev.Revoke).leases
    assert only(actions, ms.Cancel) and r.pool.free == 0 and r.pool.quarantined == 2
    assert not r.open(OTHER), "blocks that may still be written are lent"
    lent = lends_of(r.says(ms.Fenced(KEY, 1)))
    assert [lend.start for lend in lent] == [0, 2] and r.pool.free == 0
    r.do(ev.LeasesRevoked(leases))
    r.says(ms.Fenced(KEY, 1))
    assert r.pool.free == 0 and len(r.pool.lent_to("A")) == 2


def test_item_larger_than_pool_finishes() -> None:
    """A resume asked for room for all that was left; what was larger than the pool never got it."""
    r = Receiving(blocks=1, rows_per_block=2)
    waiting = r.open(number=BIG)
    for window in range(12):
        actions = r.arrive(waiting[0])
        waiting = lends_of(actions)
        assert bool(waiting) == (window < 11)
    assert only(actions, ev.Finish) and r.pool.free == 1


def test_nothing_remembers_what_is_over() -> None:
    """Blocks were freed but the record of their owner was not: a slow leak."""
    r, s = Receiving(blocks=4, rows_per_block=2), Sending()
    for room in range(50):
        key = ms.ItemKey(room + 1, 0)
        for lend in r.open(key):
            done = r.arrive(lend, key)
        s.want(key)
        if room == 0:
            s.ready()
        s.wrote(only(s.grant((0, 2), key=key), ev.Write))
        s.says(only(done, ms.Release))
    assert not r.machine.items and not r.pool._lent and not r.machine._taking and not r.machine._timers
    assert not s.machine.items and not s.machine._timers and s.machine.next_timer() is None
    source = s.machine.sources.get("item-2")
    assert source is not None and not source.users


def test_a_transfer_without_progress_ends() -> None:
    """There was no timeout while transferring: blocks and rows were kept for a resume that never came."""
    r = Receiving()
    r.open(timeout_s=60.0)
    fails: list[ev.Fail] = []
    for _ in range(100):
        due = r.machine.next_timer()
        if due is None:
            break
        r.now = due
        actions = r.do(ev.TimerFired())
        fails += every(actions, ev.Fail)
        for place in every(actions, ev.Place):
            r.place(place.key)
    assert [fail.code for fail in fails] == ["deadline"] and fails[0].story and r.now == 60.0
    s = Sending(retain_s=30.0)
    s.want(timeout_s=60.0)
    s.ready()
    s.do(ev.LinkLost("L"))
    assert s.machine.next_timer() == 30.0
    s.do(ev.TimerFired(), after_s=30.0)
    assert not s.machine.items


def test_words_of_an_older_epoch_change_nothing() -> None:
    """Resumes and statuses had no epoch: late and repeated ones were replayed into blocks that belonged to others."""
    r = Receiving(blocks=4, rows_per_block=2)
    (lend, *_) = r.open()
    r.do(ev.LinkLost("A"))
    r.do(ev.LinkUp("A"))
    r.offer()
    before = repr(r.machine.items[KEY])
    assert r.commit(lend, epoch=1) == []
    assert r.says(ms.Progress(KEY, 1, "encoded", 0.0, 6)) == []
    assert r.says(ms.Refuse(KEY, 1, "oom", "", False)) == [] and repr(r.machine.items[KEY]) == before
    s = Sending()
    s.want(epoch=2)
    s.ready()
    assert s.grant((0, 2), epoch=1) == [] and s.want(epoch=1) == [] and s.says(ms.Cancel(KEY, 1)) == []
    assert s.says(ms.Release(KEY, 1)) == [] and s.machine.items["L", KEY].state is State.WAITING_FOR_INPUT


def test_a_failed_write_stops_one_item_only() -> None:
    """The thread that moved data raised and was gone; every later room waited for it."""
    s = Sending()
    s.want()
    s.want(OTHER)
    s.ready()
    write = only(s.grant((0, 2)), ev.Write)
    only(s.do(ev.WriteFailed("L", KEY, write.epoch, "broken")), ev.Fence)
    assert only(s.do(ev.WritesFenced("L", KEY)), ms.Fenced)
    assert only(s.grant((0, 2), key=OTHER), ev.Write)
    s.want(epoch=2)
    assert only(s.grant((0, 2), epoch=2, first=200), ev.Write)


def test_a_peer_that_failed_once_is_used_again() -> None:
    """One error put a peer on a list that only a first connection cleared: gone for ever after a short outage."""
    r = Receiving()
    r.open()
    r.do(ev.LinkLost("A"))
    place = only(r.do(ev.TimerFired(), after_s=1.1), ev.Place)
    assert place.avoid == {"A"}
    assert r.place(peer="A").epoch == 2, "there was no other, so the one to avoid is fine"
    r.request(OTHER)
    assert not r.place(OTHER, "A").held, "and for another item it is like any other"


def test_one_receivers_share_says_nothing_about_anothers() -> None:
    """Whether the last destination was complete decided for all destinations."""
    s = Sending()
    for peer in ("L", "M"):
        s.want(peer=peer)
    s.ready()
    s.wrote(only(s.grant((0, 2), peer="L"), ev.Write))
    s.wrote(only(s.grant((0, 6), peer="M"), ev.Write))
    s.says(ms.Release(KEY, 1), "M")
    assert s.machine.items["L", KEY].state is State.TRANSFERRING
    assert only(s.grant((2, 6), first=200, peer="L"), ev.Write).start == 2


@pytest.mark.parametrize(
    "chunk", [(0, 0, 2), (2**61, 0, 2), (None, 0, 3), (None, 1, 1), (None, 2, 1), (None, 4, 6)], ids=str
)
def test_what_a_peer_names_is_checked(chunk: tuple[int | None, int, int]) -> None:
    """Block numbers and addresses of a peer were used without a look at their bounds."""
    r = Receiving(blocks=4, rows_per_block=2)
    (lend, *_) = r.open()
    lease = lend.lease if chunk[0] is None else chunk[0]
    before = repr(r.machine), repr(r.machine.items[KEY])
    with pytest.raises(RemoteProtocolError):
        r.says(ms.Commit(KEY, 1, ms.Chunk(lease, chunk[1], chunk[2], 7), None))
    assert (repr(r.machine), repr(r.machine.items[KEY])) == before
    s = Sending()
    s.want()
    s.ready()
    for span in ((0, 7), (5, 5), (6, 2)):
        with pytest.raises(RemoteProtocolError):
            s.grant(span)
    for lie in ({"rows": 0}, {"rows": 25}, {"held": ((0, 7),)}, {"held": ((3, 1),)}):
        with pytest.raises(RemoteProtocolError):
            s.says(want(OTHER, **lie))
    assert not s.machine.items["L", KEY].lends and ("L", OTHER) not in s.machine.items


def test_a_block_of_another_item_cannot_be_claimed() -> None:
    """The same, from inside: a peer commits to one item what was lent for another."""
    r = Receiving(blocks=6, rows_per_block=2)
    (lend, *_) = r.open(KEY)
    r.open(OTHER, peer="B")
    for key, peer in ((OTHER, "B"),):
        with pytest.raises(RemoteProtocolError):
            r.says(ms.Commit(key, 1, ms.Chunk(lend.lease, 0, 2, 7), None), peer)


def test_a_lost_link_and_a_restarted_peer_are_resumed() -> None:
    """A link lost or a peer restarted was the end of the request."""
    r = Receiving(blocks=4, rows_per_block=2)
    (lend, *_) = r.open()
    r.arrive(lend)
    place = only(r.do(ev.LinkLost("A", gone=True)), ev.Place)
    assert place.avoid == {"A"}
    told = r.place(peer="A2")
    assert told.held == ((0, 2),) and told.media is not None and told.epoch == 2
    s = Sending()
    s.says(told)
    s.ready()
    assert only(s.says(only(r.offer(peer="A2"), ms.Grant)), ev.Write).start == 2
