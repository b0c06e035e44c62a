"""Which peers are compared, and what membership says of them before they are linked and after they are gone."""

from __future__ import annotations

from collections import Counter
from typing import cast
from unittest.mock import Mock

import pytest

from aiodisagg.bootstrap.registry import Load, PeerEntry, PeerRecord, PeerState
from aiodisagg.language.peers import EncodePeer, EncodePeers
from aiodisagg.language.placing import Placing
from aiodisagg.link.hello import PeerRole
from aiodisagg.protocol.events import ItemSpec
from aiodisagg.protocol.messages import ItemKey
from aiodisagg.scheduler.book import PeerBook
from aiodisagg.scheduler.cost import PeerCosts, Rates
from aiodisagg.scheduler.health import HealthConfig
from aiodisagg.scheduler.placement import Standing

RECORD = PeerRecord(name="encode", incarnation="x", role=PeerRole.ENCODE)
LOAD = Load(patches=40_000, digests=("0123456789ab",))
ENTRY = PeerEntry(record=RECORD, state=PeerState.READY, load=LOAD, revision=1)


def test_what_was_said_before_the_link_counts_from_when_it_was_said_until_the_peer_is_gone() -> None:
    peers: dict[str, EncodePeer] = {}
    placing = Placing(Mock(by_incarnation=peers.get), 4, HealthConfig())
    placing.told([ENTRY], [], 10.0)
    early = peers["x"] = EncodePeer("unix:early", "x")
    placing.link_up("x")
    assert early.digests == {"0123456789ab"}
    at_once = early.book.backlog(10.0).tower_s
    assert at_once > 0.1 and early.book.backlog(10.1).tower_s == pytest.approx(at_once - 0.1)

    placing.told([], ["x"], 20.0)
    late = peers["x"] = EncodePeer("unix:late", "x")
    placing.link_up("x")
    assert not late.digests and late.book.backlog(20.0).tower_s == 0.0


class _Many:
    """So many linked peers."""

    def __init__(self, count: int) -> None:
        self.linked = [EncodePeer(f"unix:{i}", f"{i:02d}") for i in range(count)]

    def get(self, incarnation: str) -> EncodePeer | None:
        return next((peer for peer in self.linked if peer.incarnation == incarnation), None)

    by_incarnation = get


def _item(number: int, digest: str = "") -> tuple[ItemKey, ItemSpec]:
    return ItemKey(number, 0), ItemSpec(digest or f"{number:032x}", "image", (1, 64, 64), 1024, 0.0, (b"file",))


def _place(placing: Placing, key: ItemKey, spec: ItemSpec) -> str:
    placing.errand(key, spec)
    placing.plan([key], 0.0)
    placement = placing.choose(key, frozenset(), 0.0)
    assert placement is not None
    placing.asked(key, placement, 0.0)
    return placement.peer


def test_of_many_peers_all_get_their_share() -> None:
    peers = _Many(50)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    given = Counter(_place(placing, *_item(i)) for i in range(150))
    assert len(given) == 50 and max(given.values()) <= 4


def test_who_holds_an_item_is_asked_for_it_wherever_it_stands_in_turn() -> None:
    peers = _Many(50)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    first = _place(placing, *_item(0, "f" * 32))
    peers.linked[33].digests = frozenset({"a" * 12})
    assert [_place(placing, *_item(i, "f" * 32)) for i in range(1, 5)] == [first] * 4
    assert [_place(placing, *_item(i, "a" * 32)) for i in range(5, 9)] == ["33"] * 4


def test_the_own_tower_is_compared_for_every_item() -> None:
    peers = _Many(50)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    placing.own = "37"
    for peer in peers.linked:
        peer.book = PeerBook(PeerCosts(Rates(transfer_byte_s=1e-12 if peer.incarnation == "37" else 1e-6)))
    for i in range(12):
        key, spec = _item(i)
        assert _place(placing, key, spec) == "37"
        placing.over(key)


def test_the_own_tower_gets_less_than_its_share_where_prefill_takes_long() -> None:
    """Its device has the prompt to compute as well. How long that takes is learned."""
    given = []
    for own in ("", "00"):
        placing = Placing(cast(EncodePeers, _Many(2)), 4, HealthConfig())
        placing.own = own
        for _ in range(20):
            placing.computed(1024, 1.0)
        keys = [ItemKey(1, index) for index in range(4)]
        for key in keys:
            placing.errand(key, _item(key.index)[1])
        placing.plan(keys, 0.0)
        places = [placing.choose(key, frozenset(), 0.0) for key in keys]
        given.append(Counter(place.peer for place in places if place is not None)["00"])
    assert given == [2, 1]


def test_peers_that_drain_are_asked_only_if_all_do() -> None:
    peers = _Many(50)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    for peer in peers.linked[:-1]:
        placing.standings.told(peer.incarnation, Standing.DRAINING)
    assert {_place(placing, *_item(i)) for i in range(8)} == {"49"}
