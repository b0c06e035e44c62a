"""Bytes by peer: a bounded number of peers by name, and totals that never change by it."""

from __future__ import annotations

from aiodisagg.protocol.counters import MOST_PEERS, ByteCounters, PeerLabels
from aiodisagg.protocol.messages import Meta
from aiodisagg.protocol.rows import Region, RowLayout

from . import truth


def test_peers_of_long_ago_share_a_series() -> None:
    """Every incarnation of a peer kept series of its own for as long as the process lived."""
    counters = ByteCounters(RowLayout.of(truth.MODEL))
    for life in range(3 * MOST_PEERS):
        counters.rows("sent", f"life-{life}", 2)
        counters.meta("sent", f"life-{life}", Meta(0, 2, b"ids", None, None))
        counters.rows("sent", "stays", 1)
    peers = {peer for _, _, peer, _ in counters.items()}
    assert len(peers) == MOST_PEERS + 1 and {"", "stays", f"life-{3 * MOST_PEERS - 1}"} <= peers
    assert counters.total("sent", region=Region.FILL_IDS) == 3 * MOST_PEERS * 3
    packed = counters.total("sent", region=Region.INPUT) + counters.total("sent", region=Region.DEEPSTACK)
    assert packed == 3 * MOST_PEERS * 3 * truth.ROW_BYTES
    assert counters.total("sent", peer="stays") == 3 * MOST_PEERS * truth.ROW_BYTES


def test_peers_are_called_by_name_and_two_of_one_name_are_told_apart() -> None:
    labels = PeerLabels()
    labels.linked("1", "encode")
    labels.linked("2", "encode")
    labels.linked("3", "other")
    assert [labels.of(peer) for peer in "1234"] == ["encode", "encode/2", "other", ""]
    labels.lost("1", gone=False)
    assert labels.of("1") == "encode", "it may come back"
    labels.linked("1", "encode")
    assert [labels.of(peer) for peer in "12"] == ["encode", "encode/2"]
    labels.lost("1", gone=False)
    labels.linked("4", "encode")
    assert [labels.of(peer) for peer in "14"] == ["", "encode"], "who has a link has the name"


def test_lives_of_one_peer_are_one_series_and_nothing_is_lost() -> None:
    """Labelled by incarnation, bytes could be joined with nothing, and a crash loop made series for ever."""
    counters = ByteCounters(RowLayout.of(truth.MODEL))
    labels = counters.labels = PeerLabels()
    for life in map(str, range(100)):
        labels.linked(life, "encode")
        counters.rows("received", life, 1)
        labels.lost(life, gone=False)
        labels.lost(life, gone=True)
        counters.rows("received", life, 1)
    labels.linked("last", "encode")
    counters.rows("received", "last", 1)
    found = [(region, peer, size) for _, region, peer, size in counters.items()]
    assert len(found) == 4 and {peer for _, peer, _ in found} == {"", "encode"}
    assert sum(size for _, peer, size in found if not peer) == 200 * truth.ROW_BYTES
    assert counters.total("received", peer="last") == truth.ROW_BYTES


def test_names_of_peers_of_long_ago_are_forgotten_and_linked_ones_kept() -> None:
    labels = PeerLabels()
    labels.linked("stays", "first")
    for life in range(2 * MOST_PEERS):
        labels.linked(str(life), f"name-{life}")
        labels.lost(str(life), gone=False)
    assert labels.of("stays") == "first" and labels.of(str(2 * MOST_PEERS - 1)) == f"name-{2 * MOST_PEERS - 1}"
    assert labels.of("0") == "" and sum(labels.of(str(life)) != "" for life in range(2 * MOST_PEERS)) < MOST_PEERS
