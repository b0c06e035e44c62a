"""Peers whose rows come with wrong checksums: another is asked, and the item fails only when it is no peer's doing."""

from __future__ import annotations

from collections.abc import Collection

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms

from .lists import KEY, Receiving, every, only


class Spoiled(Receiving):
    """Whoever is not avoided is chosen next; chunks of ``spoilers`` are refused."""

    def run_out(self, peers: Collection[str], spoilers: Collection[str]) -> tuple[list[str], ev.Fail | None]:
        """Who was asked, and how the item failed, if it did."""
        self.request()
        asked: list[str] = []
        avoid: frozenset[str] = frozenset()
        while True:
            peer = next((peer for peer in peers if peer not in avoid), next(iter(peers)))
            actions = self.do(ev.Placed(KEY, peer))
            if failed := every(actions, ev.Fail):
                return asked, failed[0]
            asked.append(peer)
            actions = self.offer(peer=peer)
            while KEY in self.machine.items and not (places := every(actions, ev.Place)):
                (lend, *_) = [lend for grant in every(actions, ms.Grant) for lend in grant.lends] or [
                    block.lend for block in self.pool.lent_to(peer) if not block.revoked
                ]
                chunk = only(self.commit(lend, peer=peer), ev.Take).chunk
                actions = self.do((ev.RowsRefused if peer in spoilers else ev.RowsTaken)(KEY, chunk))
            if KEY not in self.machine.items:
                return asked, None
            avoid = places[0].avoid


def test_another_peer_is_asked_when_checksums_of_one_never_match() -> None:
    """It was asked in the same epoch, by the same plane, until the item failed; and so was the next item."""
    assert Spoiled().run_out(["A", "B"], ["A"]) == (["A", "B"], None)


def test_where_every_peers_rows_come_spoiled_the_item_fails() -> None:
    for peers in (["A"], ["A", "B"], list("ABCDEFGHI")):
        asked, failed = Spoiled().run_out(peers, peers)
        assert asked == peers[:4] and failed is not None and failed.code == "corrupt"
        assert all(peer in failed.message for peer in asked)


def test_one_wrong_checksum_is_asked_for_again_there() -> None:
    r = Spoiled()
    (lend, *_) = r.open()
    actions = r.do(ev.RowsRefused(KEY, only(r.commit(lend), ev.Take).chunk))
    (again,) = only(actions, ms.Grant).lends
    assert (again.start, again.stop) == (lend.start, lend.stop) and r.machine.items[KEY].peer == "A"


def test_chunks_that_a_peer_left_behind_count_against_it_alone() -> None:
    """They are read while the item is at the next peer already."""
    r = Spoiled(max_attempts=2)
    lends = r.open()
    chunks = [only(r.commit(lend), ev.Take).chunk for lend in lends]
    r.do(ev.RowsRefused(KEY, chunks[0]))
    assert only(r.do(ev.RowsRefused(KEY, chunks[1])), ev.Place).avoid == {"A"}
    r.place(peer="B")
    assert not every(r.do(ev.RowsRefused(KEY, chunks[2])), ev.Place)
    r.offer(peer="B")
    while KEY in r.machine.items:
        (lend, *_) = [block.lend for block in r.pool.lent_to("B") if not block.revoked]
        r.arrive(lend, peer="B")
