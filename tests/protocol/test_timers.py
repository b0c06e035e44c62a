"""Who wants to be woken when: in order, and nothing is kept of who does not any more."""

from __future__ import annotations

from random import Random

import pytest

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms
from aiodisagg.protocol.timers import Timers

from .lists import KEY, Receiving, Sending

FINISHED = [ms.ItemKey(room, 0) for room in range(2, 2002)]


def test_a_sender_keeps_nothing_of_items_that_are_over() -> None:
    """Each left two entries in the heap of timers until its deadline, which may be hours away."""
    s = Sending()
    s.want()
    for key in FINISHED:
        s.want(key)
        s.says(ms.Release(key, 1))
    assert len(s.machine._timers._heap) < 100 and s.machine.next_timer() == 90.0


def test_a_receiver_keeps_nothing_of_items_that_are_over() -> None:
    r = Receiving()
    r.open()
    for key in FINISHED:
        r.request(key)
        r.place(key)
        r.do(ev.ItemCancelled(key))
    assert len(r.machine._timers._heap) < 100 and r.machine.next_timer() == r.machine.items[KEY].timer


def test_items_that_were_open_together_leave_nothing_either() -> None:
    s, r = Sending(), Receiving()
    s.want()
    r.open()
    for key in FINISHED:
        s.want(key)
        r.request(key)
    for key in FINISHED:
        s.says(ms.Cancel(key, 1))
        r.do(ev.ItemCancelled(key))
    assert len(s.machine._timers._heap) < 100 and len(r.machine._timers._heap) < 100


@pytest.mark.parametrize("seed", range(20))
def test_they_come_in_order_whatever_was_armed_anew_or_disarmed(seed: int) -> None:
    random = Random(seed)
    timers: Timers[int] = Timers()
    due: dict[int, float] = {}
    now = 0.0
    for _ in range(600):
        key = random.randrange(30)
        match random.randrange(3):
            case 0:
                due.pop(key, None)
                timers.disarm(key)
            case 1 | 2:
                due[key] = now + random.randrange(50)
                timers.arm(key, due[key])
        if not random.randrange(10):
            now += random.randrange(5)
            while (taken := timers.take(now)) is not None:
                when, first = min((when, key) for key, when in due.items())
                assert (taken, when <= now) == (first, True)
                del due[first]
        assert timers.next() == min(due.values(), default=None)
        assert len(timers) == len(due) and all(key in timers for key in due)
        assert len(timers._heap) <= 2 * len(due) + 64
    assert [timers.take(1e9) for _ in range(len(due) + 1)] == [
        *(key for _, key in sorted((when, key) for key, when in due.items())), None,
    ]  # fmt: skip
