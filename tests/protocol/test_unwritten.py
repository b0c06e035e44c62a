"""Writes that fail at once: no hot loop, the cause reaches whoever asked, and the item ends before its deadline."""

from __future__ import annotations

from typing import Any

import msgspec

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms
from aiodisagg.protocol.events import State

from .lists import KEY, OTHER, Receiving, Sending, every, only, want

WHY = "stream: connection refused to 127.0.0.1:46013"


class Unwritten(Receiving):
    """Every peer offers at once, and the first write fails as fast; whoever is not avoided is chosen next."""

    peers: tuple[str, ...] = ("A",)
    wants = 0
    first_of: dict[str, float]

    def run_out(self, seconds: float) -> ev.Fail | None:
        """Until the item failed or so much time passed; returns how it ended."""
        self.first_of = {}
        self.request()
        actions: list[Any] = [ev.Place(KEY, frozenset())]
        end = self.now + seconds
        while self.now < end:
            todo, actions = actions, []
            for action in todo:
                if isinstance(action, ev.Fail):
                    return action
                if isinstance(action, ev.Place):
                    others = [peer for peer in self.peers if peer not in action.avoid]
                    peer = (others or list(self.peers))[0]
                    self.first_of.setdefault(peer, self.now)
                    actions += self.do(ev.Placed(KEY, peer), after_s=0.001)
                elif isinstance(action, ev.Send) and isinstance(action.message, ms.Want):
                    self.wants += 1
                    self.offer(peer=action.peer)
                    actions += self.says(ms.Fenced(KEY, action.message.epoch, WHY), action.peer, after_s=0.001)
            if not actions:
                due = self.machine.next_timer()
                assert due is not None
                actions = self.do(ev.TimerFired(), after_s=max(0.0, due - self.now))
        return None


def test_writes_that_fail_at_once_are_no_hot_loop() -> None:
    """With no common data plane the two sides talked as fast as they could until the deadline: 6,089 epochs in 5 s."""
    r = Unwritten()
    r.run_out(300.0)
    assert r.wants < 20


def test_an_item_that_nobody_can_write_fails_with_the_cause() -> None:
    """All that was said was "deadline: not complete", after five minutes."""
    r = Unwritten()
    failed = r.run_out(50.0)
    assert failed is not None and failed.code == "unreachable"
    assert f"A: {WHY}" in failed.message and any(WHY in line for line in failed.story)
    assert 1.0 < r.now < 10.0, "neither at the first trouble, nor after a client's patience"
    assert r.pool.free == r.pool.blocks


def test_every_peer_is_tried_before_the_item_fails() -> None:
    """Another peer is asked within the second; the message names them all."""
    r = Unwritten()
    r.peers = ("A", "B", "C")
    failed = r.run_out(50.0)
    assert failed is not None and failed.code == "unreachable"
    assert r.first_of["B"] < 1.0 and set(r.first_of) == set(r.peers)
    assert all(f"{peer}: {WHY}" in failed.message for peer in r.peers)


def test_pauses_grow_and_rows_end_them() -> None:
    """The first failure, perhaps of one plane, is followed by the next epoch at once; so is the first after a row."""
    r = Receiving(pause_s=0.1, max_attempts=9)
    r.open()

    def fail() -> float:
        """Seconds from a failed write to the next Want."""
        actions = r.says(ms.Fenced(KEY, r.machine.items[KEY].epoch, WHY))
        if every(actions, ms.Want):
            return 0.0
        due = r.machine.next_timer()
        assert due is not None
        waited = due - r.now
        only(r.do(ev.TimerFired(), after_s=waited), ms.Want)
        return round(waited, 6)

    pauses = []
    for _ in range(6):
        pauses.append(fail())
        r.offer()
    assert pauses == [0.0, 0.1, 0.2, 0.4, 0.8, 1.0]
    lend = r.pool.lent_to("A")[0].lend
    r.arrive(lend)
    assert fail() == 0.0


def test_while_an_item_rests_its_blocks_are_for_others() -> None:
    """And what is said again of the epoch that is over changes nothing."""
    r = Receiving(blocks=3, rows_per_block=2)
    r.open()
    r.says(ms.Fenced(KEY, 1, WHY))
    r.offer()
    epoch = r.machine.items[KEY].epoch
    assert not every(r.says(ms.Fenced(KEY, epoch, WHY)), ms.Want)
    assert r.pool.free == 3
    assert r.offer() == [] and r.machine.items[KEY].state is State.BOOTSTRAPPING
    timer = r.machine.next_timer()
    assert r.says(ms.Fenced(KEY, epoch, WHY)) == [] and r.machine.next_timer() == timer
    assert len(r.open(OTHER)) == 3


def test_the_error_of_a_write_travels_in_the_fence() -> None:
    s = Sending()
    s.want()
    s.ready()
    only(s.grant((0, 2)), ev.Write)
    only(s.do(ev.WriteFailed("L", KEY, 1, WHY + "!" * 10_000)), ev.Fence)
    fenced = only(s.do(ev.WritesFenced("L", KEY)), ms.Fenced)
    assert fenced.reason.startswith(WHY)
    assert ms.decode(ms.encode(fenced), "A") == fenced, "no longer than a word may be"
    s.says(want(epoch=2))
    s.says(ms.Cancel(KEY, 2))
    assert only(s.says(ms.Cancel(KEY, 3)), ms.Fenced).reason == "", "asked for: no write failed"


def test_fences_of_older_peers_are_read_and_read_by_them() -> None:
    """The reason came later: a peer without it says two fields, and skips a third."""

    class Old(msgspec.Struct, frozen=True, tag="fenced", array_like=True):
        key: ms.ItemKey
        epoch: int

    assert ms.decode(msgspec.msgpack.encode(Old(KEY, 3)), "A") == ms.Fenced(KEY, 3)
    assert msgspec.msgpack.decode(ms.encode(ms.Fenced(KEY, 3, WHY)), type=Old) == Old(KEY, 3)
