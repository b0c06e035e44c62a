"""A picture that was beside a killer once is tried with nothing beside it, whoever else asks for what."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from aiodisagg import EncodeService, LanguageService
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from tests.services.system import System, encode_config, eventually, finished, language_config
from tests.services.test_services_scheduling import POISON, Fragile, die, question, truth

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
ASKED = {
    "killer": question(1, POISON), "another killer": question(2, POISON), "bystander": question(3),
    "first here": question(4), "first there": question(5),
}  # fmt: skip


class Asker:
    """A language peer. ``at``: those of its pictures that are in a stage, as far as it has heard."""

    def __init__(self, language: LanguageService) -> None:
        self.system = System(language)
        self._names = {language._planner.plan(messages).items[0].digest: name for name, messages in ASKED.items()}

    def at(self, stage: str) -> set[str]:
        here = [item for peer in self.system.language.peers.linked for item in peer.book.open.values()]
        return {self._names[item.digest] for item in here if item.stage == stage}

    async def ask(self, what: str, stage: str) -> asyncio.Task[tuple[int, ...]]:
        """Returns when the picture is in this stage."""
        task = asyncio.ensure_future(self.system.ask(ASKED[what], 6))
        await eventually(lambda: what in self.at(stage))
        return task

    async def link(self, service: EncodeService) -> None:
        self.system.language.add_peer(service.address)
        await self.system.linked(1)


async def test_killers_that_different_language_peers_ask_for_do_not_make_a_bystander_poison(moe: Path) -> None:
    """It was tried in a batch with what the other peer had asked for, was there when that killed, and was refused."""
    vision = Qwen3VLVisionEncoder(moe, dtype="float32")
    async with AsyncExitStack() as stack:
        here, there = [
            Asker(await stack.enter_async_context(LanguageService(language_config(moe, failover_s=0.0))))
            for _ in range(2)
        ]

        async def start() -> tuple[Fragile, EncodeService]:
            fragile = Fragile(vision, here.system.language._planner.plan(ASKED["killer"]).items[0].grid_thw)
            service = EncodeService(encode_config(moe, batch_patches=4096), encoder=fragile)
            return fragile, await stack.enter_async_context(service)

        async def dies(fragile: Fragile, service: EncodeService) -> None:
            await die(service)
            fragile.gate.set()
            await here.system.linked(0)
            await there.system.linked(0)

        fragile, service = await start()
        fragile.first.clear()
        await here.link(service)
        first, killer = await here.ask("first here", "encoding"), await here.ask("killer", "prepared")
        bystander = await here.ask("bystander", "prepared")
        fragile.first.set()
        await eventually(lambda: here.at("encoding") == {"killer", "bystander"})
        await finished(killer)
        await dies(fragile, service)

        fragile, service = await start()
        fragile.first.clear()
        await there.link(service)
        others = [await there.ask("first there", "encoding"), await there.ask("another killer", "prepared")]
        await here.link(service)
        await eventually(lambda: "bystander" in here.at("prepared"))
        fragile.first.set()
        await eventually(lambda: there.at("encoding") == {"another killer"})
        await dies(fragile, service)

        fragile, service = await start()
        await here.link(service)
        assert await bystander == truth(moe, ASKED["bystander"])
        assert await first == truth(moe, ASKED["first here"])
        await finished(*others)
