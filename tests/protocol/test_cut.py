"""Cut at step k: for every message of a reference transfer the link is lost instead of it, and the transfer resumes."""

from __future__ import annotations

from collections import Counter

import pytest

from aiodisagg.protocol.messages import ItemKey

from . import truth
from .plans import PATIENT_S, Asked, Plan
from .world import World

ROWS_PER_BLOCK = 4


def reference(one_sided: bool, senders: int = 1, blocks: int = 3) -> Plan:
    """Four items of 24, 15, 20 and 8 rows through three blocks of four rows: many windows."""
    asked = tuple(Asked(0.01 * i, number, PATIENT_S, truth.ALL_META) for i, number in enumerate((7, 5, 6, 4)))
    return Plan(
        seed=5, senders=senders, one_sided=one_sided, blocks=blocks, rows_per_block=ROWS_PER_BLOCK,
        window_blocks=blocks - 1, capacity_rows=1000, encode_row_s=0.001, slow=0.0, asked=asked, faults=(),
    )  # fmt: skip


def sent_twice(world: World) -> Counter[ItemKey]:
    """Rows of each item that were written again."""
    again: Counter[ItemKey] = Counter()
    for (key, _), times in world.writes.items():
        again[key] += times - 1
    return again


@pytest.mark.parametrize(("one_sided", "blocks"), [(True, 3), (False, 3), (True, 6), (False, 6)])
def test_cut_at_every_message(one_sided: bool, blocks: int) -> None:
    """Every byte of every region arrives, and a cut costs at most the one chunk per item that was in flight, however
    many were written whose commits were lost."""
    undisturbed = World(reference(one_sided, blocks=blocks))
    undisturbed.run()
    assert undisturbed.messages > (60 if blocks == 3 else 50) and not sum(sent_twice(undisturbed).values())
    total = 0
    for k in range(1, undisturbed.messages + 1):
        world = World(reference(one_sided, blocks=blocks), cut_at=k)
        world.run()  # compares all bytes of all regions with the truth
        assert set(world.ended.values()) == {"success"}, k
        again = sent_twice(world)
        assert all(rows <= ROWS_PER_BLOCK for rows in again.values()), (k, again)
        counters = world.senders[0].machine.counters
        assert counters.total("resent") == sum(again.values()) * truth.ROW_BYTES
        total += sum(again.values())
    assert total or one_sided  # a cut of the words does not stop one-sided writes: they are restated, not repeated


def test_cut_at_every_message_and_another_peer_goes_on() -> None:
    """The link stays away for too long: the items move to the other peer, which sends only what is not held."""
    length = World(reference(True, senders=2))
    length.run()
    moved = 0
    for k in range(1, length.messages + 1, 3):
        world = World(reference(True, senders=2), cut_at=k, pause_s=30.0)
        world.run()
        assert set(world.ended.values()) == {"success"}, k
        again = sent_twice(world)
        moved += sum(1 for process in world.senders if process.machine.counters.total("sent")) == 2
        # what was written but whose commit was lost with the link cannot be restated by another peer
        assert all(rows <= 2 * ROWS_PER_BLOCK for rows in again.values()), (k, again)
    assert moved > 5
