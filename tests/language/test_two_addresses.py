"""A process is known by two addresses, and another one answers at the one by which it was asked."""

from __future__ import annotations

from typing import cast
from unittest.mock import Mock

import pytest

from aiodisagg.bench.synthetic import item_of
from aiodisagg.language.peers import EncodePeer, EncodePeers
from aiodisagg.language.placing import Placing
from aiodisagg.protocol.messages import ItemKey, Offer, Progress, Refuse, Want
from aiodisagg.scheduler.book import PeerBook
from aiodisagg.scheduler.cost import PeerCosts
from aiodisagg.scheduler.health import HealthConfig
from aiodisagg.scheduler.placement import Standing
from tests.language.test_rows import MODEL

KEY = ItemKey(1, 0)
SPEC = item_of(1, 64)


class _Moved:
    """An item was asked of ``old``, which is linked by its other address now; ``new`` answers at the first one."""

    def __init__(self) -> None:
        first = EncodePeer("unix:first", "old", "encode")
        self.linked = {"old": first}
        peers = Mock(get=self.linked.get, by_incarnation=self.linked.get)
        peers.linked = [first]
        self.placing = Placing(cast(EncodePeers, peers), 4, HealthConfig(failures=1))
        self.placing.errand(KEY, SPEC)
        placement = self.placing.choose(KEY, frozenset(), 0.0)
        assert placement is not None
        self.placing.asked(KEY, placement, 0.0)
        self.book = first.book
        assert self.book.size_bytes > 0
        first.incarnation, first.name, first.book = "new", "next", PeerBook(PeerCosts())
        second = EncodePeer("unix:second", "old", "encode", book=self.book)
        self.linked |= {"old": second, "new": first}
        peers.linked = [second, first]


@pytest.mark.parametrize("how", ["complete", "dropped", "given up"])
def test_the_one_that_was_asked_has_nothing_more_to_do_with_the_item(how: str) -> None:
    """Its book kept the item for ever, and the peer looked busy."""
    moved = _Moved()
    if how == "given up":
        moved.placing.given_up(KEY, 1.0)
    else:
        moved.placing.over(KEY, complete=how == "complete")
    assert not moved.book.open and moved.book.size_bytes == 0


def test_who_was_asked_is_who_is_blamed_and_forgiven() -> None:
    moved = _Moved()
    standings = moved.placing.standings
    moved.placing.refused("new", Refuse(KEY, 1, "encode_failed", "why", True), 1.0)
    assert not standings.doubted
    moved.placing.refused("old", Refuse(KEY, 1, "encode_failed", "why", True), 1.0)
    assert list(standings.doubted) == ["old"]
    moved.placing.over(KEY, complete=True)
    assert standings.of("old", 1.0) is Standing.READY and not standings.doubted
    moved = _Moved()
    moved.placing.given_up(KEY, 1.0)
    assert moved.placing.standings.of("old", 1.0) is Standing.SUSPECT


def test_what_arrives_and_what_is_asked_again_is_in_the_book_of_who_was_asked() -> None:
    moved = _Moved()
    want = Want(KEY, 2, SPEC.digest, SPEC.kind, SPEC.grid_thw, SPEC.rows, 0.0, (), (), MODEL, 9.0, None)
    moved.placing.asking("old", want, 0.0)
    moved.placing.arrived(KEY, SPEC.rows, 1.0)
    item = moved.book.open[KEY]
    assert item.missing_bytes == 0 and not item.clean


@pytest.mark.parametrize(
    "message",
    [Progress(KEY, 1, "encoded", 0.1, SPEC.rows), Offer(KEY, 1, SPEC.rows, MODEL, False, SPEC.rows, ())],
    ids=["Progress", "Offer"],
)
def test_a_late_word_of_an_item_that_is_over_does_no_harm(message: Progress | Offer) -> None:
    """Whatever it raises closes the link."""
    moved = _Moved()
    moved.placing.over(KEY)
    placement = Mock(held=False, service=Mock(prepare_s=0.1, tower_s=0.1, transfer_s=0.1))
    moved.book.asked(KEY, SPEC.digest, Mock(size_bytes=1, patches=1), placement, 1.0)  # and its book has it still
    moved.placing.heard("old", message, 2.0)
