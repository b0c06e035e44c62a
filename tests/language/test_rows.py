"""Items between their peers: a hedge that has none, deaths that are not sure, peers that refuse everything."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from aiodisagg.bench.synthetic import NullEncoder, SyntheticEncoder, item_of, synthetic_model
from aiodisagg.bootstrap.client import MembershipChange
from aiodisagg.bootstrap.registry import PeerRecord
from aiodisagg.encode.service import EncodeService
from aiodisagg.errors import LinkError
from aiodisagg.language import peers as links
from aiodisagg.language.rows import RowReceiver
from aiodisagg.link.hello import PeerRole
from aiodisagg.models.base import ItemKind, Patches
from aiodisagg.peer.config import EncodeConfig, LanguageConfig
from aiodisagg.protocol.events import Fail, ItemRequested, MessageReceived
from aiodisagg.protocol.messages import ItemKey, Refuse, Urgency
from aiodisagg.scheduler.book import PeerBook
from aiodisagg.scheduler.cost import StageModel
from aiodisagg.scheduler.health import HealthConfig
from tests.services.system import PATIENCE_S, eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
MODEL = synthetic_model(hidden_size=16, levels=3)
A, B = ItemKey(1, 0), ItemKey(2, 0)


class Zeros(SyntheticEncoder):
    """Its rows are finite, and it takes any media: a tower that failed is asked for something that is good."""

    def prepare(self, kind: ItemKind, media: Sequence[bytes], grid_thw: tuple[int, int, int], fps: float) -> Patches:
        return Patches(torch.tensor([int(media[0]) if media[0].isdigit() else -1]), grid_thw)

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        return NullEncoder(MODEL).encode(batch)


class Gated(Zeros):
    """Encodes once its gate is open."""

    def __init__(self) -> None:
        super().__init__(MODEL)
        self.gate = threading.Event()
        self.encoded: list[int] = []

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        self.encoded += [int(patches.pixel_values[0]) for patches in batch]
        assert self.gate.wait(PATIENCE_S)
        return super().encode(batch)


class Broken(Zeros):
    """Encodes no item, and is not broken for good."""

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        if any(patches.pixel_values[0] >= 0 for patches in batch):
            raise RuntimeError("an illegal memory access was encountered")
        return super().encode(batch)


class Made:
    """A receiver and encode peers; ``cut``: addresses that nobody reaches any more. ``swallowed``: those where what is
    sent is dropped, and not sent again; ``unanswered``: of these, which were dialled."""

    def __init__(self, receiver: RowReceiver, encoders: list[EncodeService]) -> None:
        self.receiver, self.encoders = receiver, encoders
        self.ends: dict[ItemKey, Fail | None] = {}
        self.cut: set[str] = set()
        self.swallowed: set[str] = set()
        self.unanswered: set[str] = set()

    def at(self, key: ItemKey) -> EncodeService | None:
        """In whose tower the item is, as far as was heard."""
        errand = self.receiver.placing.errands.get(key)
        if errand is None or errand.peer is None or not errand.peer.book.in_tower():
            return None
        return next(one for one in self.encoders if one.config.incarnation == errand.peer.incarnation)

    def cut_off(self, encoder: EncodeService) -> None:
        """A network does so, and tells nobody."""
        peer = self.receiver.peers.get(encoder.config.incarnation)
        assert peer is not None and peer.link is not None
        self.cut.add(peer.address)
        peer.link.abort()

    async def cut_off_two(self, key: ItemKey) -> list[EncodeService]:
        """The network takes one encoder after the other while the item is in its tower."""
        lost: list[EncodeService] = []
        for _ in range(2):
            await eventually(lambda: self.at(key) not in (None, *lost))
            at = self.at(key)
            assert at is not None
            lost.append(at)
            self.cut_off(at)
        await eventually(lambda: len(self.receiver.peers.linked) == len(self.encoders) - 2)
        return lost


@asynccontextmanager
async def made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *encoders: SyntheticEncoder, checksum: bool = True,
    their_checksum: bool = True,
) -> AsyncIterator[Made]:  # fmt: skip
    config = LanguageConfig(
        model=folder, transports=("memory",), failover_s=0.0, hedge_s=0.0, cache_bytes=0, checksum=checksum
    )
    async with AsyncExitStack() as stack:
        services = []
        for number, encoder in enumerate(encoders):
            at = EncodeConfig(
                model=folder, transports=("memory",), self_test_s=0.0, name=f"e{number}", incarnation=f"life-{number}",
                checksum=their_checksum,
            )  # fmt: skip
            services.append(await stack.enter_async_context(EncodeService(at, encoder=encoder)))
            if isinstance(encoder, Gated):
                stack.callback(encoder.gate.set)
        receiver = RowReceiver(
            config, MODEL, name="language", deliver=lambda key, start, data: None,
            ended=lambda key, failed: found.ends.__setitem__(key, failed),
        )  # fmt: skip
        found = Made(receiver, services)
        dial = links.dial

        async def reach(address: str, *args: object, **kwargs: object) -> object:
            if address in found.swallowed:
                found.unanswered.add(address)
                await asyncio.Event().wait()
            if address in found.cut:
                raise LinkError(address, "no route to host")
            return await dial(address, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(links, "dial", reach)
        # They are and stay equal, whatever keeps this machine busy, and of equal ones the first by name is asked.
        monkeypatch.setattr(PeerBook, "doubt", 0.0)
        monkeypatch.setattr(PeerBook, "told", lambda book, patches, now: None)
        monkeypatch.setattr(StageModel, "observe", lambda model, features, seconds: 0.0)
        await stack.enter_async_context(receiver)
        for service in services:
            receiver.peers.add(service.address)
        await eventually(lambda: len(receiver.peers.linked) == len(services))
        yield found


async def test_a_hedge_without_a_peer_gets_the_one_that_the_first_fetch_failed_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Gated()
    async with made(tmp_path, monkeypatch, encoder) as one:
        receiver, (service,) = one.receiver, one.encoders
        receiver.request([(A, item_of(1, 64))], 600.0)
        await eventually(lambda: one.at(A) is service)
        second = receiver.sharing.hedge(A)
        assert second is not None
        hedge, spec, left_s = second
        receiver.placing.errand(hedge, spec, frozenset({service.config.incarnation}))
        receiver.driver.feed(ItemRequested(hedge, spec, left_s))
        assert hedge in receiver.unplaced
        refusal = Refuse(A, receiver.receiver.items[A].epoch, "encode_failed", "why", False)
        receiver._heard(MessageReceived(service.config.incarnation, refusal))
        assert not one.ends
        encoder.gate.set()
        await eventually(lambda: A in one.ends)
        assert one.ends == {A: None}


@pytest.mark.parametrize(("others", "blamed"), [(0, 1), (1, 0)])
async def test_an_item_that_others_may_pass_is_not_its_peers_fault(
    others: int, blamed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second fetch was faster. Of a request with ``others`` patches besides, the peer may have taken shorter ones."""
    encoders = Gated(), Gated()
    async with made(tmp_path, monkeypatch, *encoders) as one:
        receiver, item = one.receiver, item_of(1, 64)
        patches = math.prod(item.grid_thw)
        receiver.request([(A, dataclasses.replace(item, urgency=Urgency(10.0, 0, patches + others)))], 600.0)
        await eventually(lambda: one.at(A) is not None)
        late = one.at(A)
        assert late is not None
        second = receiver.sharing.hedge(A)
        assert second is not None
        failed = Mock(return_value=0.0)
        monkeypatch.setattr(receiver.placing.standings, "failed", failed)
        receiver.placing.errand(second[0], second[1], frozenset({late.config.incarnation}))
        receiver.driver.feed(ItemRequested(*second))
        encoders[1 - one.encoders.index(late)].gate.set()
        await eventually(lambda: A in one.ends)
        assert one.ends == {A: None} and failed.call_count == blamed


async def test_peers_are_not_compared_for_a_late_item_that_may_not_be_hedged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with made(tmp_path, monkeypatch, Gated(), Gated()) as one:
        receiver, now = one.receiver, asyncio.get_running_loop().time()
        compared = Mock(return_value=None)
        receiver.request([(A, item_of(1, 64))], 600.0)
        await eventually(lambda: one.at(A) is not None)
        monkeypatch.setattr(receiver.placing, "best", compared)
        hedges = receiver.placing.hedges
        for other, calls in ((None, 1), (B, 1)):
            if other is not None:
                hedges.hedged(other)
            hedges.later(A, 0.0, now)
            receiver._look_for_overdue()
            assert compared.call_count == calls and hedges.next_timer() is not None
        hedges.settled(A)


async def test_an_item_whose_encoders_were_cut_off_is_encoded_when_one_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was poison: HTTP 400, for ten minutes."""
    encoders = [Gated() for _ in range(3)]
    async with made(tmp_path, monkeypatch, *encoders) as one:
        one.receiver.request([(A, item_of(1, 64))], 60.0)
        await one.cut_off_two(A)
        await eventually(lambda: A in one.receiver.unplaced, "not asked of the third before it is known what it did")
        one.cut.clear()
        for encoder in encoders:
            encoder.gate.set()
        await eventually(lambda: A in one.ends)
        assert one.ends == {A: None}


async def test_an_item_whose_encoders_are_not_heard_of_is_tried_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = [Gated() for _ in range(3)]
    async with made(tmp_path, monkeypatch, *encoders) as one:
        one.receiver.placing.poison.config = HealthConfig(confirm_s=0.2)
        one.receiver.request([(A, item_of(1, 64))], 60.0)
        lost = await one.cut_off_two(A)
        await eventually(lambda: one.at(A) not in (None, *lost))
        for encoder in encoders:
            encoder.gate.set()
        await eventually(lambda: A in one.ends)
        assert one.ends == {A: None} and len(one.receiver.peers.linked) == 1


async def test_what_membership_knows_of_the_dead_ends_an_item_that_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with made(tmp_path, monkeypatch, *(Gated() for _ in range(3))) as one:
        one.receiver.request([(A, item_of(1, 64))], 60.0)
        lost = [service.config.incarnation for service in await one.cut_off_two(A)]
        await eventually(lambda: A in one.receiver.unplaced)
        gone = tuple(PeerRecord(name="encode", incarnation=life, role=PeerRole.ENCODE) for life in lost)
        one.receiver.told(MembershipChange((), gone))
        failed = one.ends[A]
        assert failed is not None and failed.code == "poison"


async def test_items_fail_when_there_has_been_no_encode_peer_for_as_long_as_one_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They held KV pages and places until their deadline, ten minutes for a client of the API."""
    encoders = [Gated(), Gated()]
    async with made(tmp_path, monkeypatch, *encoders) as one:
        one.receiver.request([(A, item_of(1, 64)), (B, item_of(2, 64))], 600.0)
        await eventually(lambda: one.at(A) is not None)
        for encoder in one.encoders:
            one.cut_off(encoder)
        await eventually(lambda: not one.receiver.peers.linked and len(one.receiver.unplaced) == 2)
        assert not one.ends, "one may be back"
        object.__setattr__(one.receiver.config, "peer_wait_s", one.receiver.peers.absent_s + 0.1)
        one.receiver._place_waiting()
        await eventually(lambda: len(one.ends) == 2)
        for failed in one.ends.values():
            assert failed is not None and (failed.code, failed.message) == ("unreachable", "no encode peer is linked")
        assert not one.receiver.unplaced


async def test_who_shares_a_picture_of_a_large_batch_does_not_wait_for_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept the place of who came first, however low that was."""
    encoder = Gated()
    batch = [(ItemKey(1, n), dataclasses.replace(item_of(n, 64), urgency=Urgency(600.0, 0, 4096))) for n in range(8)]
    async with made(tmp_path, monkeypatch, encoder) as one:
        one.receiver.request(batch[:1], 600.0)
        await eventually(lambda: encoder.encoded == [0])
        one.receiver.request(batch[1:], 600.0)
        last = dataclasses.replace(item_of(7, 64), urgency=Urgency(600.0, -1, 256))
        one.receiver.request([(B, last)], 600.0)
        jobs = one.encoders[0].pipeline._jobs
        await eventually(lambda: [job.stage for job in jobs.values()] == ["encoding", *["prepared"] * 7])
        await eventually(lambda: jobs[last.digest].claim.priority == -1)
        encoder.gate.set()
        await eventually(lambda: len(one.ends) == 9)
        assert set(one.ends.values()) == {None}
        assert encoder.encoded == [0, 7, *range(1, 7)]


async def _cut_off_with(one: Made, items: int) -> None:
    """The network takes all encoders while so many items are at them, for longer than links are waited for."""
    one.receiver.request([(ItemKey(1, n), item_of(n, 64)) for n in range(items)], 600.0)
    await eventually(lambda: sum(len(peer.book.open) for peer in one.receiver.peers.linked) == items)
    for service in one.encoders:
        one.cut_off(service)
    await eventually(lambda: not one.receiver.peers.linked and len(one.receiver.unplaced) == items)


async def test_what_waited_for_a_network_is_not_all_given_to_the_first_peer_that_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "SETTLE_S", PATIENCE_S)
    encoders = [Gated() for _ in range(3)]
    async with made(tmp_path, monkeypatch, *encoders) as one:
        receiver = one.receiver
        await _cut_off_with(one, 12)
        first, *others = sorted(one.cut)
        one.cut.remove(first)
        await eventually(lambda: receiver.peers.linked)
        receiver.request([(ItemKey(2, n), item_of(12 + n, 64)) for n in range(12)], 600.0)
        assert len(receiver.unplaced) == 24 and not receiver.peers.linked[0].book.open
        one.cut.difference_update(others)
        await eventually(lambda: not receiver.unplaced, "as soon as all are back")
        given = [len(peer.book.open) for peer in receiver.peers.linked]
        assert len(given) == 3 and sum(given) == 24 and max(given) <= 12
        for encoder in encoders:
            encoder.gate.set()
        await eventually(lambda: len(one.ends) == 24)
        assert set(one.ends.values()) == {None}


async def test_peers_that_do_not_come_back_are_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = [Gated() for _ in range(2)]
    async with made(tmp_path, monkeypatch, *encoders) as one:
        await _cut_off_with(one, 4)
        one.cut.pop()
        for encoder in encoders:
            encoder.gate.set()
        await eventually(lambda: len(one.ends) == 4)
        assert set(one.ends.values()) == {None} and len(one.receiver.peers.linked) == 1


async def test_when_one_is_back_the_others_are_dialled_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were left for a second by then, and all that waited went to the few that happened to be dialled sooner."""
    monkeypatch.setattr(links, "FIRST_RETRY_S", 2 * PATIENCE_S)
    async with made(tmp_path, monkeypatch, *(Gated() for _ in range(5))) as one:
        await _cut_off_with(one, 1)
        one.cut.clear()
        one.receiver.peers.add(one.encoders[0].address)
        await eventually(lambda: len(one.receiver.peers.linked) == 5 and not one.receiver.unplaced)


async def test_when_one_is_back_the_others_are_dialled_anew_whose_packets_were_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were sent again after a second or three, and all that waited went to the first peer."""
    monkeypatch.setattr(links, "SETTLE_S", PATIENCE_S)
    async with made(tmp_path, monkeypatch, *(Gated() for _ in range(3))) as one:
        first, *others = (service.address for service in one.encoders)
        one.swallowed.update(others)
        await _cut_off_with(one, 12)
        await eventually(lambda: one.unanswered == set(others))
        one.swallowed.clear()
        one.cut.clear()
        one.receiver.peers.add(first)
        await eventually(lambda: not one.receiver.unplaced)
        given = [len(peer.book.open) for peer in one.receiver.peers.linked]
        assert len(given) == 3 and sum(given) == 12 and max(given) <= 6


async def test_no_item_fails_while_a_peer_is_linked_that_encodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four that refuse were as many as an item had attempts."""
    async with made(tmp_path, monkeypatch, *(Broken(MODEL) for _ in range(5)), Zeros(MODEL)) as one:
        one.receiver.request([(A, item_of(1, 64))], 60.0)
        await eventually(lambda: A in one.ends)
        assert one.ends == {A: None} and one.receiver.placing.moves == 5, "of equal ones the first by name is asked"
        samples = [sample for metric in one.receiver.metrics() for sample in metric.samples]
        refusals = [sample for sample in samples if sample.name == "aiodisagg_item_refusals_total"]
        assert sorted(sample.labels["peer"] for sample in refusals) == [f"e{number}" for number in range(5)]
        assert {(sample.labels["code"], sample.value) for sample in refusals} == {("encode_failed", 1.0)}
