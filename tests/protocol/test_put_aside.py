"""More files than a sender keeps: they wait where they come from, in turn, and nobody fails or goes elsewhere."""

from __future__ import annotations

from collections import Counter

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms

from . import truth
from .lists import Sending, every, only
from .network import Process
from .plans import PATIENT_S, Asked, Plan
from .world import World

FILE_BYTES = len(truth.digest_of(0))
"""Of each file."""
LARGE = 7
"""Number of an image that has all the room there is. Others have the numbers from 1 on."""


def key(number: int) -> ms.ItemKey:
    return ms.ItemKey(number + 1, 0)


def asks(s: Sending, number: int, epoch: int, *, files: bool = False) -> ms.Offer:
    """The answer to a want, which is always an offer."""
    media = truth.spec(number).media if files else None
    return only(s.want(key(number), epoch, number, media=media), ms.Offer)


def kept(s: Sending) -> list[str]:
    """Of whom the sender has files."""
    sources = s.machine.sources
    return [digest for digest in sources._sources if sources._sources[digest].job.media]


def crowded(count: int = 5) -> Sending:
    """So many items, each wanted with its files, at a sender that keeps two files; the first one is being encoded."""
    s = Sending(capacity_bytes=truth.rows_of(truth.GRIDS[LARGE]) * truth.ROW_BYTES, file_bytes=2 * FILE_BYTES)
    for number in (LARGE, *range(1, count)):
        offer = asks(s, number, 1, files=True)
        assert (offer.needs_media, offer.ready) == (False, 0), "it will be provided"
    return s


def test_files_of_items_that_wait_are_bounded() -> None:
    """Only the rows of what had been started were counted: every waiting want kept its files, however many came."""
    assert kept(crowded(7)) == ["item-7", "item-1"]


def test_who_waits_is_told_to_send_its_files_when_it_is_its_turn() -> None:
    s = crowded()
    assert not any(asks(s, number, 2).needs_media for number in (2, 3, 4))
    s.ready(LARGE)
    assert not asks(s, 3, 3).needs_media, "the room is the third item's, which came before"
    assert asks(s, 2, 3).needs_media and not asks(s, 2, 4, files=True).needs_media
    assert kept(s) == ["item-1", "item-2"]
    assert len(every(s.says(ms.Release(key(LARGE), 1)), ev.StartEncode)) == 2
    s.ready(1)
    assert asks(s, 3, 4).needs_media and not asks(s, 4, 3).needs_media


def test_who_gives_up_while_it_waits_makes_room_for_the_next() -> None:
    s = crowded()
    s.says(ms.Cancel(key(2), 1))
    s.ready(LARGE)
    assert asks(s, 3, 2).needs_media
    for number in (1, 3, 4):
        s.says(ms.Cancel(key(number), 9))
    s.says(ms.Release(key(LARGE), 1))
    assert not s.machine.items and s.machine.sources.file_bytes == 0 and len(s.machine.sources) == 1


def test_files_larger_than_the_bound_go_in_alone() -> None:
    s = Sending(file_bytes=FILE_BYTES - 1)
    asks(s, 0, 1, files=True)
    asks(s, 1, 1, files=True)
    assert kept(s) == ["item-0"]
    s.ready(0)
    assert asks(s, 1, 2).needs_media
    asks(s, 1, 3, files=True)
    assert kept(s) == ["item-1"]


def test_files_of_a_job_that_failed_or_was_cancelled_make_room() -> None:
    s = crowded()
    s.do(ev.EncodeStopped("item-7", "oom", "", True))
    assert asks(s, 2, 2).needs_media
    (cancel,) = every(s.says(ms.Cancel(key(1), 1)), ev.CancelEncode)
    assert not asks(s, 3, 2).needs_media, "a thread may still read them"
    s.do(ev.EncodeStopped(cancel.digest, "cancelled", "", True))
    assert asks(s, 3, 3).needs_media


class Counting(World):
    """Counts what machines ask for and say."""

    def __init__(self, plan: Plan) -> None:
        self.seen: Counter[str] = Counter()
        super().__init__(plan)

    def _carry_out(self, process: Process, action: object) -> None:
        self.seen[type(action).__name__] += 1
        if isinstance(action, ev.Send) and isinstance(action.message, ms.Offer) and action.message.needs_media:
            self.seen["told to send files"] += 1
        super()._carry_out(process, action)


def test_a_crowd_at_one_sender_is_served_and_asks_nobody_else() -> None:
    asked = tuple(Asked(0.0, number, PATIENT_S, frozenset()) for number in range(8))
    world = Counting(Plan(1, 1, True, 3, 4, 2, 24, 0.3, 0.0, asked, ()))
    world.run()
    assert set(world.ended.values()) == {"success"} and len(world.ended) == 8
    assert world.seen["Place"] == 8 and world.seen["told to send files"] >= 7
