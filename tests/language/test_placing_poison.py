"""What a peer's end says of the items that were in its tower."""

from __future__ import annotations

from typing import cast

import pytest

from aiodisagg.language.peers import EncodePeers
from aiodisagg.language.placing import Placing
from aiodisagg.protocol.messages import Progress
from aiodisagg.scheduler.book import PeerBook
from aiodisagg.scheduler.cost import PeerCosts
from aiodisagg.scheduler.health import HealthConfig
from aiodisagg.scheduler.placement import Standing
from tests.language.many import Many, item_of


def _in_both_towers(peers: Many) -> Placing:
    """One item was in the towers of both peers when their links were lost."""
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    for now, peer in enumerate(peers.linked):
        key, spec = item_of(1)
        placing.errand(key, spec)
        placement = placing.choose(key, frozenset(other.incarnation for other in peers.linked if other != peer), now)
        assert placement is not None and placement.peer == peer.incarnation
        placing.asked(key, placement, now)
        placing.heard(peer.incarnation, Progress(key, 1, "encoding", 0.1, 0), now)
        placing.link_lost(peer.incarnation, now)
        placing.over(key)
    return placing


def test_links_that_are_cut_make_no_poison_until_the_peers_are_known_to_be_dead() -> None:
    placing, digest = _in_both_towers(Many(2)), item_of(1)[1].digest
    assert not placing.poison.refuses(digest, 2.0) and placing.poison.unsure_s(digest, 2.0) > 0
    placing.link_lost("00", 2.0, gone=True)
    assert not placing.poison.refuses(digest, 2.0)
    placing.link_lost("01", 2.0, gone=True)
    assert placing.poison.refuses(digest, 2.0)


def test_who_said_goodbye_did_not_die_of_an_item() -> None:
    peers = Many(2)
    for peer in peers.linked:
        peer.parted = True
    placing = _in_both_towers(peers)
    for incarnation in ("00", "01"):
        placing.link_lost(incarnation, 2.0, gone=True)
    assert not placing.poison.refuses(item_of(1)[1].digest, 2.0)


@pytest.mark.parametrize("linked", [True, False])
def test_membership_knows_who_is_dead_but_a_link_knows_better(linked: bool) -> None:
    peers = Many(2)
    placing, digest = _in_both_towers(peers), item_of(1)[1].digest
    if not linked:
        peers.linked.clear()
    placing.told([], ["00", "01"], 2.0)
    assert placing.poison.refuses(digest, 2.0) is not linked


def test_who_was_about_to_end_did_not_die_of_an_item() -> None:
    peers = Many(2)
    for peer in peers.linked:
        peer.book = PeerBook(PeerCosts())
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    placing.standings.told("00", Standing.DRAINING)
    key, spec = item_of(1)
    placing.errand(key, spec)
    placement = placing.choose(key, frozenset({"01"}), 0.0)
    assert placement is not None and placement.peer == "00"
    placing.asked(key, placement, 0.0)
    placing.heard("00", Progress(key, 1, "encoding", 0.1, 0), 0.0)
    placing.link_lost("00", 0.0)
    assert not placing.poison.suspect(spec.digest, 0.0)
