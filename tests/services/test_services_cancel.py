"""Whoever stops listening stops the work: in the engine, in the pool, on the wire, in the encode pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import aiohttp
import pytest

from aiodisagg import SamplingParams
from aiodisagg.api import HttpServer
from aiodisagg.errors import DeadlineExceeded
from aiodisagg.models.base import ChatMessage, ImagePart
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from tests.models.halves import PROMPTS, chat, png
from tests.services.openai_chat import chat_body
from tests.services.system import Held, eventually, finished, system

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(scope="module")
def vision(moe: Path) -> Qwen3VLVisionEncoder:
    return Qwen3VLVisionEncoder(moe, dtype="float32")


def pictures(count: int) -> list[list[ChatMessage]]:
    return [chat(ImagePart(png(64, 64, 50 + seed)), "What is it?") for seed in range(count)]


async def test_closing_the_generator_in_the_middle_of_the_answer(moe: Path) -> None:
    async with system(moe) as made:
        sampling = SamplingParams(max_tokens=500, ignore_eos=True)
        async with aclosing(made.language.generate(PROMPTS["three images"], sampling, request_id="gone")) as deltas:
            assert (await anext(deltas)).token_ids
        await made.quiet()
        assert made.language.traces.recent()[-1].state == "cancelled"
        assert await made.ask(PROMPTS["one image"], 4)


@pytest.mark.parametrize("stage", ["prepare", "encode"])
async def test_jobs_that_wait_are_dropped_at_once_and_the_others_go_on(
    moe: Path, vision: Qwen3VLVisionEncoder, stage: str
) -> None:
    """One item is held on a thread; what waits behind it leaves with its request, without waiting for that thread."""
    held = Held(vision, stage)
    first, *others = pictures(6)
    async with system(moe, encoder=held, encode={"prepare_threads": 1, "batch_patches": 16}) as made:
        pipeline = made.encoders[0].pipeline
        stays = asyncio.ensure_future(made.ask(first, 4))
        await eventually(lambda: held.entered[stage] == 1, "the first item is held")
        leave = [asyncio.ensure_future(made.ask(messages, 4)) for messages in others]
        await eventually(lambda: pipeline.waiting == 6, "every item is a job")
        await finished(*leave)
        await eventually(lambda: pipeline.waiting == 1 and len(made.encoders[0].sender.items) == 1, "the others left")
        assert not held.gate.is_set()
        held.gate.set()
        assert len(await stays) == 4
        assert held.entered["encode"] == 1


async def test_a_job_in_the_tower_is_left_and_its_rows_serve_the_next(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    held = Held(vision)
    (messages,) = pictures(1)
    async with system(moe, encoder=held) as made:
        task = asyncio.ensure_future(made.ask(messages, 4))
        await eventually(lambda: held.entered["encode"] == 1)
        await finished(task)
        await eventually(lambda: not made.encoders[0].sender.items)
        held.gate.set()
        await made.quiet()
        assert len(await made.ask(messages, 4)) == 4
        assert held.entered == {"prepare": 1, "encode": 1}


async def test_an_item_given_up_and_wanted_again_while_it_waits(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    held = Held(vision, "prepare")
    first, second = pictures(2)
    async with system(moe, encoder=held, encode={"prepare_threads": 1}) as made:
        stays = asyncio.ensure_future(made.ask(first, 4))
        await eventually(lambda: held.entered["prepare"] == 1)
        for _ in range(3):
            task = asyncio.ensure_future(made.ask(second, 4))
            await eventually(lambda: made.encoders[0].pipeline.waiting == 2)
            await finished(task)
        again = asyncio.ensure_future(made.ask(second, 4))
        held.gate.set()
        assert len(await stays) == len(await again) == 4
        assert held.entered["prepare"] == 2


async def test_an_encoder_that_hangs_does_not_hold_a_request_beyond_its_deadline(
    moe: Path, vision: Qwen3VLVisionEncoder
) -> None:
    held = Held(vision)
    async with system(moe, encoder=held) as made:
        with pytest.raises(DeadlineExceeded):
            await made.ask(pictures(1)[0], 4, timeout_s=0.2)
        await eventually(lambda: not made.encoders[0].sender.items)
        held.gate.set()


async def test_many_come_and_go_at_every_moment(moe: Path) -> None:
    """Each request is cancelled a little later than the one before: at planning, asking, encoding, transfer, decode."""
    async with system(moe, encoders=2, transports=("ipc",), block_rows=2, blocks=3) as made:
        turns = 1
        while True:
            task = asyncio.ensure_future(made.ask(PROMPTS["image and video"], 6, request_id=f"r{turns}"))
            for _ in range(turns):
                if task.done():
                    break
                await asyncio.sleep(0)
            if task.done():
                break
            await finished(task)
            turns = 1 + turns * 5 // 4
        assert len(await task) == 6
        await made.quiet()
        assert all(encoder.sender.sources.used_bytes == _cached(encoder.sender.sources) for encoder in made.encoders)


def _cached(sources: object) -> int:
    held = sources._sources.values()  # type: ignore[attr-defined]
    return sum(source.size_bytes for source in held if source.started)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("when", ["encoding", "decoding"])
async def test_a_client_that_hangs_up(moe: Path, vision: Qwen3VLVisionEncoder, stream: bool, when: str) -> None:
    held = Held(vision)
    async with system(moe, encoder=held, kv_bytes=64 << 20) as made, HttpServer(made.language, port=0) as server:
        body = chat_body(made.language, ImagePart(png(64, 64)), "What?", max_tokens=4000, stream=stream)
        async with aiohttp.ClientSession(server.url) as session:
            posted = asyncio.ensure_future(session.post("/v1/chat/completions", json=body))
            await eventually(lambda: held.entered["encode"] == 1)
            if when == "decoding":
                held.gate.set()
                await eventually(lambda: made.language.engine.stats().tokens_decoded > 3)
            if posted.done():
                posted.result().close()
            await finished(posted)
        await eventually(lambda: not made.encoders[0].sender.items and not made.language.traces.open)
        held.gate.set()
        await made.quiet()
        assert made.language.traces.recent()[-1].state == "cancelled"


async def test_services_that_close_with_requests_under_way(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    """Whoever waits gets an error; nothing is left (``no_leaks``)."""
    held = Held(vision)
    asked: list[asyncio.Task[tuple[int, ...]]] = []
    check: Callable[[], object] = lambda: held.entered["encode"] >= 1  # noqa: E731
    with pytest.raises(ZeroDivisionError):
        async with system(moe, encoder=held) as made:
            asked += [asyncio.ensure_future(made.ask(messages, 4)) for messages in pictures(3)]
            await eventually(check)
            held.gate.set()
            raise ZeroDivisionError
    for task in asked:
        with pytest.raises(Exception, match=r"closed|cancelled|gone"):
            await task
