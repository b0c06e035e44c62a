"""Links to encode peers that are known by two addresses, with servers that can be stopped one by one."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from aiodisagg.bench.synthetic import SyntheticEncoder, item_of, synthetic_model
from aiodisagg.encode.service import EncodeService
from aiodisagg.errors import LinkClosed, NoEncodePeer
from aiodisagg.language.peers import EncodePeer, EncodePeers, LinkEvent
from aiodisagg.link import Hello, Link, LinkServer, PeerRole, dial
from aiodisagg.link.config import LinkConfig
from aiodisagg.peer.config import EncodeConfig
from aiodisagg.protocol.events import LinkLost, LinkUp, MessageReceived
from aiodisagg.protocol.messages import Cancel, ItemKey, Offer, Want
from tests.conftest import LOOPS
from tests.services.system import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
MODEL = synthetic_model(hidden_size=16, levels=3)


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return request.param  # type: ignore[no-any-return]


@asynccontextmanager
async def dialling(config: LinkConfig | None = None) -> AsyncIterator[tuple[EncodePeers, asyncio.Queue[LinkEvent]]]:
    """Peers, and what they tell."""
    events: asyncio.Queue[LinkEvent] = asyncio.Queue()
    mine = Hello.here(name="language", incarnation="language-1", role=PeerRole.LANGUAGE, model=MODEL)
    peers = EncodePeers(lambda: mine, events.put_nowait, model=MODEL, secret=None, config=config or LinkConfig())
    try:
        async with asyncio.timeout(60):
            yield peers, events
    finally:
        await peers.aclose()


class Listener(LinkServer):
    """One address of a process. ``links``: that were accepted, each until it is closed."""

    def __init__(
        self, incarnation: str, address: str = "unix:", config: LinkConfig | None = None, *, levels: int = 3
    ) -> None:
        model = synthetic_model(hidden_size=16, levels=levels)
        hello = Hello.here(name="encode", incarnation=incarnation, role=PeerRole.ENCODE, model=model)
        super().__init__(address, lambda: hello, on_link=self._accepted, config=config)
        self.accepted: asyncio.Queue[Link] = asyncio.Queue()

    async def _accepted(self, link: Link) -> None:
        self.accepted.put_nowait(link)
        await link.wait_closed()


async def test_a_peer_is_linked_by_one_of_its_addresses_and_by_the_other_when_that_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aiodisagg.language.peers.LOOK_AGAIN_S", 1e6)
    monkeypatch.setattr("aiodisagg.language.peers.FIRST_RETRY_S", 0.0)
    async with AsyncExitStack() as stack:
        peers, events = await stack.enter_async_context(dialling())
        other = await stack.enter_async_context(Listener("one"))
        async with Listener("one") as first:
            peers.add(first.address)
            assert await events.get() == LinkUp("one")
            peers.add(other.address)
            unused = await other.accepted.get()
            await unused.wait_closed()
            assert unused.parted and unused.bytes_received > 0
            with pytest.raises(LinkClosed, match="closed by the peer"):
                await unused.recv()
            for _ in range(20):
                await asyncio.sleep(0)  # the other address begins to wait
            book = peers.linked[0].book
        assert [await events.get(), await events.get()] == [LinkLost("one"), LinkUp("one")]
        assert [peer.address for peer in peers.linked] == [other.address] and peers.linked[0].book is book


async def test_another_process_at_one_address_is_found_though_the_other_still_leads_to_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aiodisagg.language.peers.LOOK_AGAIN_S", 0.01)
    async with dialling() as (peers, events), Listener("one") as first:
        peers.add(first.address)
        assert await events.get() == LinkUp("one")
        async with Listener("one") as other:
            peers.add(other.address)
            await (await other.accepted.get()).wait_closed()
        async with Listener("two", other.address):
            assert await events.get() == LinkUp("two")
            assert {peer.incarnation for peer in peers.linked} == {"one", "two"}


async def test_what_a_life_of_a_process_held_is_not_believed_of_the_next() -> None:
    async with dialling() as (peers, events):
        async with Listener("one") as first:
            peers.add(first.address)
            assert await events.get() == LinkUp("one")
            peers.linked[0].digests = frozenset({"held by it"})
        async with Listener("two", first.address):
            while await events.get() != LinkUp("two"):
                pass
            assert peers.linked[0].digests == frozenset()


async def test_a_peer_is_gone_when_nobody_listens_at_any_of_its_addresses() -> None:
    async with dialling() as (peers, events):
        async with Listener("one") as other, Listener("one") as first:
            peers.add(first.address)
            assert await events.get() == LinkUp("one")
            peers.add(other.address)
            await (await other.accepted.get()).wait_closed()
        assert [await events.get(), await events.get()] == [LinkLost("one"), LinkLost("one", gone=True)]
        assert peers.by_incarnation("one") is None


async def test_the_end_of_a_peer_is_known_when_one_of_no_use_has_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what it died of would be carried to others, until membership says that it is gone."""
    async with dialling() as (peers, events), Listener("one") as first, Listener("two", levels=2) as next_one:
        leads_to = first.address

        async def dial_there(address: str, *what: Any, **how: Any) -> Link:
            return await dial(leads_to, *what, **how)

        monkeypatch.setattr("aiodisagg.language.peers.dial", dial_there)
        peers.add(first.address)
        assert await events.get() == LinkUp("one")
        leads_to = next_one.address
        (await first.accepted.get()).abort()
        assert [await events.get(), await events.get()] == [LinkLost("one"), LinkLost("one", gone=True)]
        assert peers.linked == []


async def test_two_addresses_dialled_at_once_give_one_link_that_is_not_cut(tmp_path: Path) -> None:
    config = EncodeConfig(
        model=tmp_path, name="encode", listen="tcp:127.0.0.1:0", transports=("stream",), self_test_s=0.0
    )
    async with EncodeService(config, encoder=SyntheticEncoder(MODEL)) as encode, dialling() as (peers, events):
        peers.add(encode.address)
        peers.add(encode.address.replace("127.0.0.1", "localhost"))
        assert await events.get() == LinkUp(config.incarnation)
        for number in range(3):
            spec = item_of(number, 4)
            key = ItemKey(number, 0)
            want = Want(
                key, 1, spec.digest, spec.kind, spec.grid_thw, spec.rows, spec.fps, (), (), MODEL, 60.0, spec.media
            )
            peers.send(config.incarnation, want)
            while not (
                isinstance(event := await events.get(), MessageReceived)
                and isinstance(event.message, Offer)
                and event.message.key == key
            ):
                assert isinstance(event, MessageReceived), event


async def test_an_address_where_nobody_listens_is_said_once_and_to_whom_waits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "aiodisagg.language.peers")
    async with dialling() as (peers, _):
        peers.add("unix:@nobody-listens-here")
        with pytest.raises(NoEncodePeer, match=r"encode peer at unix:@nobody-listens-here: .*refused"):
            await peers.wait_any(0.3)  # of several attempts
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1 and "unix:@nobody-listens-here" in warned[0]


async def test_who_is_named_again_is_dialled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_RETRY_S", "LAST_RETRY_S"):
        monkeypatch.setattr(f"aiodisagg.language.peers.{name}", 1e6)
    address = f"unix:@aiodisagg-test-{secrets.token_hex(8)}"
    async with dialling() as (peers, events):
        peers.add(address)
        await eventually(lambda: peers._by_address[address].refused)
        async with Listener("one", address):
            peers.add(address)
            assert await events.get() == LinkUp("one")


@pytest.mark.parametrize(("was_linked", "times"), [(True, 2), (False, 1)])
async def test_a_dial_that_takes_long_is_begun_anew_once_after_a_link_was_lost(
    was_linked: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often another peer is lost and back meanwhile."""
    begun, answers = 0, asyncio.Event()

    async def dial_slowly(address: str, *what: Any, **how: Any) -> Link:
        nonlocal begun
        if address == slow.address:
            begun += 1
            await answers.wait()
        return await dial(address, *what, **how)

    monkeypatch.setattr("aiodisagg.language.peers.dial", dial_slowly)
    async with dialling() as (peers, events), Listener("slow") as slow:
        peers.add(slow.address)
        await eventually(lambda: begun)
        if was_linked:
            answers.set()
            assert await events.get() == LinkUp("slow")
            answers.clear()
            begun = 0
            (await slow.accepted.get()).abort()
            assert await events.get() == LinkLost("slow")
            await eventually(lambda: begun)
        for _ in range(3):
            async with Listener("one") as one:
                peers.add(one.address)
                assert await events.get() == LinkUp("one")
                await eventually(lambda: begun == times)
            assert [await events.get(), await events.get()] == [LinkLost("one"), LinkLost("one", gone=True)]
        assert begun == times
        answers.set()
        assert await events.get() == LinkUp("slow")


async def test_media_that_nobody_wants_any_more_are_not_sent() -> None:
    """They wait for a link that has no room; what is being sent goes on."""
    wants = [
        Want(ItemKey(1, n), 1, f"{n}" * 32, "image", (1, 2, 2), 1, 0.0, (), (), MODEL, 9.0, (b"x",)) for n in range(3)
    ]
    async with dialling() as (peers, events), Listener("one") as listener:
        peers.add(listener.address)
        assert await events.get() == LinkUp("one")
        there = await listener.accepted.get()
        assert not any(peers.send("one", want) for want in wants)
        unsent = [peers.send("one", Cancel(wants[number].key, 1)) for number in (0, 1, 1)]
        found = [await there.recv() for _ in range(5)]
        keys = [(type(message).__name__, message.key.index) for message in found]
        assert keys == [("Cancel", 1), ("Cancel", 1), ("Want", 0), ("Cancel", 0), ("Want", 2)]
        assert unsent == [False, True, False]


async def test_who_is_absent_for_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("aiodisagg.language.peers._now", lambda: now)
    async with dialling() as (peers, events):
        assert peers.absent_s == 0
        now = 5.0
        assert peers.absent_s == 5
        with pytest.raises(NoEncodePeer):
            await peers.wait_any(5.0)
        async with Listener("one") as listener:
            peers.add(listener.address)
            assert peers.absent_s == 0, "somebody named one"
            now = 7.0
            peers.add(listener.address, news=False)
            assert peers.absent_s == 2, "its heartbeat is no news"
            assert await events.get() == LinkUp("one")
            now = 50.0
            assert peers.absent_s == 0
            await peers.wait_any(5.0)
        await events.get()
        assert peers.absent_s == 0
        now = 51.0
        assert peers.absent_s == 1


async def test_who_is_named_while_somebody_waits_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its patience was nearly at an end, and begins anew."""
    now, looks = 0.0, 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return now

    monkeypatch.setattr("aiodisagg.language.peers._now", clock)
    async with dialling() as (peers, events), Listener("one") as listener:
        now = 9.99
        waiting = asyncio.ensure_future(peers.wait_any(10.0))
        await asyncio.sleep(0)
        peers._hoped = now  # somebody was named, who takes a while to start
        before = looks
        await eventually(lambda: waiting.done() or looks > before)
        assert not waiting.done()
        peers.add(listener.address)
        await waiting
        await events.get()


async def test_nobody_waits_for_a_peer_when_the_links_are_closed() -> None:
    """Requests that waited when their service was left waited until their patience ended, and held it up."""
    async with dialling() as (peers, _):
        waiting = asyncio.ensure_future(peers.wait_any(1e6))
        await asyncio.sleep(0)
        await peers.aclose()
        for wait in (waiting, peers.wait_any(1e6)):
            with pytest.raises(NoEncodePeer, match="closed"):
                await wait


async def test_peers_that_dial_the_same_address_in_vain_do_not_come_back_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When an encode peer starts anew all dial it, and those that it sent away did so again at the same moment."""
    pauses: dict[str, list[float]] = {"unix:@no-one": [], "unix:@nobody": []}
    enough = asyncio.Event()

    async def pause(self: EncodePeers, peer: EncodePeer, seconds: float) -> bool:
        pauses[peer.address].append(seconds)
        if all(len(each) >= 8 for each in pauses.values()):
            enough.set()
            await peer.moved.wait()
        await asyncio.sleep(0)
        return True

    monkeypatch.setattr(EncodePeers, "_pause", pause)
    async with dialling() as (peers, _):
        for address in pauses:
            peers.add(address)
        await enough.wait()
    one, other = (each[:8] for each in pauses.values())
    assert not set(one) & set(other)
    assert all(nominal / 2 <= each <= nominal for each, nominal in zip(one, (0.05, 0.1, 0.2, 0.4, 0.8), strict=False))
