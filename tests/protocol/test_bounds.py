"""How much one message, or an epoch full of them, may say: more is refused before it costs anything."""

from __future__ import annotations

from typing import Any

import pytest

from aiodisagg.errors import RemoteProtocolError
from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms
from aiodisagg.protocol.ranges import MOST_SPANS

from . import truth
from .lists import KEY, Receiving, Sending, every, only, want

LEND, CHUNK = ms.Lend(2**61, 2**40, 2**20, 2**20 + 1), ms.Chunk(2**61, 2**20, 2**20 + 1, 2**64 - 1)


def spans(count: int) -> tuple[tuple[int, int], ...]:
    return tuple((2 * i, 2 * i + 1) for i in range(count))


@pytest.mark.parametrize(
    ("message", "most", "field"),
    [
        (lambda n: want(held=spans(n)), MOST_SPANS, "held"),
        (lambda n: want(media=(b"",) * n), ms.MOST_FILES, "media"),
        (lambda n: want(meta=(1,) * n), 16, "meta"),
        (lambda n: ms.Grant(KEY, 1, (), spans(n)), MOST_SPANS, "held"),
        (lambda n: ms.Grant(KEY, 1, (LEND,) * n, ()), ms.MOST_LENDS, "lends"),
        (lambda n: ms.Offer(KEY, 1, 6, truth.MODEL, False, 6, ((CHUNK, None),) * n), ms.MOST_WRITTEN, "written"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_message_says_no_more_than_it_may(message: Any, most: int, field: str) -> None:
    """A want of forty thousand spans held up every other item of an encode peer for a fifth of a second."""
    assert len(getattr(ms.decode(ms.encode(message(most)), "L"), field)) == most
    with pytest.raises(RemoteProtocolError, match="length"):
        ms.decode(ms.encode(message(most + 1)), "L")


def granted(s: Sending, first: int, count: int) -> list[Any]:
    return s.says(ms.Grant(KEY, 1, tuple(ms.Lend(first + i, 0, 0, 1) for i in range(count)), ()))


def test_more_blocks_than_a_window_has_are_not_taken() -> None:
    """Three grants of a megabyte each were kept for as long as their item."""
    s = Sending()
    s.want()
    granted(s, 0, ms.MOST_LENDS)
    with pytest.raises(RemoteProtocolError, match="more blocks"):
        granted(s, ms.MOST_LENDS, 1)
    item = s.machine.items["L", KEY]
    assert len(item.lends) == len(item._seen) == ms.MOST_LENDS
    assert granted(s, 0, ms.MOST_LENDS) == [] and len(item.lends) == ms.MOST_LENDS, "the same ones again are none"


def test_an_epoch_has_no_more_blocks_than_its_item_has_rows_but_for_spoiled_ones() -> None:
    s = Sending()
    s.want()
    s.ready()
    for number in range(6 + ms.MOST_LENDS):
        s.wrote(only(granted(s, number, 1), ev.Write))
    with pytest.raises(RemoteProtocolError, match="more blocks"):
        granted(s, 10**6, 1)
    s.want(epoch=2)
    assert only(s.grant((0, 6), epoch=2), ev.Write)


def test_what_is_too_much_to_be_restated_is_sent_again() -> None:
    s = Sending()
    s.want()
    s.ready()
    s.machine.items["L", KEY].written = [(ms.Chunk(number, 0, 1, 7), None) for number in range(ms.MOST_WRITTEN + 5)]
    offer = only(s.want(epoch=2), ms.Offer)
    assert [offer.written[0][0].lease, len(offer.written)] == [5, ms.MOST_WRITTEN]
    assert ms.decode(ms.encode(offer), "E") == offer


def test_a_ledger_in_pieces_is_said_as_far_as_a_message_goes() -> None:
    r = Receiving()
    r.open()
    for start, stop in spans(MOST_SPANS + 5):
        r.machine.items[KEY].held.add(start, stop)
    r.do(ev.LinkLost("A"))
    asked = only(r.do(ev.LinkUp("A")), ms.Want)
    assert asked.held == spans(MOST_SPANS) and ms.decode(ms.encode(asked), "L") == asked


def test_an_error_of_any_length_is_told() -> None:
    """A text that was longer than a message may say cost the link, and every other item on it."""
    s = Sending()
    s.want()
    (refuse,) = every(s.do(ev.EncodeStopped("item-2", "encode_failed", "why " * 5000, True)), ms.Refuse)
    assert refuse.message.startswith("why why") and ms.decode(ms.encode(refuse), "E") == refuse
