"""A network on which a chunk takes longer than the receiver's patience: it is slow, and still every row comes once."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms
from aiodisagg.protocol.rows import ModelFingerprint

from . import truth
from .lists import KEY, Receiving, Sending, every, only

VIDEO, ROWS = 7, 24
TURN_S = 0.05


class Network:
    """A receiver, its peers, and one network for all that they write: ``row_s`` for each row, shared by turns.
    ``file_s``: so long is an item's file on its way, and what is said of the item comes after it."""

    def __init__(self, *peers: str, blocks: int = 4, row_s: dict[str, float], file_s: float = 0.0) -> None:
        self.receiving = Receiving(blocks=blocks, rows_per_block=4)
        self.sendings = {peer: Sending() for peer in peers}
        self.ends: dict[ms.ItemKey, ev.Finish | ev.Fail] = {}
        self.written: Counter[str] = Counter()
        self._row_s, self._file_s, self._now = row_s, file_s, 0.0
        self._jobs: dict[tuple[str, str], ev.StartEncode] = {}
        self._sent: dict[tuple[str, ms.ItemKey], float] = {}
        self._writes: dict[tuple[str, ms.ItemKey], tuple[ev.Write, float]] = {}
        self._line: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        for peer in peers:
            self._to_receiver(ev.LinkUp(peer))
            self._to_sender(peer, ev.LinkUp("L"))

    def fetch(self, items: int) -> None:
        for i in range(items):
            self._to_receiver(ev.ItemRequested(ms.ItemKey(1, i), truth.spec(VIDEO), 300.0))
        self._turn()
        while len(self.ends) < items:
            self._now, _, what = heapq.heappop(self._line)
            what()

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._line, (when, next(self._numbers), what))

    def _to_receiver(self, event: Any) -> None:
        self.receiving.now = self._now
        actions = self.receiving.do(event)
        for action in actions:
            match action:
                case ev.Send(peer, message):
                    with_file = isinstance(message, ms.Want) and message.media is not None
                    when = max(self._now, self._sent.get((peer, message.key), 0.0)) + (
                        self._file_s if with_file else 0.0
                    )
                    self._sent[peer, message.key] = when
                    self._at(when + 0.01, lambda p=peer, m=message: self._to_sender(p, ev.MessageReceived("L", m)))
                case ev.Place(key):  # whoever was asked longest ago
                    peer = next(iter(self.sendings))
                    self.sendings[peer] = self.sendings.pop(peer)
                    self._at(self._now, lambda key=key, peer=peer: self._to_receiver(ev.Placed(key, peer)))
                case ev.Take(key, chunk):
                    self._at(self._now, lambda k=key, chunk=chunk: self._to_receiver(ev.RowsTaken(k, chunk)))
                case ev.Revoke(_, leases):
                    self._at(self._now, lambda leases=leases: self._to_receiver(ev.LeasesRevoked(leases)))
                case ev.Finish(key) | ev.Fail(key):
                    self.ends[key] = action
        self._look(self.receiving, self._to_receiver)

    def _to_sender(self, peer: str, event: Any) -> None:
        self.sendings[peer].now = self._now
        for action in self.sendings[peer].do(event):
            match action:
                case ev.Send(_, message):
                    self._at(self._now + 0.01, lambda m=message: self._to_receiver(ev.MessageReceived(peer, m)))
                case ev.StartEncode():
                    self._jobs[peer, action.digest] = action
                    self._at(self._now + 0.1, lambda job=action: self._encoded(peer, job))
                case ev.CancelEncode(digest):
                    del self._jobs[peer, digest]
                    stopped = ev.EncodeStopped(digest, "cancelled", "", True)
                    self._at(self._now, lambda stopped=stopped: self._to_sender(peer, stopped))
                case ev.Write(_, key):
                    self._writes[peer, key] = action, float(action.stop - action.start)
                    self.written[peer] += action.stop - action.start
                case ev.Fence(_, key):
                    if (under_way := self._writes.pop((peer, key), None)) is not None:
                        failed = ev.WriteFailed("L", key, under_way[0].epoch, "stopped")
                        self._at(self._now, lambda failed=failed: self._to_sender(peer, failed))
                    self._at(self._now, lambda key=key: self._to_sender(peer, ev.WritesFenced("L", key)))
        self._look(self.sendings[peer], lambda event: self._to_sender(peer, event))

    def _encoded(self, peer: str, job: ev.StartEncode) -> None:
        if self._jobs.get((peer, job.digest)) is job:
            self._to_sender(peer, ev.RowsReady(job.digest, job.rows))

    def _look(self, side: Receiving | Sending, feed: Callable[[Any], None]) -> None:
        due = side.machine.next_timer()
        if due is not None:
            self._at(max(due, self._now), lambda: self._fire(side, feed))

    def _fire(self, side: Receiving | Sending, feed: Callable[[Any], None]) -> None:
        due = side.machine.next_timer()
        if due is not None and due <= self._now:
            feed(ev.TimerFired())

    def _turn(self) -> None:
        share = TURN_S / max(1, len(self._writes))
        for (peer, key), (write, left) in list(self._writes.items()):
            left -= share / self._row_s[peer]
            self._writes[peer, key] = write, left
            if left <= 0:
                del self._writes[peer, key]
                chunk = ms.Chunk(write.lease, write.start, write.stop, 7)
                self._to_sender(peer, ev.ChunkWritten("L", key, write.epoch, chunk))
        self._at(self._now + TURN_S, self._turn)


@pytest.mark.parametrize(("items", "row_s"), [(1, 1.3), (1, 4.0), (8, 0.3)])
def test_every_row_is_written_once(items: int, row_s: float) -> None:
    """Each chunk was begun anew every five seconds, and items failed by their deadline with no row of them there: one
    with chunks of 5.2 s, and eight at once with chunks of which one alone takes 1.2 s."""
    network = Network("A", blocks=32, row_s={"A": row_s})
    network.fetch(items)
    assert all(isinstance(end, ev.Finish) for end in network.ends.values())
    assert network.written == {"A": items * ROWS}


def test_who_is_too_slow_is_left_for_another() -> None:
    network = Network("A", "B", row_s={"A": 100.0, "B": 0.1})
    network.fetch(1)
    assert isinstance(network.ends[ms.ItemKey(1, 0)], ev.Finish)
    assert network.written["B"] == ROWS and 20.0 < network.receiving.now < 30.0


def test_who_is_alone_has_twice_as_long_each_time() -> None:
    """32 s for a chunk; a peer is left after 20 s of it."""
    network = Network("A", row_s={"A": 8.0})
    network.fetch(1)
    assert isinstance(network.ends[ms.ItemKey(1, 0)], ev.Finish)
    assert network.written == {"A": ROWS + 4}


def test_a_file_that_takes_longer_than_a_peer_is_waited_for() -> None:
    """It was on its way to one peer and then to the other, ten seconds each, until the item's deadline."""
    network = Network("A", "B", row_s={"A": 0.1, "B": 0.1}, file_s=15.0)
    network.fetch(1)
    assert isinstance(network.ends[ms.ItemKey(1, 0)], ev.Finish)
    assert network.receiving.now < 40.0


def test_a_peer_that_does_not_write_what_it_owes_is_asked_anew() -> None:
    """It does not say that it writes, as older peers do not."""
    receiving = Receiving()
    receiving.open()
    again = only(receiving.do(ev.TimerFired(), after_s=5.0), ms.Want)
    assert (again.epoch, again.media) == (1, None), "a new epoch would end its write"
    assert only(receiving.offer(), ms.Want).epoch == 2


def test_a_peer_that_owes_rows_and_does_not_answer_is_left() -> None:
    receiving = Receiving()
    receiving.open()
    epochs = [only(receiving.do(ev.TimerFired(), after_s=5.0), ms.Want).epoch for _ in range(2)]
    left = receiving.do(ev.TimerFired(), after_s=5.0)
    assert epochs == [1, 2] and every(left, ev.Place) and every(left, ms.Cancel)


def test_offers_of_older_peers_are_read_and_read_by_them() -> None:
    class Old(msgspec.Struct, frozen=True, tag="offer", array_like=True):
        key: ms.ItemKey
        epoch: int
        rows: int
        model: ModelFingerprint
        needs_media: bool
        ready: int
        written: tuple[()]

    said = (KEY, 1, 6, truth.MODEL, False, 6, ())
    assert ms.decode(msgspec.msgpack.encode(Old(*said)), "A") == ms.Offer(*said)
    assert msgspec.msgpack.decode(ms.encode(ms.Offer(*said, True)), type=Old) == Old(*said)
