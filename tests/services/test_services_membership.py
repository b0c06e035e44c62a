"""Peers come, go and come back in any order, the bootstrap server too; answers stay exact."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from aiodisagg import EncodeService, LanguageService
from aiodisagg.bootstrap.server import BootstrapConfig, BootstrapServer
from aiodisagg.errors import ConfigError, NoEncodePeer
from aiodisagg.models.base import ChatMessage, ImagePart
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from tests.bootstrap.test_server_and_client import free_port
from tests.models.halves import chat, png, truth
from tests.services.system import Held, System, encode_config, eventually, language_config, system

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
LEASE = BootstrapConfig(lease_s=0.3)


@pytest.fixture(scope="module")
def vision(moe: Path) -> Qwen3VLVisionEncoder:
    return Qwen3VLVisionEncoder(moe, dtype="float32")


def question(seed: int = 0) -> list[ChatMessage]:
    return chat(ImagePart(png(128, 96, 70 + seed)), "What do you see?")


async def test_any_start_order_and_a_bootstrap_server_that_restarts(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    port = free_port()
    url = (f"http://127.0.0.1:{port}",)
    async with AsyncExitStack() as stack:
        # First who needs the others: nobody is there, not even the bootstrap server, and a request already waits.
        language = await stack.enter_async_context(LanguageService(language_config(moe, bootstrap=url)))
        made = System(language)
        early = asyncio.ensure_future(made.ask(question(), 6))
        first = await stack.enter_async_context(
            EncodeService(encode_config(moe, bootstrap=url, name="first"), encoder=vision)
        )
        made.encoders.append(first)
        async with BootstrapServer("127.0.0.1", port, LEASE) as server:
            assert await early == truth(moe, question())
            await eventually(lambda: len(server.registry.peers()) == 2)
        # The server is away: nobody notices.
        assert await made.ask(question(1), 6) == truth(moe, question(1))
        second = await stack.enter_async_context(
            EncodeService(encode_config(moe, bootstrap=url, name="second"), encoder=vision)
        )
        made.encoders.append(second)
        async with BootstrapServer("127.0.0.1", port, LEASE) as server:
            # It has forgotten everybody; everybody registers again, and the newcomer is found.
            during = asyncio.ensure_future(made.ask(question(2), 6))
            await eventually(lambda: len(server.registry.peers()) == 3)
            await made.linked(2)
            assert await during == truth(moe, question(2))
            await eventually(lambda: asyncio.get_running_loop().time() > server._born + 3 * LEASE.lease_s)
            assert len(language.peers.linked) == 2
            many = await asyncio.gather(*(made.ask(question(seed), 6) for seed in range(3, 7)))
            assert many == [truth(moe, question(seed)) for seed in range(3, 7)]
            assert second.pipeline.items_encoded
        await made.quiet()


async def test_a_peer_that_leaves_in_the_middle_of_its_items(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    """Its items move to the other peer; rows that arrived before are kept; answers are exact."""
    held = Held(vision)
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(system(moe, encoders=1, transports=("ipc",), failover_s=0.05))
        made.encoders[0].pipeline.encoder = vision
        leaver = EncodeService(encode_config(moe, name="leaver", transports=("ipc",)), encoder=held)
        async with leaver:
            made.language.add_peer(leaver.address)
            await made.linked(2)
            asked = [asyncio.ensure_future(made.ask(question(seed), 6)) for seed in range(4)]
            await eventually(lambda: held.entered["encode"] == 1 and leaver.sender.items)
            held.gate.set()  # its tower thread can end only then; the service waits for it when it closes
        assert [await task for task in asked] == [truth(moe, question(seed)) for seed in range(4)]
        assert len(made.language.peers.linked) == 1


async def test_items_move_when_their_peer_is_cut_off_while_it_encodes(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    held = Held(vision)
    async with system(moe, failover_s=0.05) as made:
        async with EncodeService(encode_config(moe, name="slow"), encoder=held) as slow:
            made.language.add_peer(slow.address)
            await made.linked(2)
            asked = [asyncio.ensure_future(made.ask(question(seed), 6)) for seed in range(4)]
            await eventually(lambda: held.entered["encode"] == 1)
            await slow._server.__aexit__(None, None, None)  # its links end and nobody listens; its tower goes on
            assert [await task for task in asked] == [truth(moe, question(seed)) for seed in range(4)]
            traces = made.language.traces.recent()
            assert sum(item.moves for trace in traces for item in trace.items) >= 1
            held.gate.set()


async def test_an_encode_peer_that_restarts_at_its_address(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    """A new incarnation under the same address: nothing of the old one is believed, requests wait for it."""
    address = "unix:@aiodisagg-test-restart"
    settings: dict[str, Any] = {"listen": address, "transports": ("ipc",)}
    async with LanguageService(language_config(moe, transports=("ipc",), failover_s=0.05)) as language:
        made = System(language)
        language.add_peer(address)
        for seed in range(3):
            early = asyncio.ensure_future(made.ask(question(seed), 6))
            async with EncodeService(encode_config(moe, **settings), encoder=vision) as encoder:
                made.encoders = [encoder]
                assert await early == truth(moe, question(seed))
                assert await made.ask(question(10), 6) == truth(moe, question(10))
                await made.quiet()
            await made.linked(0)
        assert not language.ready()[0]


async def test_without_an_encode_peer_text_is_answered_and_images_are_refused(moe: Path) -> None:
    async with LanguageService(language_config(moe, peer_wait_s=0.05)) as language:
        made = System(language)
        text = chat("Only text.")
        assert await made.ask(text, 6) == truth(moe, text)
        with pytest.raises(NoEncodePeer, match="none known"):
            await made.ask(question(), 6)
        await made.quiet()


async def test_what_is_no_address_of_a_peer_is_refused_at_once(moe: Path) -> None:
    async with LanguageService(language_config(moe)) as peer:
        with pytest.raises(ConfigError, match="'foo' is none of unix:@name, unix:/path, tcp:host:port"):
            peer.add_peer("foo")
        assert not peer.peers.linked


async def test_links_between_hosts_need_the_secret(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    """Over TCP with a secret on both sides; a peer without it gets nowhere, and hurts nobody."""
    settings: dict[str, Any] = {"listen": "tcp:127.0.0.1:0", "secret": b"sixteen bytes or more"}
    async with EncodeService(encode_config(moe, **settings), encoder=vision) as encoder:
        async with LanguageService(language_config(moe, peer_wait_s=0.2, secret=b"another secret, as long")) as wrong:
            wrong.add_peer(encoder.address)
            with pytest.raises(NoEncodePeer):
                await System(wrong).ask(question(), 6)
        async with LanguageService(language_config(moe, secret=settings["secret"])) as right:
            right.add_peer(encoder.address)
            made = System(right, [encoder])
            assert await made.ask(question(), 6) == truth(moe, question())
            await made.quiet()
