"""Media that wait for a link hold up the words of their own item only."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from aiodisagg.bench.synthetic import item_of
from aiodisagg.language.peers import EncodePeer
from aiodisagg.language.placing import Placing
from aiodisagg.link.config import LinkConfig
from aiodisagg.protocol.events import LinkLost, LinkUp, MessageReceived
from aiodisagg.protocol.messages import Cancel, Grant, ItemKey, Refuse, Want
from aiodisagg.scheduler.health import HealthConfig
from tests.conftest import LOOPS
from tests.language.test_peers import MODEL, Listener, dialling
from tests.language.test_rows import A, Gated, made
from tests.services.system import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
BIG = bytes(4 << 20)
"""More than sockets buffer."""
NARROW = LinkConfig(high_water_bytes=1, max_queued_bytes=1)
"""Writes one message at a time, and of what it receives it reads no second one before the first is taken."""


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return request.param  # type: ignore[no-any-return]


def want(number: int, media: tuple[bytes, ...] | None = (BIG,), epoch: int = 1) -> Want:
    key = ItemKey(1, number)
    return Want(key, epoch, f"{number}" * 32, "image", (1, 2, 2), 1, 0.0, (), (), MODEL, 9.0, media)


def grant(number: int) -> Grant:
    return Grant(ItemKey(1, number), 1, (), ())


@pytest.mark.parametrize("waits", [False, True], ids=["before the second", "behind the one that is next"])
async def test_a_grant_does_not_wait_behind_media_of_other_items(waits: bool) -> None:
    """Its peer looked silent for as long as the files of others took, and was left after two questions."""
    async with dialling(NARROW) as (peers, events), Listener("one", config=NARROW) as listener:
        peers.add(listener.address)
        assert await events.get() == LinkUp("one")
        there, link = await listener.accepted.get(), peers.linked[0].link
        assert link is not None
        for number in range(4 if waits else 2):
            peers.send("one", want(number))
        if waits:  # the listener has the first and reads no more; the second is on its way and the third is next
            await eventually(lambda: there._connection._inbox and link._connection._outbox)
        peers.send("one", grant(9))
        found = [(type(message).__name__, message.key.index) for message in
                 [await there.recv() for _ in range(5 if waits else 3)]]  # fmt: skip
        order = [("Want", number) for number in range(4 if waits else 2)]
        assert [one for one in found if one != ("Grant", 9)] == order
        assert found.index(("Grant", 9)) < found.index(order[-1])


async def test_the_words_of_an_item_stay_in_order_behind_its_media() -> None:
    async with dialling(NARROW) as (peers, events), Listener("one", config=NARROW) as listener:
        peers.add(listener.address)
        assert await events.get() == LinkUp("one")
        there = await listener.accepted.get()
        for message in (want(0), want(1), want(1, None, 2), want(2), Cancel(ItemKey(1, 2), 1), want(0, None, 2)):
            peers.send("one", message)
        peers.send("one", Cancel(ItemKey(1, 0), 2))
        found = [(type(m).__name__, m.key.index, m.epoch) for m in [await there.recv() for _ in range(5)]]
        assert found == [("Cancel", 2, 1), ("Want", 0, 1), ("Cancel", 0, 2), ("Want", 1, 1), ("Want", 1, 2)]
        assert not peers.linked[0].outbox


async def test_what_waited_for_a_link_does_not_leave_by_the_next_one() -> None:
    """It would be files, of an epoch that is over: all of it is asked for again."""
    async with dialling(NARROW) as (peers, events), Listener("one", config=NARROW) as listener:
        peers.add(listener.address)
        assert await events.get() == LinkUp("one")
        for number in range(3):
            peers.send("one", want(number))
        (await listener.accepted.get()).abort()
        assert [await events.get(), await events.get()] == [LinkLost("one"), LinkUp("one")]
        peers.send("one", grant(9))
        assert await (await listener.accepted.get()).recv() == grant(9)
        assert not peers.linked[0].outbox


async def test_what_went_through_a_link_is_counted_when_it_has_ended() -> None:
    async with dialling() as (peers, events):
        async with Listener("one") as listener:
            peers.add(listener.address)
            assert await events.get() == LinkUp("one")
            there = await listener.accepted.get()
            peers.send("one", want(0))
            assert (await there.recv()).key.index == 0
            sent, received = peers.link_bytes
            assert sent > len(BIG) > received > 0
        while await events.get() != LinkLost("one"):
            pass
        ended = peers.link_bytes
        assert ended[0] >= sent and received <= ended[1] < len(BIG)


def test_media_that_were_not_sent_come_with_the_next_question() -> None:
    placing, key = Placing(Mock(linked=[EncodePeer("unix:0", "one")]), 4, HealthConfig()), ItemKey(1, 0)
    placing.errand(key, item_of(1, 64))
    assert placing.asking("one", want(0), 0.0) == want(0)
    placing.unsent("one", key)
    assert placing.asking("other", want(0, None, 2), 0.0).media is None
    assert placing.asking("one", want(0, None, 2), 0.0).media == item_of(1, 64).media
    assert placing.asking("one", want(0, None, 3), 0.0).media is None, "now it has them"
    placing.over(key)
    placing.unsent("one", key)
    assert placing.asking("one", want(0, None, 4), 0.0).media is None and not placing.errands


async def test_a_receiver_remembers_which_media_were_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with made(tmp_path, monkeypatch, Gated(), Gated()) as one:
        receiver, send = one.receiver, one.receiver.peers.send
        receiver.request([(A, item_of(1, 64))], 600.0)
        await eventually(lambda: one.at(A) is not None)
        errand = receiver.placing.errands[A]
        first = errand.last
        monkeypatch.setattr(receiver.peers, "send", lambda peer, message: send(peer, message) or isinstance(
            message, Cancel))  # fmt: skip
        refusal = Refuse(A, receiver.receiver.items[A].epoch, "encode_failed", "why", True)
        receiver._heard(MessageReceived(first, refusal))
        assert errand.last != first and errand.unsent == {first}
