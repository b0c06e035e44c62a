"""No receiver gets all the room for rows that others need, and none that has a link keeps it by taking nothing."""

from __future__ import annotations

from typing import Any

import pytest

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms
from aiodisagg.protocol.sources import Source

from . import truth
from .lists import Sending, every, only

RETAIN_S = 30.0
FILE_BYTES = len(truth.digest_of(0))


class Shared(Sending):
    """A sender with room for ``images`` of six rows, and receivers that are linked. Every digest is another one."""

    def __init__(self, *peers: str, images: int = 8, **config: Any) -> None:
        super().__init__(capacity_bytes=6 * images * truth.ROW_BYTES, retain_s=RETAIN_S, **config)
        for peer in peers:
            self.do(ev.LinkUp(peer))
        self.rooms = 0

    def asks(self, peer: str, count: int = 1, grid: tuple[int, int, int] = (1, 4, 6)) -> list[Any]:
        actions = []
        for _ in range(count):
            self.rooms += 1
            said = {"digest": f"digest-{self.rooms}", "grid_thw": grid, "rows": truth.rows_of(grid)}
            actions += self.want(ms.ItemKey(self.rooms, 0), peer=peer, timeout_s=7200.0, **said)
        return actions

    def encoded(self, *rooms: int, stop: int = 6) -> list[Any]:
        return [action for room in rooms for action in self.do(ev.RowsReady(f"digest-{room}", stop))]

    def takes(self, room: int, start: int, stop: int, peer: str = "L") -> list[Any]:
        write = only(self.grant((start, stop), key=ms.ItemKey(room, 0), first=100 * room + start, peer=peer), ev.Write)
        return self.wrote(write)

    def later(self, seconds: float) -> list[Any]:
        """What timers bring until then."""
        end, actions = self.now + seconds, []
        while (due := self.machine.next_timer()) is not None and due <= end:
            actions += self.do(ev.TimerFired(), after_s=max(0.0, due - self.now))
        self.now = end
        return actions


def started(actions: list[Any]) -> list[str]:
    return [job.digest for job in every(actions, ev.StartEncode)]


def test_one_receiver_leaves_room_for_others_that_are_linked() -> None:
    """All the room was its own, and what others asked for was not begun before it gave some back, if ever."""
    s = Shared("L", "M")
    assert len(started(s.asks("L", 20))) == 6
    assert started(s.asks("M", 3)) == ["digest-21", "digest-22"]
    s.encoded(*range(1, 7))
    assert started(s.says(ms.Release(ms.ItemKey(1, 0), 1))) == ["digest-23"], "L has more than its part"
    assert started(s.says(ms.Release(ms.ItemKey(2, 0), 1))) == []
    assert started(s.says(ms.Release(ms.ItemKey(3, 0), 1))) == ["digest-7"]


def test_a_receiver_that_is_alone_has_all_of_it() -> None:
    s = Shared("L", "M")
    s.do(ev.LinkLost("M"))
    assert len(started(s.asks("L", 20))) == 8


def test_rows_of_a_killed_receiver_take_no_share_of_others() -> None:
    """Of ten receivers nine asked for nothing, and the one that did had a tenth: who was killed kept the rest."""
    s = Shared("killed", *(f"p{number}" for number in range(9)), images=10)
    assert len(started(s.asks("killed", 6))) == 6
    s.encoded(*range(1, 7))
    s.do(ev.LinkLost("killed"))
    s.do(ev.LinkUp("p9"))
    assert started(s.asks("p0", 9)) == [f"digest-{number}" for number in range(7, 14)]
    assert sum(peer == "killed" for peer, _ in s.machine.items) == 3, "no more than was needed"


def test_rows_that_nobody_takes_take_no_share_of_others() -> None:
    s = Shared(*(f"p{number}" for number in range(10)), images=10)
    s.asks("p1", 6)
    s.encoded(*range(1, 7))
    assert started(s.asks("p0", 9)) == ["digest-7"], "it has a tenth, and three quarters are full"
    assert len(started(s.later(RETAIN_S))) == 6


def test_files_of_who_has_its_share_of_rows_make_way() -> None:
    """They had all the room for files, which do not go before rows are taken: nothing of M's was begun."""
    s = Shared("L", "M", file_bytes=5 * FILE_BYTES)
    for room in range(1, 7):
        s.asks("L")
        s.encoded(room)
    assert not started(s.asks("L", 5))
    assert started(s.asks("M")) == ["digest-12"] and started(s.asks("M")) == ["digest-13"]
    assert not started(s.asks("M", 2)), "no room for more rows"
    queued = [digest for queue in s.machine.sources._queues.values() for digest in queue]
    assert queued == ["digest-7", "digest-8", "digest-14"], "one of M's, which has a turn before L"
    assert started(s.says(ms.Release(ms.ItemKey(1, 0), 1))) == ["digest-14"]
    s.encoded(12, 13)
    assert only(s.want(ms.ItemKey(9, 0), 2, digest="digest-9", media=None), ms.Offer).needs_media, "the first put aside"


def test_however_many_wait_an_event_looks_at_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver with its share had all of its queue looked at by each event of anybody."""
    s = Shared("L", "M")
    s.asks("L", 1000)
    s.encoded(*range(1, 7))
    looked = []
    receivers = Source.receivers.fget
    monkeypatch.setattr(Source, "receivers", property(lambda source: looked.append(source) or receivers(source)))
    s.do(ev.StageEntered("digest-1", "encoding", 0.0))
    s.asks("M", 5)
    assert len(looked) < 100


def test_one_that_takes_no_rows_yields_to_one_that_comes_later() -> None:
    s = Shared("L")
    s.asks("L", 8)
    s.encoded(*range(1, 9))
    assert not started(s.asks("M"))
    assert not started(s.later(RETAIN_S - 1.0))
    assert started(s.later(1.0)) == ["digest-9"]
    assert len(s.machine.items) == 8, "one was enough"
    asked = s.want(ms.ItemKey(1, 0), 2, digest="digest-1", media=None)
    assert only(asked, ms.Offer).needs_media, "as of one that was away"


def test_nobody_yields_while_nobody_needs_the_room() -> None:
    s = Shared("L")
    s.asks("L", 8)
    s.encoded(*range(1, 9))
    s.later(60 * RETAIN_S)
    (write,) = every(s.grant((0, 6), key=ms.ItemKey(1, 0)), ev.Write)
    assert write.stop == 6 and len(s.machine.items) == 8


def test_one_that_takes_rows_slowly_keeps_what_it_has() -> None:
    s = Shared("L")
    s.asks("L", 8)
    s.encoded(*range(1, 9))
    s.asks("M")
    for start in range(6):
        for room in range(1, 9):
            s.takes(room, start, start + 1)
        assert not started(s.later(RETAIN_S - 1.0))


def test_one_that_waits_for_the_tower_keeps_what_it_has() -> None:
    s = Shared("L")
    s.asks("L", 8)
    s.asks("M")
    assert not started(s.later(2 * RETAIN_S)), "nothing exists that it could take"
    s.encoded(*range(1, 9), stop=3)
    for room in range(1, 9):
        s.takes(room, 0, 3)
    assert not started(s.later(2 * RETAIN_S)), "nothing more exists"


def test_one_that_has_all_rows_and_does_not_say_so_yields() -> None:
    s = Shared("L")
    s.asks("L", 8)
    s.encoded(*range(1, 9))
    s.asks("M")
    for room in range(1, 9):
        s.takes(room, 0, 6)
    assert started(s.later(RETAIN_S)) == ["digest-9"]


def writing() -> tuple[Shared, list[ev.Write]]:
    """All the room is L's, which has a slow network, and M waits."""
    s = Shared("L")
    s.asks("L", 8)
    s.encoded(*range(1, 9))
    writes = [only(s.grant((0, 6), key=ms.ItemKey(room, 0), first=room), ev.Write) for room in range(1, 9)]
    s.asks("M")
    return s, writes


def test_rows_on_their_way_are_being_taken_however_long_that_is() -> None:
    """A chunk that needed more than retain_s was stopped, and its item encoded again."""
    s, writes = writing()
    assert s.later(100 * RETAIN_S) == []
    assert every(s.wrote(writes[0]), ms.Commit)
    assert s.later(RETAIN_S - 1.0) == []
    assert started(s.says(ms.Release(ms.ItemKey(1, 0), 1))) == ["digest-9"]


def test_who_grants_blocks_for_rows_that_were_given_up_is_told() -> None:
    """It heard nothing, and asked again only when its patience ended. While it has no blocks there is nothing to tell:
    that is no fault of this peer, and to be counted as none."""
    s = Shared("L")
    s.asks("L", 8)
    s.encoded(*range(1, 9))
    s.asks("M")
    actions = s.later(RETAIN_S)
    assert started(actions) == ["digest-9"] and not every(actions, ev.Send)
    (fenced,) = every(s.grant((0, 2), key=ms.ItemKey(1, 0)), ms.Fenced)
    assert fenced == ms.Fenced(ms.ItemKey(1, 0), 1, "its rows are gone")


def test_after_a_write_that_failed_late_there_is_time_to_ask_again() -> None:
    s, writes = writing()
    s.later(2 * RETAIN_S)
    only(s.do(ev.WriteFailed("L", writes[0].key, 1, "no answer in 60 s")), ev.Fence)
    fenced = s.do(ev.WritesFenced("L", writes[0].key))
    assert only(fenced, ms.Fenced).reason == "no answer in 60 s" and not started(fenced)
    assert only(s.want(writes[0].key, 2, digest="digest-1", media=None), ms.Offer).ready == 6


@pytest.mark.parametrize("grid", [(1, 14, 14), (1, 40_000, 40_000)])
def test_what_can_never_fit_is_refused_at_once(grid: tuple[int, int, int]) -> None:
    """It waited until nothing was in use, everybody else behind it; what was cached was dropped at once."""
    s = Shared("L", "M")
    s.asks("L", 2)
    s.encoded(1, 2)
    s.says(ms.Release(ms.ItemKey(1, 0), 1))
    actions = s.asks("M", grid=grid)
    refuse = only(actions, ms.Refuse)
    rows = truth.rows_of(grid)
    assert (refuse.code, refuse.retryable) == ("too_large", True) and f"its {rows} rows take {6 * rows} bytes" in (
        refuse.message
    )
    assert len(actions) == 1 and s.machine.sources.get("digest-1") is not None
    assert started(s.asks("M")) == ["digest-4"]
