"""Peers that hold both halves: alone, for each other, and without a partner that is gone. Tokens are the monolith's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from aiodisagg import BothService, EncodeConfig, LanguageConfig, SamplingParams
from aiodisagg.bootstrap.registry import PeerState
from aiodisagg.bootstrap.server import BootstrapConfig, BootstrapServer
from aiodisagg.cli.both import _serve_separate
from aiodisagg.encode.core import CoreGate
from aiodisagg.encode.device import DeviceGate
from aiodisagg.encode.gate import SlackGate
from aiodisagg.errors import ConfigError, Overloaded
from aiodisagg.language.service import LanguageService
from aiodisagg.link.hello import PeerRole
from aiodisagg.models.base import ChatMessage, ImagePart
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from tests.models.halves import PROMPTS, chat, png, video
from tests.services.system import Held, System, encode_config, eventually, finished, language_config
from tests.services.test_services_exact import TOKENS, truth, truths

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(scope="module")
def vision(moe: Path) -> Qwen3VLVisionEncoder:
    return Qwen3VLVisionEncoder(moe, dtype="float32")


def peer(folder: Path, name: str, *, encoder: object = None, url: str = "", **encode: object) -> BothService:
    language = language_config(folder, name=name, bootstrap=(url,) if url else (), transports=("ipc",))
    settings = encode_config(folder, transports=("ipc",), **encode)
    return BothService(language, settings, encoder=encoder)  # type: ignore[arg-type]


def asker(both: BothService) -> System:
    return System(both.language, [both.encode])


@asynccontextmanager
async def two(
    folder: Path, first: object, second: object, **encode: object
) -> AsyncIterator[tuple[BothService, BothService, BootstrapServer]]:
    """Linked to each other as the bootstrap server says."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(BootstrapServer("127.0.0.1", 0, BootstrapConfig(lease_s=0.3)))
        a = await stack.enter_async_context(peer(folder, "a", encoder=first, url=server.url, **encode))
        b = await stack.enter_async_context(peer(folder, "b", encoder=second, url=server.url, **encode))
        for both in (a, b):
            await asker(both).linked(2)
        yield a, b, server


def pictures(count: int, first: int = 0) -> list[list[ChatMessage]]:
    return [chat(ImagePart(png(128, 96, 200 + first + i)), "What is it?") for i in range(count)]


async def test_alone_it_answers_as_the_monolith_does(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    wanted = truths(moe)
    async with peer(moe, "a", encoder=vision) as both:
        made = asker(both)
        await made.linked(1)
        for name, messages in PROMPTS.items():
            assert await made.ask(messages, TOKENS) == wanted[name], name
        together = await asyncio.gather(*(made.ask(messages, TOKENS) for messages in PROMPTS.values()))
        assert dict(zip(PROMPTS, together, strict=True)) == wanted
        assert both.encode.pipeline.items_encoded and both.ready() == (True, "ok")
        (session,) = both.encode._sessions.values()
        assert session.plane_name == "memory"  # whatever the transports to others are
        text = both.metrics()
        for name in ("items_open", "encode_items_open", "tower_waits_total", "encode_row_bytes_total"):
            assert f"\naiodisagg_{name}" in text
        await made.quiet()


async def test_with_the_tower_inside_of_its_loop_it_answers_the_same(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    """The server that the others are compared with: no step while the tower works, no prefill before the last image."""
    wanted, settings = truths(moe), encode_config(moe, transports=("ipc",))
    language = language_config(moe, name="a", transports=("ipc",))
    async with BothService(language, settings, encoder=vision, inline=True) as both:
        made = asker(both)
        await made.linked(1)
        together = await asyncio.gather(*(made.ask(messages, TOKENS) for messages in PROMPTS.values()))
        assert dict(zip(PROMPTS, together, strict=True)) == wanted
        assert not both.language.config.overlap and "aiodisagg_tower_waits_total" in both.metrics()
        await made.quiet()


async def test_it_is_one_peer_of_the_bootstrap_server_and_says_what_it_can_do(
    moe: Path, vision: Qwen3VLVisionEncoder
) -> None:
    async with two(moe, vision, vision, self_test_s=0.5) as (a, b, server):
        entries = {entry.record.name: entry.record for entry in server.registry.peers()}
        assert set(entries) == {"a", "b"}
        for name, both in (("a", a), ("b", b)):
            record = entries[name]
            assert (record.role, record.addresses) == (PeerRole.BOTH, (both.address,))
            assert record.times is not None and record.times == both.encode.times
            assert record.times.tower[0].patches == record.times.prepare[0].patches == 196
            assert all(timing.seconds > 0 for timing in (*record.times.tower, *record.times.prepare))
        (link,) = [p.link for p in a.language.peers.linked if p.name == "b"]
        assert link is not None and link.remote.times == b.encode.times


async def test_two_peers_encode_for_each_other(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    async with two(moe, vision, vision) as (a, b, _):
        mine, theirs = pictures(6), pictures(6, first=6)
        of_a = [asker(a).ask(messages, TOKENS) for messages in mine]
        of_b = [asker(b).ask(messages, TOKENS) for messages in theirs]
        answers = await asyncio.gather(*of_a, *of_b)
        assert answers == [truth(moe, messages) for messages in (*mine, *theirs)]
        for both in (a, b):  # receivers are told apart by the links their rows went to
            receivers = {peer for outcome, _, peer, size in both.encode.sender.counters.items() if size}
            assert len(receivers) == 2
        assert a.encode.pipeline.items_encoded + b.encode.pipeline.items_encoded >= 12
        for both in (a, b):
            await asker(both).quiet()


async def test_a_partner_that_dies_is_done_without(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    held = Held(vision)
    async with two(moe, vision, held) as (a, b, _):
        asks = [asyncio.ensure_future(asker(a).ask(messages, TOKENS)) for messages in pictures(4)]
        await eventually(lambda: held.entered["encode"] == 1, "the partner has begun to encode for it")
        # It dies: nobody listens any more, and its links are cut without a word.
        b.encode._server._server.close()  # type: ignore[union-attr]
        for session in list(b.encode._sessions.values()):
            session.link.abort()
        assert [await ask for ask in asks] == [truth(moe, messages) for messages in pictures(4)]
        assert a.encode.pipeline.items_encoded == 4
        held.gate.set()


async def test_streams_that_run_hold_the_tower_back_and_none_for_ever(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    """While a stream decodes, an engine step must come between two batches; the answer is the same."""
    language = language_config(moe, kv_bytes=64 << 20)
    async with BothService(language, encode_config(moe, batch_patches=1), encoder=vision, inter_token_s=1e-9) as both:
        made = asker(both)
        await made.linked(1)
        stream = asyncio.ensure_future(made.ask(chat("Tell me."), 3000))
        await eventually(lambda: both.language.engine.stats().tokens_decoded > 3)
        messages = chat(video(12, 64, 64), "What happens?")
        assert await made.ask(messages, TOKENS) == truth(moe, messages)
        assert both.gate.waits > 0 and both.encode.pipeline.batch_sizes[1] == 6
        await finished(stream)
        await made.quiet()


async def test_draining_finishes_what_is_open_and_takes_nothing_new(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    held = Held(vision)
    async with two(moe, vision, held) as (a, b, server):
        of_b = [asyncio.ensure_future(asker(b).ask(messages, TOKENS)) for messages in pictures(3)]
        await eventually(lambda: held.entered["encode"] == 1)
        draining = asyncio.ensure_future(b.drain())
        await eventually(lambda: b.ready() == (False, "draining"))
        with pytest.raises(Overloaded):
            await anext(b.generate(chat("Hello?"), SamplingParams(max_tokens=1)))
        await eventually(
            lambda: (
                {e.record.name: e.state for e in server.registry.peers()}
                == {"a": PeerState.READY, "b": PeerState.DRAINING}
            )
        )
        assert not draining.done()
        held.gate.set()
        assert [await ask for ask in of_b] == [truth(moe, messages) for messages in pictures(3)]
        await draining
        # It is still there, but refuses: whoever has not heard yet encodes elsewhere.
        before = b.encode.pipeline.items_encoded
        answers = await asyncio.gather(*(asker(a).ask(messages, TOKENS) for messages in pictures(4, first=20)))
        assert answers == [truth(moe, messages) for messages in pictures(4, first=20)]
        assert b.encode.pipeline.items_encoded == before


async def test_a_tower_in_a_process_of_its_own_is_known_as_the_own_one(moe: Path) -> None:
    """Among many peers it was compared only when its turn came, as if it were anybody's."""
    seen: list[tuple[str, str]] = []

    class Front:
        async def serve(self, service: LanguageService, facts: dict[str, str], stop: asyncio.Event) -> None:
            await System(service, []).linked(1)
            (tower,) = service.peers.linked
            seen.append((tower.address, tower.incarnation))
            assert (facts["address"], service.rows.placing.own) == seen[0]

    options = ("--model", str(moe), "--row-dtype", "float32", "--transports", "ipc", "--self-test-s", "0")
    config = language_config(moe, name="a", transports=("ipc",))
    await _serve_separate(cast(Any, Front()), config, list(options), 0, asyncio.Event(), lambda: None)
    assert len(seen) == 1


def test_a_pace_that_cannot_be_meant(moe: Path) -> None:
    with pytest.raises(ConfigError, match="inter_token_s"):
        BothService(language_config(moe), EncodeConfig(model=moe), inter_token_s=0.0)


@pytest.mark.parametrize(
    ("language", "encode", "gate"),
    [("cpu", "cpu", CoreGate), ("cuda:0", "cuda:0", DeviceGate), ("cuda:0", "cuda:1", SlackGate)],
)
async def test_the_halves_share_what_they_have_by_its_own_rules(
    tmp_path: Path, language: str, encode: str, gate: type[object]
) -> None:
    both = BothService(LanguageConfig(model=tmp_path, device=language), EncodeConfig(model=tmp_path, device=encode))
    assert type(both.gate) is gate


async def test_each_heartbeat_of_a_peer_that_is_both_tells_what_its_tower_holds(
    moe: Path, vision: Qwen3VLVisionEncoder
) -> None:
    """It told nothing, so the next turn of a chat at the other peer was encoded anew."""
    async with two(moe, vision, vision) as (a, b, _):
        messages = chat(ImagePart(png(128, 96, 900)), "Which?")
        first = await asker(a).ask(messages, TOKENS)
        assert a.encode.pipeline.items_encoded + b.encode.pipeline.items_encoded == 1
        holder = a if a.encode.pipeline.items_encoded else b
        incarnation = holder.encode.config.incarnation
        await eventually(lambda: bool(getattr(b.language.peers.get(incarnation), "digests", ())))
        assert await asker(b).ask(messages, TOKENS) == first
        assert a.encode.pipeline.items_encoded + b.encode.pipeline.items_encoded == 1
