"""Membership carried out: which addresses are kept when lives of a process follow each other at one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import cast
from unittest.mock import Mock

import msgspec
import pytest

from aiodisagg.bootstrap.client import BootstrapClient, MembershipChange
from aiodisagg.bootstrap.registry import PeerRecord
from aiodisagg.errors import NoEncodePeer
from aiodisagg.language.membership import follow
from aiodisagg.language.peers import EncodePeers
from aiodisagg.link import PeerRole
from aiodisagg.protocol.events import LinkLost, LinkUp
from tests.conftest import LOOPS
from tests.language.test_peers import MODEL, Listener, dialling

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return request.param  # type: ignore[no-any-return]


class Following:
    """``follow`` with changes as they are said here instead of by a client."""

    def __init__(self, peers: EncodePeers) -> None:
        self._changes: asyncio.Queue[MembershipChange] = asyncio.Queue()
        self._told: asyncio.Queue[MembershipChange] = asyncio.Queue()
        self._rows = Mock(peers=peers, model=MODEL, told=self._told.put_nowait)

    async def watch(self, role: PeerRole | None = None) -> AsyncIterator[MembershipChange]:
        while True:
            yield await self._changes.get()

    async def run(self) -> None:
        await follow(cast(BootstrapClient, self), self._rows)

    async def say(self, *, came: Sequence[PeerRecord] = (), gone: Sequence[PeerRecord] = ()) -> None:
        """Returns when it is carried out."""
        self._changes.put_nowait(MembershipChange(tuple(came), tuple(gone)))
        await self._told.get()


def life(incarnation: str, address: str) -> PeerRecord:
    return PeerRecord(name="encode", incarnation=incarnation, role=PeerRole.ENCODE, addresses=(address,), model=MODEL)


@pytest.mark.parametrize("linked", [False, True], ids=["before its link", "after its link"])
async def test_the_end_of_an_earlier_life_does_not_take_the_address_from_the_next(linked: bool) -> None:
    """A server that restarted says only after two leases that a peer of before is gone."""
    async with dialling() as (peers, events):
        membership = Following(peers)
        following = asyncio.create_task(membership.run())
        async with Listener("one") as listener:
            one, two = life("one", listener.address), life("two", listener.address)
            await membership.say(came=[one])
            assert await events.get() == LinkUp("one")
        assert [await events.get(), await events.get()] == [LinkLost("one"), LinkLost("one", gone=True)]
        await membership.say(came=[two])
        if not linked:
            await membership.say(gone=[one])
        async with Listener("two", listener.address) as listener:
            assert await events.get() == LinkUp("two")
            if linked:
                await membership.say(gone=[one])
            (await listener.accepted.get()).abort()
            assert [await events.get(), await events.get()] == [LinkLost("two"), LinkUp("two")]
            await membership.say(gone=[two])
        assert [await events.get(), await events.get()] == [LinkLost("two"), LinkLost("two", gone=True)]
        with pytest.raises(NoEncodePeer, match="none known"):
            await peers.wait_any(0.0)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_hope_is_renewed_by_a_new_life_or_address_and_not_by_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that membership hears of, and nobody here can reach, are absent all the same."""
    now = 0.0
    monkeypatch.setattr("aiodisagg.language.peers._now", lambda: now)
    async with dialling() as (peers, _):
        membership = Following(peers)
        following = asyncio.create_task(membership.run())
        seen = []
        for incarnation, address in (("one", "a"), ("one", "a"), ("two", "a"), ("two", "b"), ("two", "b")):
            now += 10.0
            await membership.say(came=[life(incarnation, f"unix:/nowhere/{address}")])
            seen.append(peers.absent_s)
        assert seen == [0, 10, 0, 0, 10]
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


HERE = ("boot", "net:[1]", "mnt:[1]")


@pytest.mark.parametrize(
    ("address", "host", "told"),
    [
        ("unix:@name", "boot/1/1", False),
        ("unix:@name", "boot/1/2", False),
        ("unix:@name", "boot/2/1", True),
        ("tcp:127.0.1.1:7001", "boot/2/1", True),
        ("unix:/shared/socket", "boot/2/2", False),
        ("unix:/shared/socket", "another/1/1", True),
        ("tcp:[::1]:7001", "another/1/1", True),
        ("tcp:10.0.0.2:7001", "another/1/1", False),
        ("unix:@name", "boot", False),
        ("unix:@name", "", False),
    ],
)
async def test_an_address_that_only_another_host_can_dial_is_told_of(
    address: str, host: str, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``--listen`` forgotten, or given a name that /etc/hosts has as 127.0.1.1: all that was said:
    "connection refused"."""
    monkeypatch.setattr("aiodisagg.language.membership.host_identity", lambda: HERE)
    async with dialling() as (peers, _):
        membership = Following(peers)
        following = asyncio.create_task(membership.run())
        for _ in range(2):  # a heartbeat with another load
            await membership.say(came=[msgspec.structs.replace(life("one", address), host=host)])
        following.cancel()
    said = [record.getMessage() for record in caplog.records if "--listen" in record.getMessage()]
    text = f"encode peer encode listens at {address}, which is of its own host only: it needs --listen tcp:ADDRESS:PORT"
    assert said == [text] * told
