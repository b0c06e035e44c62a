"""One peer never gets all the blocks that others need: if it is stopped, it keeps what it holds."""

from __future__ import annotations

import pytest

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms
from aiodisagg.protocol.events import State

from .lists import Receiving, every

BIG = 7
"""An image of 24 rows: twelve blocks."""


class Shared(Receiving):
    """A receiver whose peers are linked; ``held``: blocks that a peer holds, in quarantine or not."""

    def __init__(self, *peers: str, blocks: int = 16, window: int = 4) -> None:
        super().__init__(blocks=blocks, rows_per_block=2, window_blocks=window)
        for peer in peers:
            self.do(ev.LinkUp(peer))
        self.rooms = 0

    def items(self, peer: str, count: int) -> list[ms.ItemKey]:
        """So many items are asked of a peer that has all of their rows."""
        keys = [ms.ItemKey(self.rooms + i + 1, 0) for i in range(count)]
        self.rooms += count
        for key in keys:
            self.open(key, BIG, peer)
        return keys

    def held(self, peer: str) -> int:
        return len(self.pool.lent_to(peer))


def test_a_stopped_peer_leaves_blocks_for_others() -> None:
    """It held the whole pool, in quarantine until it ran again, and no image of any other peer could arrive."""
    r = Shared("A", "B")
    r.items("A", 20)
    assert 8 <= r.held("A") < 16
    r.do(ev.LinkLost("A"))
    assert r.pool.quarantined == r.held("A")
    (key,) = r.items("B", 1)
    while key in r.machine.items:
        lend = r.pool.lent_to("B")[0].lend
        r.arrive(lend, key, "B")


def test_peers_that_stop_one_after_another_leave_blocks_for_the_last() -> None:
    """What the first one holds is nobody's to share: of the rest, the second gets no more than a part."""
    r = Shared("A", "B", "C")
    for peer in ("A", "B"):
        r.items(peer, 20)
        r.do(ev.LinkLost(peer))
    assert r.pool.quarantined == r.held("A") + r.held("B")
    r.items("C", 1)
    assert r.held("C") > 0


@pytest.mark.parametrize("blocks", [1, 2, 3, 16])
def test_a_single_peer_may_have_every_block(blocks: int) -> None:
    r = Shared("A", blocks=blocks)
    r.items("A", 20)
    assert r.held("A") == blocks


def test_busy_peers_share_evenly_whoever_came_first() -> None:
    """A took more than its part while nobody wanted it; as blocks come back they go to B until both have the same."""
    r = Shared("A", "B")
    r.items("A", 20)
    r.items("B", 20)
    for _ in range(100):
        if (r.held("A"), r.held("B")) == (8, 8):
            break
        block = r.pool.lent_to("A")[0]
        r.arrive(block.lend, block.owner, "A")
    assert (r.held("A"), r.held("B")) == (8, 8)


def test_an_item_that_is_passed_over_keeps_its_place() -> None:
    r = Shared("A", "B", blocks=4)
    ours = r.items("A", 3)
    assert r.held("A") == 3 and r.pool.free == 1
    before = list(r.machine._eager)
    assert set(before) == set(ours)
    (other,) = r.items("B", 1)
    assert r.held("B") == 1
    assert list(r.machine._eager) == [*before, other]
    r.do(ev.LinkLost("B", gone=True))
    assert r.held("A") == 3, "B's block may still be written"
    r.do(ev.LeasesRevoked(tuple(block.lend.lease for block in r.pool.lent_to("B"))))
    assert r.held("A") == 4, "and with B gone there is nobody to leave it for"


def test_the_story_says_that_an_item_waits_for_a_block() -> None:
    """Its rows were ready, nothing moved, and nothing was said of it."""
    r = Shared("A", blocks=1, window=1)
    _, waiting = r.items("A", 2)
    item = r.machine.items[waiting]
    assert item.state is State.WAITING_FOR_INPUT and not item.lends
    for _ in range(6):  # now it has the block, now the other one
        (block,) = r.pool.lent_to("A")
        r.arrive(block.lend, block.owner)
    (failed,) = every(r.do(ev.ItemCancelled(waiting)), ev.Fail)
    said = [line for line in failed.story if "waits for a free block" in line]
    assert said == ["0.000s waits for a free block of <BlockPool 0 free, 1 lent, 0 quarantined>"], "once in an epoch"


def test_an_item_with_blocks_does_not_say_that_it_waits() -> None:
    r = Shared("A", blocks=2)
    (key,) = r.items("A", 1)
    r.arrive(r.pool.lent_to("A")[0].lend, key)
    (failed,) = every(r.do(ev.ItemCancelled(key)), ev.Fail)
    assert not any("waits for a free block" in line for line in failed.story)
