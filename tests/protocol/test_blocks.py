"""The block pool: one owner per block, leases never used twice, nothing free that may still be written or read."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiodisagg.protocol.blocks import BlockPool, LentBlock

from . import truth
from .lists import KEY, OTHER, Receiving


def test_a_block_that_was_reported_whole_is_free_again() -> None:
    pool = BlockPool(2, 4, 10)
    lent = pool.lend(KEY, "A", 1, 8, 12)
    assert (lent.lend.start, lent.lend.stop, lent.size_bytes, pool.free) == (8, 12, 40, 1)
    lent.spent.add(8, 11)
    assert not pool.settle(lent)
    lent.spent.add(11, 12)
    assert pool.settle(lent) and pool.free == 2 and pool.get(lent.lend.lease) is None
    assert not pool.settle(lent) and pool.free == 2, "freed twice"


@pytest.mark.parametrize(
    ("revoked", "fenced", "kept", "pins", "free"),
    [
        (False, False, False, 0, False),
        (True, False, False, 0, False),
        (True, True, True, 0, False),
        (True, True, False, 1, False),
        (True, True, False, 0, True),
    ],
)
def test_when_an_unfinished_block_is_free(revoked: bool, fenced: bool, kept: bool, pins: int, free: bool) -> None:
    """Only when its writer is fenced, its owner can learn nothing more from it, and nobody reads it."""
    pool = BlockPool(1, 4, 10)
    lent = pool.lend(KEY, "A", 1, 0, 4)
    lent.revoked, lent.fenced, lent.kept, lent.pins = revoked, fenced, kept, pins
    assert pool.quarantined == (revoked and not fenced)
    assert pool.settle(lent) is free and pool.free == free


def test_the_gate_admits_only_what_a_live_lease_covers() -> None:
    pool = BlockPool(2, 4, 10)
    lent = pool.lend(KEY, "A", 1, 0, 3)
    lease, offset = lent.lend.lease, lent.lend.offset
    assert pool.admits(offset, 30, lease) and pool.admits(offset + 10, 20, lease)
    assert not pool.admits(offset, 31, lease), "rows of the block that were not lent"
    assert not pool.admits(offset - 1, 2, lease) and not pool.admits(offset, -1, lease)
    assert not pool.admits(offset, 10, lease + pool.blocks), "a lease of the future"
    lent.revoked = True
    assert not pool.admits(offset, 10, lease)


def test_a_late_lease_is_told_from_an_invented_one() -> None:
    pool = BlockPool(2, 4, 10)
    lent = pool.lend(KEY, "A", 1, 0, 4)
    lent.spent.add(0, 4)
    pool.settle(lent)
    assert pool.issued(lent.lend.lease)
    assert not any(pool.issued(lease) for lease in (0, 1, lent.lend.lease + 2, lent.lend.lease ^ 1, 2**62))


def test_a_late_lease_is_known_after_millions_of_others() -> None:
    pool = BlockPool(2, 4, 10)
    pool._lends = 2**22 - 1
    leases = []
    for _ in range(3):
        lent = pool.lend(KEY, "A", 1, 0, 4)
        lent.spent.add(0, 4)
        assert pool.settle(lent)
        leases.append(lent.lend.lease)
    assert len(set(leases)) == 3 and max(leases) < 2**62 and all(map(pool.issued, leases))
    assert not any(pool.issued(lease ^ 1) for lease in leases)


def test_a_lease_cannot_be_guessed_from_others() -> None:
    """Any proved writer could write where another one was to write: a lease was the block's number and a count."""
    pools = [BlockPool(2, 4, 10, secret) for secret in (b"one life", b"another")]
    mine, others = ([pool.lend(KEY, "A", 1, 0, 4).lend.lease for _ in range(2)] for pool in pools)
    assert not set(mine) & set(others)
    assert not any(pools[0].admits(offset, 10, lease) for lease in others for offset in (0, 40))
    near = [lease + step for lease in mine for step in range(-500, 500) if step]
    assert not any(pools[0].admits(offset, 10, lease) for lease in near for offset in (0, 40))


def test_nothing_is_placed_on_rows_that_were_committed() -> None:
    """They are being copied: what is written there then is taken without a second look."""
    r = Receiving(rows_per_block=4)
    (lend, *_) = r.open()
    assert r.pool.admits(lend.offset, 2 * truth.ROW_BYTES, lend.lease)
    r.commit(lend, start=0, stop=2)
    assert not any(r.pool.admits(lend.offset + row * truth.ROW_BYTES, truth.ROW_BYTES, lend.lease) for row in (0, 1))
    assert r.pool.admits(lend.offset + 2 * truth.ROW_BYTES, 2 * truth.ROW_BYTES, lend.lease)


@pytest.mark.parametrize("sizes", [(0, 4, 10), (2, 0, 10), (2, 4, 0), (-1, 4, 10)])
def test_an_impossible_pool(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="not a pool"):
        BlockPool(*sizes)


@pytest.mark.parametrize("span", [(0, 5), (3, 3), (3, 2)])
def test_rows_that_fit_no_block(span: tuple[int, int]) -> None:
    pool = BlockPool(1, 4, 10)
    with pytest.raises(ValueError, match="does not fit"):
        pool.lend(KEY, "A", 1, *span)
    assert pool.free == 1


@given(st.randoms(use_true_random=False))
def test_no_order_of_events_loses_or_doubles_a_block(random: Random) -> None:
    """Random lends, reports, revocations, fences and settles: blocks are disjoint, leases new, all come back."""
    pool = BlockPool(3, 4, 10)
    lent: list[LentBlock] = []
    leases: set[int] = set()
    for _ in range(40):
        if pool.free and random.randrange(2):
            block = pool.lend(random.choice((KEY, OTHER)), "A", 1, 0, 4)
            assert block.lend.lease not in leases and pool.issued(block.lend.lease)
            leases.add(block.lend.lease)
            lent.append(block)
        elif lent:
            block = random.choice(lent)
            match random.randrange(3):
                case 0:
                    block.spent.add(0, random.randrange(5))
                case 1:
                    block.revoked = True
                case 2:
                    block.fenced = block.revoked
            if pool.settle(block):
                lent.remove(block)
        offsets = [block.lend.offset for block in lent]
        assert len(set(offsets)) == len(offsets) and pool.free + len(lent) == 3
        assert pool.lent_to("A") == sorted(lent, key=lambda block: pool.lent_to("A").index(block))
    for block in lent:
        block.revoked = block.fenced = True
        assert pool.settle(block)
    assert pool.free == 3
