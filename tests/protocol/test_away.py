"""A receiver without a link keeps what it asked for until somebody who has one needs the room, or it is forgotten."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms

from . import truth
from .lists import KEY, OTHER, Sending, every, only

ONE, TWO, NINE = 0, 1, 3
"""Numbers of images of so many rows."""
FILE_BYTES = len(truth.digest_of(0))


def key(room: int) -> ms.ItemKey:
    return ms.ItemKey(room, 0)


def started(actions: list[Any]) -> list[str]:
    return [job.digest for job in every(actions, ev.StartEncode)]


def lost(rows: int = 6, **config: Any) -> Sending:
    """Six rows are kept for L, which has no link any more."""
    s = Sending(capacity_bytes=rows * truth.ROW_BYTES, **config)
    s.want()
    s.ready()
    assert s.do(ev.LinkLost("L")) == []
    return s


def test_who_waits_gets_the_room_of_a_receiver_that_is_away() -> None:
    """A killed language peer's rows kept everybody else's items from the tower for as long as it might come back."""
    s = lost()
    actions = s.want(OTHER, number=TWO, peer="M")
    assert only(actions, ev.DropSource).digest == "item-2" and started(actions) == ["item-1"]
    assert ("L", KEY) not in s.machine.items


def test_who_waits_already_gets_it_when_the_link_is_lost() -> None:
    s = Sending(capacity_bytes=6 * truth.ROW_BYTES)
    s.want()
    s.ready()
    assert not started(s.want(OTHER, number=TWO, peer="M"))
    assert started(s.do(ev.LinkLost("L"))) == ["item-1"]


def test_rows_of_who_is_away_stay_while_nobody_else_needs_the_room() -> None:
    s = lost(8, retain_s=30.0)
    assert started(s.want(OTHER, number=TWO, peer="M")) == ["item-1"]
    s.do(ev.TimerFired(), after_s=29.9)
    assert s.machine.items["L", KEY].source is not None
    s.do(ev.LinkUp("L"))
    offer = only(s.want(epoch=2, media=None), ms.Offer)
    assert (offer.needs_media, offer.ready) == (False, 6)
    s.do(ev.LinkLost("L"))
    s.do(ev.TimerFired(), after_s=30.0)
    assert ("L", KEY) not in s.machine.items


def test_who_is_away_itself_takes_no_room_of_others() -> None:
    """Nobody with a link waits, so of two that are away neither loses anything."""
    s = Sending(capacity_bytes=6 * truth.ROW_BYTES)
    s.want()
    s.ready()
    s.want(OTHER, number=TWO, peer="M")
    assert s.do(ev.LinkLost("M")) == [] and s.do(ev.LinkLost("L")) == []
    assert set(s.machine.items) == {("L", KEY), ("M", OTHER)}
    assert started(s.do(ev.LinkUp("M"))) == ["item-1"]


def test_who_returns_to_nothing_sends_its_files_again() -> None:
    s = lost()
    s.want(OTHER, number=TWO, peer="M")
    s.do(ev.LinkUp("L"))
    assert only(s.want(epoch=2, media=None), ms.Offer).needs_media
    assert not only(s.want(epoch=3), ms.Offer).needs_media
    s.ready(TWO)
    assert started(s.says(ms.Release(OTHER, 1), "M")) == ["item-2"]
    s.ready()
    assert only(s.grant((0, 6), epoch=3), ev.Write).stop == 6


def test_jobs_of_who_is_away_are_cancelled_for_who_waits_and_queued_ones_go_behind() -> None:
    """The tower encoded what nobody wanted, and the line went on with more of it."""
    s = Sending(capacity_bytes=6 * truth.ROW_BYTES)
    assert started(s.want()) == ["item-2"]
    assert not started(s.want(OTHER, number=TWO))
    assert s.do(ev.LinkLost("L")) == []
    actions = s.want(key(3), number=ONE, peer="M")
    assert only(actions, ev.CancelEncode).digest == "item-2" and not started(actions)
    actions = s.do(ev.EncodeStopped("item-2", "cancelled", "", True))
    assert started(actions) == ["item-0", "item-1"], "what is left is for whoever may come back"


def test_no_more_is_given_up_than_is_needed_the_oldest_first() -> None:
    s = Sending(capacity_bytes=3 * truth.ROW_BYTES)
    for room, number in ((1, TWO), (2, ONE)):
        s.want(key(room), number=number)
        s.ready(number)
    s.want(key(1), epoch=2, number=TWO)  # asked for last
    s.do(ev.LinkLost("L"))
    actions = s.want(key(3), number=8, peer="M")  # one row as well
    assert only(actions, ev.DropSource).digest == "item-0" and started(actions) == ["item-8"]
    assert ("L", key(1)) in s.machine.items and ("L", key(2)) not in s.machine.items


def test_room_that_is_about_to_be_free_is_waited_for() -> None:
    """A write may still read the rows: they go with its fence, and nothing else is given up meanwhile."""
    s = Sending(capacity_bytes=8 * truth.ROW_BYTES)
    s.want()
    s.ready()
    write = only(s.grant((0, 2)), ev.Write)
    s.want(OTHER, number=TWO)
    s.ready(TWO)
    only(s.do(ev.LinkLost("L")), ev.Fence)
    assert s.want(key(3), number=ONE, peer="M") == [only_offer(s, "M", key(3))]
    assert not started(s.wrote(write)) and ("L", OTHER) in s.machine.items
    actions = s.do(ev.WritesFenced("L", KEY))
    assert only(actions, ev.DropSource).digest == "item-2" and started(actions) == ["item-0"]
    assert ("L", OTHER) in s.machine.items and ("L", KEY) not in s.machine.items


def only_offer(s: Sending, peer: str, key: ms.ItemKey) -> ev.Send:
    """The offer of an item that is not encoded yet."""
    item = s.machine.items[peer, key]
    return ev.Send(peer, ms.Offer(key, 1, item.rows, truth.MODEL, False, 0, ()))


def test_who_returns_before_the_fence_has_its_rows_again() -> None:
    s = Sending(capacity_bytes=6 * truth.ROW_BYTES)
    s.want()
    s.ready()
    write = only(s.grant((0, 2)), ev.Write)
    s.do(ev.LinkLost("L"))
    s.want(OTHER, number=ONE, peer="M")
    s.do(ev.LinkUp("L"))
    s.want(epoch=2, media=None)
    s.wrote(write)
    actions = s.do(ev.WritesFenced("L", KEY))
    assert only(actions, ms.Offer).ready == 6 and not started(actions)
    write = only(s.grant((2, 4), epoch=2), ev.Write)
    only(s.do(ev.LinkLost("L")), ev.Fence)
    s.wrote(write)
    assert started(s.do(ev.WritesFenced("L", KEY))) == ["item-0"], "and gives them up once more"


def test_who_asks_is_not_away() -> None:
    """A want says as much as a LinkUp."""
    s = lost()
    assert only(s.want(epoch=2, media=None), ms.Offer).ready == 6
    assert not started(s.want(OTHER, number=TWO, peer="M"))


def test_what_somebody_with_a_link_wants_too_is_not_given_up() -> None:
    s = Sending(capacity_bytes=6 * truth.ROW_BYTES)
    s.want()
    s.want(OTHER, peer="M")
    s.ready()
    s.do(ev.LinkLost("L"))
    assert not started(s.want(key(3), number=ONE, peer="N"))
    assert ("L", KEY) in s.machine.items


def test_files_of_who_is_away_are_put_aside_for_who_is_not() -> None:
    """Its queue kept the room for files, so that others were put aside behind it until it was forgotten."""
    s = Sending(capacity_bytes=9 * truth.ROW_BYTES, file_bytes=2 * FILE_BYTES)
    for number in (NINE, ONE, TWO):  # in the tower, queued, put aside
        s.want(key(number + 1), number=number)
    s.do(ev.LinkLost("L"))
    assert only(s.want(key(9), number=4, peer="M"), ev.CancelEncode).digest == "item-3"
    sources = s.machine.sources
    assert [digest for digest in sources._sources if sources._sources[digest].job.media] == ["item-3", "item-4"]
    assert list(sources._aside) == ["item-0", "item-1"] and sources.file_bytes == 2 * FILE_BYTES
    assert started(s.do(ev.EncodeStopped("item-3", "cancelled", "", True))) == ["item-4"]
    s.do(ev.LinkUp("L"))
    assert only(s.want(key(ONE + 1), 2, ONE, media=None), ms.Offer).needs_media
    assert not only(s.want(key(ONE + 1), 3, ONE), ms.Offer).needs_media
    assert not only(s.want(key(TWO + 1), 2, TWO, media=None), ms.Offer).needs_media, "no room yet"


class Traffic:
    """A sender with three receivers whose links come and go, and a shell that does what it is asked for."""

    PEERS = ("L", "M", "N")

    def __init__(self, random: Random) -> None:
        self.random = random
        self.s = Sending(capacity_bytes=12 * truth.ROW_BYTES, file_bytes=3 * FILE_BYTES, retain_s=1e6)
        self.up = dict.fromkeys(self.PEERS, True)
        self.running: set[str] = set()
        self.stopping: set[str] = set()
        self.kept: set[str] = set()
        self.writes: list[ev.Write] = []
        self.fences: list[ev.Fence] = []
        self.files: list[tuple[str, ms.ItemKey, int]] = []
        self.rooms = 0

    def do(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case ev.StartEncode(digest, media=media):
                    assert media and digest not in self.kept
                    self.running.add(digest)
                    self.kept.add(digest)
                case ev.CancelEncode(digest):
                    assert digest in self.running
                    self.stopping.add(digest)
                case ev.DropSource(digest):
                    self.kept.remove(digest)
                case ev.Write():
                    assert action.digest in self.kept
                    self.writes.append(action)
                case ev.Fence():
                    self.fences.append(action)
                case ev.Send(peer, ms.Offer(needs_media=True) as offer):
                    self.files.append((peer, offer.key, offer.epoch))
        self.check()

    def check(self) -> None:
        machine, table = self.s.machine, self.s.machine.sources
        alive = [source for source in table._sources.values() if source.started]
        assert table.used_bytes == sum(source.size_bytes for source in alive)
        assert table.used_bytes <= table.capacity_bytes
        assert {digest for digest, source in table._sources.items() if source.started} == self.kept
        filed = [source.file_bytes for source in table._sources.values() if source.file_bytes]
        assert table.file_bytes == sum(filed) <= table.capacity_file_bytes
        for digest in table._sources:
            source = table._sources[digest]
            assert source.away <= source.users <= machine.items.keys()
            assert [source.started, source.place > 0, digest in table._aside].count(True) == 1
            queued_for = {peer for peer, queue in table._queues.items() if digest in queue}
            assert queued_for == (source.receivers if source.place else set())
        yielding = sum(source.size_bytes for source in alive if not source.idle and source.yielding)
        assert table._yielding_bytes == yielding and all(table._queues.values())
        assert all(write.digest in self.kept for write in self.writes), "rows went under a write"

    def want(self, peer: str, key: ms.ItemKey, epoch: int, *, files: bool) -> None:
        number = key.index
        media = truth.spec(number).media if files else None
        self.do(self.s.want(key, epoch, number, peer, media=media))

    def step(self) -> None:
        random, machine = self.random, self.s.machine
        here = [peer for peer in self.PEERS if self.up[peer]]
        mine = sorted(user for user, item in machine.items.items() if self.up[user[0]] and not item.state.final)
        match random.randrange(8):
            case 0 | 1 if here:
                self.rooms += 1
                self.want(random.choice(here), ms.ItemKey(self.rooms, random.randrange(7)), 1, files=True)
            case 2 if mine:
                peer, key = random.choice(mine)
                self.do(self.s.says(random.choice((ms.Release, ms.Cancel))(key, machine.items[peer, key].epoch), peer))
            case 3:
                self.toggle(random.choice(self.PEERS))
            case 4 if mine:
                peer, key = random.choice(mine)
                item = machine.items[peer, key]
                start = random.randrange(item.rows)
                self.do(self.s.grant((start, item.rows), key=key, epoch=item.epoch, first=random.randrange(9**9),
                                     peer=peer))  # fmt: skip
            case _:
                self.answer()

    def toggle(self, peer: str) -> None:
        """Cuts the link, or opens it: then everything is asked for again, as receivers do."""
        self.up[peer] = not self.up[peer]
        if not self.up[peer]:
            self.files = [files for files in self.files if files[0] != peer]
            self.do(self.s.do(ev.LinkLost(peer)))
            return
        self.do(self.s.do(ev.LinkUp(peer)))
        for (other, key), item in list(self.s.machine.items.items()):
            if other == peer and not item.state.final:
                self.want(peer, key, item.epoch + 1, files=False)

    def answer(self) -> bool:
        """One of the things that are under way ends; False: nothing was."""
        random = self.random
        ways = [way for way in (self.files, self.writes, self.fences, sorted(self.running)) if way]
        way = random.choice(ways) if ways else []
        if not way:
            return False
        if way is self.files:
            peer, key, epoch = self.files.pop()
            self.want(peer, key, epoch + 1, files=True)
        elif way is self.writes:
            self.do(self.s.wrote(self.writes.pop()))
        elif way is self.fences:
            fence = self.fences.pop()
            write = next((w for w in self.writes if (w.peer, w.key) == (fence.peer, fence.key)), None)
            if write is not None:
                self.writes.remove(write)
                self.do(self.s.wrote(write))
            self.do(self.s.do(ev.WritesFenced(fence.peer, fence.key)))
        else:
            digest = random.choice(sorted(self.running))
            self.running.remove(digest)
            if digest in self.stopping and random.randrange(2):
                self.do(self.s.do(ev.EncodeStopped(digest, "cancelled", "", True)))
            else:
                self.do(self.s.ready(int(digest[-1])))
            self.stopping.discard(digest)
        return True


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_lost_who_has_a_link_is_served_without_waiting_for_a_timer(seed: int) -> None:
    """Bounds hold all the time; in the end two receivers go, and the third has all of its items made at once."""
    traffic = Traffic(Random(seed))
    for _ in range(120):
        traffic.step()
    for peer in ("L", "M"):
        if traffic.up[peer]:
            traffic.toggle(peer)
    if not traffic.up["N"]:
        traffic.toggle("N")
    machine = traffic.s.machine
    for _ in range(400):
        served = [
            user for user, item in machine.items.items() if user[0] == "N" and item.source and item.source.complete
        ]
        for user in served:
            traffic.do(traffic.s.says(ms.Cancel(user[1], machine.items[user].epoch), "N"))
        waiting = [item for (peer, _), item in machine.items.items() if peer == "N" and not item.state.final]
        if not waiting:
            return
        if not traffic.answer():
            for item in waiting:  # as a receiver does that hears nothing
                traffic.want("N", item.key, item.epoch + 1, files=False)
    raise AssertionError(f"still waiting: {waiting}, {machine.sources._sources}")
