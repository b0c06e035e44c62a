"""What membership says of peers, before they are linked and after they are gone."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from aiodisagg.bootstrap.registry import Load, PeerEntry, PeerRecord, PeerState
from aiodisagg.language.peers import EncodePeer
from aiodisagg.language.placing import Placing
from aiodisagg.link.hello import PeerRole
from aiodisagg.scheduler.health import HealthConfig

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
