"""Where items go: by what is measured, away from slow, dying and draining peers, to who holds them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest
import torch

from aiodisagg import EncodeService, LanguageService
from aiodisagg.bootstrap.registry import Load, PeerEntry, PeerState
from aiodisagg.bootstrap.server import BootstrapConfig, BootstrapServer
from aiodisagg.errors import PoisonItem
from aiodisagg.link.hello import PeerRole
from aiodisagg.models.base import ChatMessage, ImagePart, Patches
from aiodisagg.models.plan import Qwen3VLPlanner
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from aiodisagg.scheduler.cost import ServiceTimes, Size, Timing
from tests.models.halves import PROMPTS, chat, png, truth, video
from tests.services.system import PATIENCE_S, Held, System, encode_config, eventually, language_config, system

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
POISON = (160, 96)
"""Width and height of the picture that encoders die of."""


@pytest.fixture(scope="module")
def vision(moe: Path) -> Qwen3VLVisionEncoder:
    return Qwen3VLVisionEncoder(moe, dtype="float32")


def question(seed: int = 0, size: tuple[int, int] = (128, 96)) -> list[ChatMessage]:
    return chat(ImagePart(png(*size, 270 + seed)), "What do you see?")


def says_no_more(entry: PeerEntry) -> bool:
    """It holds something and is idle: its heartbeats are alike from now on."""
    return bool(entry.load.digests) and entry.load == Load(digests=entry.load.digests)


# -- videos -----------------------------------------------------------------------------------------------------------


async def test_the_frame_groups_of_a_video_are_encoded_by_several_peers_at_once(
    moe: Path, vision: Qwen3VLVisionEncoder
) -> None:
    held, messages = Held(vision), chat(video(8), "What happens?")
    async with system(moe, encoders=2, encoder=held) as made:
        made.language._planner = Qwen3VLPlanner(moe, group_patches=1)
        asked = asyncio.ensure_future(made.ask(messages, 6))
        await eventually(lambda: held.entered["encode"] == 2, "both towers are at it")
        held.gate.set()
        assert await asked == truth(moe, messages)  # of the whole video
        assert [encoder.sender.sources.started for encoder in made.encoders] == [2, 2]


async def test_of_a_video_only_the_groups_of_a_peer_that_dies_are_encoded_again(
    moe: Path, vision: Qwen3VLVisionEncoder
) -> None:
    held, messages = Held(vision), chat(video(8), "What happens?")
    async with system(moe, failover_s=0.0) as made, AsyncExitStack() as stack:
        made.language._planner = Qwen3VLPlanner(moe, group_patches=1)
        stack.callback(held.gate.set)
        dying = await stack.enter_async_context(EncodeService(encode_config(moe), encoder=held))
        made.language.add_peer(dying.address)
        await made.linked(2)
        asked = asyncio.ensure_future(made.ask(messages, 6))
        (living,) = made.encoders
        await eventually(lambda: held.entered["encode"] and not living.pipeline.waiting)
        assert living.sender.sources.started == 2
        await die(dying)
        assert await asked == truth(moe, messages)
        assert living.sender.sources.started == 4
        held.gate.set()


# -- costs ------------------------------------------------------------------------------------------------------------


async def test_costs_are_learned_from_what_happens_and_their_error_is_a_metric(moe: Path) -> None:
    async with system(moe) as made:
        for seed in range(6):
            await made.ask(question(seed), 2)
        await made.ask(PROMPTS["three images"], 2)
        (peer,) = made.language.peers.linked
        costs = peer.book.costs
        assert (costs.prepare.observed, costs.transfer.observed, costs.finishes) == (9, 8, 8)
        assert 5 <= costs.tower.observed <= 8, "items of one batch are one observation, made when the next one leaves"
        text = made.language.metrics()
        for stage in ("prepare", "tower", "transfer", "finish"):
            assert f'aiodisagg_prediction_error{{peer="{peer.name}",stage="{stage}"}}' in text


async def test_what_prefill_takes_is_learned_from_text_and_from_pictures(moe: Path) -> None:
    async with system(moe) as made:
        await made.ask(question(0), 2)
        assert made.language.rows.placing.prefill.observed == 0, "too few steps to tell"
        for seed in range(1, 9):
            await made.ask(question(seed), 2)
        await made.ask(PROMPTS["text"], 2)
        assert made.language.rows.placing.prefill.observed >= 10


async def test_a_self_test_in_the_hello_is_believed(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    times = ServiceTimes(tower=(Timing.of((1, 8, 8), 5.0), Timing.of((1, 16, 16), 20.0)), prepare_threads=7)
    async with system(moe, encoders=0) as made, EncodeService(encode_config(moe), encoder=vision) as encoder:
        encoder._hello = msgspec.structs.replace(encoder._hello, times=times)
        made.language.add_peer(encoder.address)
        await made.linked(1)
        costs = made.language.peers.linked[0].book.costs
        assert costs.prepare_threads == 7
        assert costs.predict(Size.of((1, 16, 16))).tower_s == pytest.approx(20.0, rel=0.1)


async def test_items_of_one_request_are_spread_over_the_peers(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    held = Held(vision)
    pictures = [ImagePart(png(64, 64, 300 + i)) for i in range(4)]
    async with system(moe, encoders=2, encoder=held) as made:
        asked = asyncio.ensure_future(made.ask(chat(*pictures, "Which?"), 6))
        await eventually(lambda: sum(len(encoder.sender.items) for encoder in made.encoders) == 4)
        assert [len(encoder.sender.items) for encoder in made.encoders] == [2, 2]
        held.gate.set()
        assert await asked == truth(moe, chat(*pictures, "Which?"))


# -- slow, dying, draining --------------------------------------------------------------------------------------------


async def test_an_item_of_a_slow_encoder_is_fetched_from_another_too(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    held = Held(vision)
    async with system(moe, encoders=0, hedge_s=0.05) as made:
        async with EncodeService(encode_config(moe, name="slow"), encoder=held) as slow:
            made.language.add_peer(slow.address)
            await made.linked(1)
            asked = [asyncio.ensure_future(made.ask(question(), 6)) for _ in range(2)]
            await eventually(lambda: held.entered["encode"] == 1)
            async with EncodeService(encode_config(moe, name="quick"), encoder=vision) as quick:
                made.encoders = [slow, quick]
                made.language.add_peer(quick.address)
                assert [await task for task in asked] == [truth(moe, question())] * 2
                assert not held.gate.is_set(), "the slow one is at it still"
                hedges = made.language.rows.placing.hedges
                assert (hedges.started, hedges.won) == (1, 1)
                assert "aiodisagg_hedges_won_total 1.0" in made.language.metrics()
                await eventually(lambda: not slow.sender.items)
                held.gate.set()
                await made.quiet()


async def test_a_hedge_that_is_not_needed_ends_with_the_first(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    first, second = Held(vision), Held(vision)
    async with system(moe, encoders=0, hedge_s=0.05) as made:
        async with AsyncExitStack() as stack:
            for name, held in (("first", first), ("second", second)):
                service = EncodeService(encode_config(moe, name=name), encoder=held)
                made.encoders.append(await stack.enter_async_context(service))
                made.language.add_peer(service.address)
                await made.linked(len(made.encoders))
                if name == "first":
                    asked = asyncio.ensure_future(made.ask(question(), 6))
                    await eventually(lambda: first.entered["encode"] == 1)
            await eventually(lambda: second.entered["encode"] == 1)
            first.gate.set()
            assert await asked == truth(moe, question())
            hedges = made.language.rows.placing.hedges
            assert (hedges.started, hedges.won) == (1, 0)
            await eventually(lambda: not made.encoders[1].sender.items)
            second.gate.set()
            await made.quiet()


class Fragile:
    """A VisionEncoder that stops in the tower when a batch has the poison picture in it, until the gate is open.

    ``first``: what its first batch waits for.
    """

    def __init__(self, encoder: Qwen3VLVisionEncoder, poison: tuple[int, int, int]) -> None:
        self._encoder, self._poison = encoder, poison
        self.fingerprint, self.layout, self.prepare = encoder.fingerprint, encoder.layout, encoder.prepare
        self.gate, self.first = threading.Event(), threading.Event()
        self.first.set()
        self.seen = 0

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        assert self.first.wait(PATIENCE_S)
        if any(patches.grid_thw == self._poison for patches in batch):
            self.seen += 1
            assert self.gate.wait(PATIENCE_S)
        return self._encoder.encode(batch)


async def die(service: EncodeService) -> None:
    """What others see of a process that is killed: links that end without a word, and nobody listens."""
    for connection in service._server._tasks.values():
        connection.abort()
    await service._server.__aexit__(None, None, None)


async def test_an_item_that_kills_two_encoders_is_refused_while_others_go_on(
    moe: Path, vision: Qwen3VLVisionEncoder
) -> None:
    async with system(moe, encoders=0, failover_s=0.0) as made, AsyncExitStack() as stack:
        poison, others = question(0, POISON), [question(seed) for seed in range(1, 6)]
        item = made.language._planner.plan(poison).items[0]
        fragile = [Fragile(vision, item.grid_thw) for _ in range(3)]
        for encoder in fragile:
            service = EncodeService(encode_config(moe), encoder=encoder)
            made.encoders.append(await stack.enter_async_context(service))
            made.language.add_peer(service.address)
        await made.linked(3)
        asked = asyncio.ensure_future(made.ask(poison, 6))
        beside = [asyncio.ensure_future(made.ask(messages, 6)) for messages in others]
        for alive in (2, 1):
            victim = await _in_tower(made, item.digest)
            await die(victim)
            fragile[made.encoders.index(victim)].gate.set()
            await made.linked(alive)
        with pytest.raises(PoisonItem, match="encoders died"):
            await asked
        assert [await task for task in beside] == [truth(moe, messages) for messages in others]
        with pytest.raises(PoisonItem):
            await made.ask(poison, 6)
        assert await made.ask(question(7), 6) == truth(moe, question(7))
        assert sorted(encoder.seen for encoder in fragile) == [0, 1, 1]
        assert "aiodisagg_poison_refusals_total 2.0" in made.language.metrics()
        made.encoders = [service for service in made.encoders if service._server._tasks]


async def test_a_bystander_in_the_batch_that_killed_is_not_in_the_next_one(
    moe: Path, vision: Qwen3VLVisionEncoder
) -> None:
    async with system(moe, encoders=0, failover_s=0.0) as made, AsyncExitStack() as stack:
        asks = {"poison": question(0, POISON), "bystander": question(21), "before": question(22)}
        items = {name: made.language._planner.plan(messages).items[0] for name, messages in asks.items()}
        fragile = [Fragile(vision, items["poison"].grid_thw) for _ in range(3)]

        async def start(encoder: Fragile) -> None:
            config = encode_config(moe, batch_patches=4096)
            made.encoders.append(await stack.enter_async_context(EncodeService(config, encoder=encoder)))
            made.language.add_peer(made.encoders[-1].address)
            await made.linked(1)

        def at(stage: str) -> set[str]:
            (peer,) = made.language.peers.linked
            here = {item.digest for item in peer.book.open.values() if item.stage == stage}
            return {name for name, item in items.items() if item.digest in here}

        fragile[0].first.clear()
        await start(fragile[0])
        asked = {"before": asyncio.ensure_future(made.ask(asks["before"], 6))}
        await eventually(lambda: at("encoding") == {"before"})
        for name in ("poison", "bystander"):  # one after the other: who came first is tried first
            asked[name] = asyncio.ensure_future(made.ask(asks[name], 6))
            await eventually(lambda name=name: name in at("prepared"))  # type: ignore[misc]
        fragile[0].first.set()
        await eventually(lambda: at("encoding") == {"poison", "bystander"})
        for number in (1, 2):
            await die(made.encoders[-1])
            fragile[number - 1].gate.set()
            await made.linked(0)
            await start(fragile[number])
            if number == 1:
                await eventually(lambda: at("encoding") == {"poison"})
        with pytest.raises(PoisonItem):
            await asked["poison"]
        for name in ("before", "bystander"):
            assert await asked[name] == truth(moe, asks[name])
        made.encoders = made.encoders[-1:]


async def _in_tower(made: System, digest: str) -> EncodeService:
    """The encoder in whose tower the item is, once the language peer has heard so."""
    found: list[str] = []

    def heard() -> bool:
        found[:] = [peer.incarnation for peer in made.language.peers.linked if digest in peer.book.in_tower()]
        return bool(found)

    await eventually(heard, "the item is in a tower")
    return next(service for service in made.encoders if service.config.incarnation == found[0])


async def test_encoders_that_leave_with_a_word_did_not_die_of_their_items(
    moe: Path, vision: Qwen3VLVisionEncoder
) -> None:
    async with system(moe, encoders=0, failover_s=0.0) as made:
        asked = None
        for _ in range(2):
            held = Held(vision)
            async with EncodeService(encode_config(moe), encoder=held) as leaver:
                made.language.add_peer(leaver.address)
                asked = asked or asyncio.ensure_future(made.ask(question(), 6))
                await eventually(lambda: any(peer.book.in_tower() for peer in made.language.peers.linked))
                held.gate.set()
                await leaver._server.__aexit__(None, None, None)
            await made.linked(0)
        async with EncodeService(encode_config(moe), encoder=vision) as last:
            made.language.add_peer(last.address)
            assert asked is not None and await asked == truth(moe, question())


async def test_a_draining_peer_gets_nothing_new_until_it_is_ready_again(
    moe: Path, vision: Qwen3VLVisionEncoder
) -> None:
    async with BootstrapServer("127.0.0.1", 0, BootstrapConfig(lease_s=60.0)) as server, AsyncExitStack() as stack:
        url = (server.url,)
        language = await stack.enter_async_context(LanguageService(language_config(moe, bootstrap=url)))
        made = System(language)
        for name in ("a", "b"):
            config = encode_config(moe, bootstrap=url, name=name)
            made.encoders.append(await stack.enter_async_context(EncodeService(config, encoder=vision)))
        await made.linked(2)
        await eventually(lambda: len(server.registry.peers()) == 3)
        drains, stays = made.encoders

        async def tell(state: PeerState) -> None:
            server.registry.heartbeat(drains.config.incarnation, Load(), state, asyncio.get_running_loop().time())
            server._publish()
            standing = {PeerState.DRAINING: 2, PeerState.READY: 0}[state]
            standings, who = language.rows.placing.standings, drains.config.incarnation
            await eventually(lambda: standings.of(who, 0.0) == standing)

        await tell(PeerState.DRAINING)
        for seed in range(4):
            assert await made.ask(question(seed), 6) == truth(moe, question(seed))
        assert (drains.pipeline.items_encoded, stays.pipeline.items_encoded) == (0, 4)
        await tell(PeerState.READY)
        await asyncio.gather(*(made.ask(question(seed), 2) for seed in range(4, 12)))
        assert drains.pipeline.items_encoded > 0
        await made.quiet()


@pytest.mark.parametrize("late", [False, True], ids=["is there", "comes later"])
async def test_another_language_peer_asks_who_holds_the_digest(
    moe: Path, vision: Qwen3VLVisionEncoder, late: bool
) -> None:
    """Told by heartbeats, an item goes to the peer that has it, busy as that may be: nothing is encoded twice.

    Who comes when all is quiet again is told but once, before it has a link.
    """
    async with BootstrapServer("127.0.0.1", 0, BootstrapConfig(lease_s=0.3)) as server, AsyncExitStack() as stack:
        url = (server.url,)
        made: list[System] = []

        async def come() -> None:
            config = language_config(moe, bootstrap=url, cache_bytes=0)
            made.append(System(await stack.enter_async_context(LanguageService(config))))

        for _ in range(1 if late else 2):
            await come()
        encoders = []
        for _ in range(3):
            config = encode_config(moe, bootstrap=url)
            encoders.append(await stack.enter_async_context(EncodeService(config, encoder=vision)))
        for one in made:
            await one.linked(3)
        pictures = [ImagePart(png(128, 96, 270 + seed)) for seed in range(3)]
        assert await made[0].ask(chat(*pictures, "Which?"), 6)
        assert [encoder.pipeline.items_encoded for encoder in encoders] == [1, 1, 1]
        if late:
            await eventually(lambda: sum(map(says_no_more, server.registry.peers(PeerRole.ENCODE))) == 3)
            await come()
            await made[1].linked(3)
        else:
            peers = made[1].language.peers
            await eventually(lambda: sum(len(peer.digests) for peer in peers.linked) == 3)
        for seed in (2, 1, 0):  # not the order in which peers would be chosen anyway
            assert await made[1].ask(question(seed), 6) == truth(moe, question(seed))
        assert sum(encoder.pipeline.items_encoded for encoder in encoders) == 3
        assert sum(encoder.sender.sources.hits for encoder in encoders) == 3
