"""Peers that compute nothing any more: their health says so, and their processes end so that new ones begin."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from aiodisagg import BothService, SamplingParams
from aiodisagg.api import HttpServer
from aiodisagg.cli.process import until
from aiodisagg.device.vitals import LIMIT
from aiodisagg.encode.service import EncodeService
from aiodisagg.encode.tower import Tower
from aiodisagg.engine.worker import StepThread
from aiodisagg.errors import EncodeFailed, EngineError, PeerBroken, PoisonItem
from aiodisagg.models.base import ChatMessage, ImagePart, Patches
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from aiodisagg.peer.http import MetricsServer
from tests.models.halves import chat, png
from tests.services.system import PATIENCE_S, Held, encode_config, eventually, finished, language_config, system
from tests.services.test_services_cli import run

pytestmark = pytest.mark.usefixtures("no_leaks")
BREAKS = 36
"""Patches of a picture that breaks a device."""
BUG = "cannot convert float NaN to integer"
PROBES = ("/live", "/health")


@pytest.fixture(scope="module")
def vision(moe: Path) -> Qwen3VLVisionEncoder:
    return Qwen3VLVisionEncoder(moe, dtype="float32")


class Failing(Held):
    """``fails``: its device does not compute any more."""

    fails = False

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        self.entered["encode"] += 1
        if self.fails:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self._encoder.encode(batch)


def picture(seed: int) -> list[ChatMessage]:
    return chat(ImagePart(png(64, 64, 300 + seed)), "What is it?")


def bug(*_: Any, **__: Any) -> Any:
    raise ValueError(BUG)


async def probe(url: str, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession(url) as session, session.get(path) as response:
        return response.status, (await response.json())["reason"]


def metrics_server(encode: EncodeService) -> MetricsServer:
    return MetricsServer(encode.metrics, encode.ready, "127.0.0.1", 0, broken=lambda: encode.broken)


@pytest.mark.anyio
async def test_a_language_peer_whose_step_thread_ended(moe: Path) -> None:
    async with system(moe) as made, HttpServer(made.language, port=0) as server:
        language = made.language
        for path in PROBES:
            assert await probe(server.url, path) == (200, "ok")
        serving = asyncio.ensure_future(language.serve())
        language.engine._scheduler.plan_step = bug  # type: ignore[method-assign]
        for _ in range(2):
            with pytest.raises(EngineError, match=BUG):
                await made.ask(chat("hi"), 2)
        with pytest.raises(PeerBroken, match="the engine is broken: its thread ended with ValueError"):
            await serving
        for path in PROBES:
            assert await probe(server.url, path) == (503, "the engine is broken: its thread ended with ValueError")
        assert "\naiodisagg_requests_failed_total 2.0" in language.metrics()
        with pytest.raises(EngineError, match=BUG):  # counted, too: it never got in
            await made.ask(chat("hi"), 2)
        assert "\naiodisagg_requests_failed_total 3.0" in language.metrics()


@pytest.mark.anyio
async def test_an_encode_peer_on_whose_device_nothing_works(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    encoder = Failing(vision)
    async with system(moe, encoder=encoder) as made:
        (encode,) = made.encoders
        serving = asyncio.ensure_future(encode.serve())
        async with metrics_server(encode) as server:
            await made.ask(picture(0), 2)
            for path in PROBES:
                assert await probe(server.url, path) == (200, "ok")
            encoder.fails = True
            asking = asyncio.ensure_future(made.ask(picture(1), 2))
            with pytest.raises(PeerBroken, match="the tower is broken: what it tried failed, 1 in a row"):
                await serving
            for path in PROBES:
                status, reason = await probe(server.url, path)
                assert status == 503 and reason.startswith("the tower is broken")
            await finished(asking)


class Sticky(Failing):
    """A device that one picture breaks for good."""

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        self.fails = self.fails or any(patches.count == BREAKS for patches in batch)
        return super().encode(batch)


@pytest.mark.anyio
async def test_a_picture_that_breaks_devices_is_not_taken_to_all(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    """What else was in the tower is encoded elsewhere, and what breaks two is poison."""
    towers = [Sticky(vision) for _ in range(4)]
    async with system(moe, encoders=0) as made, AsyncExitStack() as stack:
        for i, tower in enumerate(towers):
            config = encode_config(moe, name=f"encode-{i}", transports=("memory",), row_dtype="float32")
            peer = await stack.enter_async_context(EncodeService(config, encoder=tower))
            made.language.add_peer(peer.address)
        await eventually(lambda: len(made.language.peers.linked) == 4)
        with pytest.raises(PoisonItem):
            await made.ask(chat(ImagePart(png(96, 96, 1)), "?"), 2)
        assert sum(tower.fails for tower in towers) == 2
        await made.ask(picture(1), 2)
        with pytest.raises(PoisonItem):
            await made.ask(chat(ImagePart(png(96, 96, 1)), "?"), 2)
        assert sum(tower.fails for tower in towers) == 2


@pytest.mark.anyio
async def test_pictures_that_no_tower_can_encode_do_not_end_it(
    moe: Path, vision: Qwen3VLVisionEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody sends nothing else, and nobody sends anything good."""

    class Picky(Held):
        def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
            if any(patches.count == 16 for patches in batch):
                raise RuntimeError("poison")
            return self._encoder.encode(batch)

    async with system(moe, encoder=Picky(vision)) as made:
        (encode,) = made.encoders
        for n in range(2 * LIMIT):
            with pytest.raises(EncodeFailed):
                await made.ask(picture(n), 2)
        assert encode.ready() == (True, "ok")
        assert caplog.text.count("what is good works") == 2


@pytest.mark.anyio
@pytest.mark.parametrize("half", ["engine", "tower"])
async def test_a_peer_that_is_both_ends_with_either_half(
    moe: Path, vision: Qwen3VLVisionEncoder, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with BothService(language_config(moe), encode_config(moe), encoder=vision) as both:
        serving = asyncio.ensure_future(both.serve())
        await eventually(lambda: both.ready() == (True, "ok"))
        if half == "engine":
            both.language.engine._scheduler.plan_step = bug  # type: ignore[method-assign]
        else:
            monkeypatch.setattr(both.encode.pipeline._tower, "_launch", bug)
        asking = asyncio.ensure_future(_first(both, picture(0)))
        with pytest.raises(PeerBroken, match=f"the {half} is broken"):
            await serving
        assert both.ready() == (False, f"the {half} is broken: its thread ended with ValueError")
        assert both.broken == both.ready()[1]
        asking.cancel()
        await asyncio.wait([asking])


async def _first(both: BothService, messages: list[ChatMessage]) -> None:
    async with aclosing(both.generate(messages, SamplingParams(max_tokens=1))) as deltas:
        await anext(deltas)


@pytest.mark.anyio
async def test_an_encode_peer_that_drains_is_not_ready_but_lives(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    async with EncodeService(encode_config(moe), encoder=vision) as encode:
        async with metrics_server(encode) as server:
            await encode.drain()
            assert await probe(server.url, "/health") == (503, "draining")
            assert await probe(server.url, "/live") == (200, "ok")


@pytest.mark.anyio
async def test_a_language_peer_without_encode_peers_is_not_ready_but_lives(moe: Path) -> None:
    """Or who looks after it would start it anew, with all that it serves, as often as an encode peer is."""
    async with system(moe, encoders=0) as made, HttpServer(made.language, port=0) as server:
        assert await probe(server.url, "/health") == (503, "no encode peer is linked")
        assert await probe(server.url, "/live") == (200, "ok")
        await made.language.drain()
        assert await probe(server.url, "/health") == (503, "draining")
        assert await probe(server.url, "/live") == (200, "ok")


@pytest.mark.anyio
async def test_a_process_ends_by_a_signal_or_with_what_it_serves() -> None:
    class Service:
        def __init__(self) -> None:
            self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def serve(self) -> None:
            await self.ended

    stop, service = asyncio.Event(), Service()
    stop.set()
    async with asyncio.timeout(PATIENCE_S):
        await until(stop, service)
    assert not service.ended.done()
    service.ended.set_exception(PeerBroken("tower", "why"))
    with pytest.raises(PeerBroken, match="the tower is broken: why"):
        await until(asyncio.Event(), service)


@pytest.mark.parametrize(
    ("role", "part"), [("language", "engine"), ("encode", "tower"), ("both", "engine"), ("both", "tower")]
)
def test_the_command_ends_with_its_peer(moe: Path, role: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*((StepThread, "_step") if part == "engine" else (Tower, "_work")), bug)
    port = ("--port", "0") if role != "encode" else ("--self-test-s", "0")
    ended = run(role, "--model", str(moe), "--transports", "memory", *port)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == f"Error: the {part} is broken: its thread ended with ValueError"
