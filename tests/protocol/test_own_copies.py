"""A sender's word that nothing moves any more says nothing of copies that the receiving side has begun itself."""

from __future__ import annotations

import pytest

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms
from aiodisagg.protocol.incoming import NOBODY

from .lists import KEY, OTHER, Receiving, every, only


@pytest.mark.parametrize("word", ["fenced", "fenced for good", "refused", "cancelled", "offered", "asked for media"])
def test_a_block_is_lent_again_only_after_the_copies_of_this_side(word: str) -> None:
    """zmq's thread was in the middle of a chunk when its sender, whose connection was lost, said that it had fenced:
    the block was lent to somebody else, and the rest of the chunk landed there."""
    r = Receiving(blocks=1, rows_per_block=6, max_attempts=1 if word == "fenced for good" else 8)
    (lend,) = r.open()
    r.copies = {lend.lease}
    match word:
        case "fenced" | "fenced for good":
            said = r.says(ms.Fenced(KEY, 1, "reset"))
        case "refused":
            said = r.says(ms.Refuse(KEY, 1, "oom", "", True))
        case "cancelled":
            assert only(r.do(ev.ItemCancelled(KEY)), ev.Revoke).peer == "A"
            said = r.says(ms.Fenced(KEY, 1))
        case _:
            r.do(ev.LinkLost("A"))
            r.do(ev.LinkUp("A"))
            said = r.offer(needs_media=word == "asked for media")
    assert only(said, ev.Revoke) == ev.Revoke(NOBODY, (lend.lease,))
    assert r.pool.quarantined == 1
    if word == "fenced":  # what it finished may be restated until then
        assert only(r.offer(), ev.Revoke).leases == (lend.lease,)
    assert not r.open(OTHER) and r.pool.get(lend.lease) is not None
    assert not r.pool.admits(lend.offset, 1, lend.lease), "no other copy begins"
    (grant,) = every(r.do(ev.LeasesRevoked((lend.lease,))), ms.Grant)
    assert [again.offset for again in grant.lends] == [lend.offset]
    assert r.pool.get(lend.lease) is None and not r.pool.quarantined
    before = repr(r.pool)
    r.do(ev.LeasesRevoked((lend.lease,)))  # each word asked anew
    assert repr(r.pool) == before


def test_a_reader_and_a_copy_both_keep_a_block() -> None:
    """Rows of a block that were restated are read while a copy of others is in progress there."""
    r = Receiving(blocks=1, rows_per_block=6)
    (lend,) = r.open()
    r.copies = {lend.lease}
    r.do(ev.LinkLost("A"))
    r.do(ev.LinkUp("A"))
    chunk = ms.Chunk(lend.lease, 0, 2, 7)
    take = only(r.offer(written=((chunk, None),)), ev.Take)
    r.do(ev.RowsTaken(KEY, take.chunk))
    assert r.pool.quarantined == 1 and r.pool.free == 0
    (grant,) = every(r.do(ev.LeasesRevoked((lend.lease,))), ms.Grant)
    assert [(again.start, again.stop) for again in grant.lends] == [(2, 6)]
    assert list(r.machine.items[KEY].lends) == [grant.lends[0].lease]
