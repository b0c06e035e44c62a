"""Bytes by peer: a bounded number of peers by name, and totals that never change by it."""

from __future__ import annotations

from aiodisagg.protocol.counters import MOST_PEERS, ByteCounters
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
