"""The last encode peer drains: it refuses new items, and they wait for another one as they do when there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import pytest

from aiodisagg.bench.synthetic import item_of
from aiodisagg.bootstrap.registry import PeerEntry, PeerRecord, PeerState
from aiodisagg.encode.service import EncodeService
from aiodisagg.language.peers import EncodePeer, EncodePeers
from aiodisagg.language.placing import Placing
from aiodisagg.link.hello import PeerRole
from aiodisagg.peer.config import EncodeConfig
from aiodisagg.protocol.events import DrainBegan
from aiodisagg.protocol.messages import ItemKey, Refuse
from aiodisagg.scheduler.health import HealthConfig
from aiodisagg.scheduler.placement import Standing
from tests.language.test_rows import MODEL, A, B, Gated, Made, Zeros, made
from tests.services.system import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@asynccontextmanager
async def draining(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Made]:
    """One encode peer, which drains, and two items that it refused."""
    async with made(folder, monkeypatch, Zeros(MODEL)) as one:
        one.encoders[0].driver.feed(DrainBegan())
        for key in (A, B):
            one.receiver.request([(key, item_of(key.room, 64))], 600.0)
        await eventually(lambda: len(one.receiver.unplaced) + len(one.ends) == 2)
        assert set(one.receiver.unplaced) == {A, B} and not one.ends, "they failed within four round trips"
        samples = [sample for metric in one.receiver.metrics() for sample in metric.samples]
        refusals = [sample for sample in samples if sample.name == "aiodisagg_item_refusals_total"]
        assert [(one.labels["code"], one.value) for one in refusals] == [("draining", 2.0)], "each is asked once"
        yield one


async def test_items_wait_for_another_while_the_only_peer_drains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with draining(tmp_path, monkeypatch) as one:
        config = EncodeConfig(model=tmp_path, transports=("memory",), self_test_s=0.0, name="e1", incarnation="life-1")
        async with EncodeService(config, encoder=Zeros(MODEL)) as second:
            one.receiver.peers.add(second.address)
            await eventually(lambda: len(one.ends) == 2)
            assert one.ends == {A: None, B: None}
            assert len(one.receiver.peers.linked) == 2, "the other one goes on with what it has"


async def test_items_wait_for_another_peer_no_longer_than_when_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with draining(tmp_path, monkeypatch) as one:
        absent_s = one.receiver.placing.absent_s(B, asyncio.get_running_loop().time())
        assert absent_s is not None
        object.__setattr__(one.receiver.config, "peer_wait_s", absent_s + 0.1)
        one.receiver._place_waiting()
        await eventually(lambda: len(one.ends) == 2)
        for failed in one.ends.values():
            assert failed is not None and failed.code == "unreachable" and "drains" in failed.message
        assert not one.receiver.unplaced and one.receiver.peers.linked


async def test_an_item_that_may_have_another_peer_has_no_patience_to_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept from that one only because it is fetched there already."""
    async with draining(tmp_path, monkeypatch) as one:
        placing, now = one.receiver.placing, asyncio.get_running_loop().time()
        placing.errands[A].drained.clear()
        assert placing.absent_s(A, now) is None and placing.absent_s(B, now) is not None


async def test_a_late_item_is_not_fetched_a_second_time_from_a_peer_that_refused_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with made(tmp_path, monkeypatch, Gated(), Gated()) as one:
        one.encoders[0].driver.feed(DrainBegan())  # of equal ones the first by name is asked
        one.receiver.request([(A, item_of(1, 64))], 600.0)
        await eventually(lambda: one.at(A) is one.encoders[1])
        placing, now = one.receiver.placing, asyncio.get_running_loop().time()
        placing.errands[A].asked = now - 1e6
        placing.hedges.later(A, 0.0, now)
        one.receiver._look_for_overdue()
        assert placing.hedges.started == 0
        placing.hedges.settled(A)


@pytest.mark.parametrize(("hoped_s", "absent_s"), [(100.0, 7.0), (3.0, 3.0)], ids=["refused last", "hoped last"])
def test_patience_begins_with_the_refusal_and_again_with_every_hope(hoped_s: float, absent_s: float) -> None:
    """A link that ended, or an address that was named, may be that of the next one."""
    placing, peer = _of_one(hoped_s=hoped_s)
    _refuse(placing, ItemKey(1, 0))
    assert placing.absent_s(ItemKey(1, 0), 7.0) == absent_s
    assert peer.book.size_bytes == 0


def test_a_peer_that_drains_does_so_whatever_membership_has_heard() -> None:
    """Its word to a server may be on the way, and there may be no server."""
    placing, _ = _of_one()
    _refuse(placing, ItemKey(1, 0))
    record = PeerRecord(name="encode", incarnation="00", role=PeerRole.ENCODE)
    told = Mock(record=record, state=PeerState.READY, load=Mock(digests=(), patches=0))
    placing.told([cast(PeerEntry, told)], [], 1.0)
    assert placing.standings.of("00", 1.0) is Standing.DRAINING
    placing.told([], ["00"], 2.0)
    assert placing.standings.of("00", 2.0) is Standing.DRAINING, "a life that drains ends"


def _of_one(hoped_s: float = 0.0) -> tuple[Placing, EncodePeer]:
    peer = EncodePeer("unix:0", "00")
    known = {"00": peer}
    peers = Mock(linked=[peer], get=known.get, by_incarnation=known.get, hoped_s=hoped_s)
    return Placing(cast(EncodePeers, peers), 4, HealthConfig()), peer


def _refuse(placing: Placing, key: ItemKey) -> None:
    """The item is asked of the peer, which drains."""
    placing.errand(key, item_of(1, 64))
    placement = placing.choose(key, frozenset(), 0.0)
    assert placement is not None
    placing.asked(key, placement, 0.0)
    placing.refused("00", Refuse(key, 1, "draining", "why", True), 0.0)
    placing.given_up(key, 0.0)
    assert placing.choose(key, frozenset({"00"}), 0.0) is None
