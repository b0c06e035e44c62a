"""The whole system behind HTTP, as the real ``openai`` client sees it; every error leaves everybody serving."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import ssl
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from aiodisagg import EncodeService, ImagePart, LanguageService
from aiodisagg.api import HttpServer
from aiodisagg.models.synthetic import build_tiny
from tests.models.halves import PROMPTS, chat, encoded, halves, noise, png, video
from tests.services.openai_chat import chat_body, content
from tests.services.system import PATIENCE_S, MiB, System, encode_config, eventually, language_config, system

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
_TLS = ssl.create_default_context()  # never used, but a client makes one unless it is given, and that takes long
GOOD = ImagePart(png(100, 70))


@dataclass
class Served:
    made: System
    client: AsyncOpenAI
    session: aiohttp.ClientSession

    async def create(self, **body: Any) -> Any:
        return await self.client.chat.completions.create(**body)

    async def good(self) -> None:
        """A request with an image is answered as always."""
        body = chat_body(self.made.language, GOOD, "What do you see?", max_tokens=6)
        answer = await self.create(**body)
        both = halves(self.made.language.config.model)
        wanted = both.true_tokens(both.ask(chat(GOOD, "What do you see?")), 6)
        ends = both.planner.eos_ids
        assert answer.choices[0].message.content == both.planner.decode([t for t in wanted if t not in ends])


@asynccontextmanager
async def serving(made: System) -> AsyncIterator[Served]:
    async with (
        HttpServer(made.language, port=0, debug=made.language.debug()) as server,
        DefaultAsyncHttpxClient(verify=_TLS) as http,
        aiohttp.ClientSession(server.url) as session,
    ):
        client = AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S, http_client=http
        )
        yield Served(made, client, session)


async def test_streamed_and_whole_answers_to_a_long_conversation_are_the_monoliths(moe: Path) -> None:
    """A system prompt, several images, a video as frames, an assistant's turn between, another image."""
    messages = PROMPTS["image and video"]
    both = halves(moe)
    asked = both.ask(messages)
    ends = both.planner.eos_ids
    tokens = both.true_tokens(asked, 12)
    wanted = both.planner.decode([t for t in tokens if t not in ends])
    roles = [(m.role, [getattr(p, "text", p) for p in m.parts]) for m in messages]
    body = {"messages": [{"role": role, "content": content(*parts)} for role, parts in roles], "temperature": 0.0}
    async with system(moe, encoders=2, transports=("ipc",), block_rows=4, blocks=3) as made, serving(made) as served:
        body |= {"model": made.language.model_name, "max_tokens": 12}
        whole = await served.create(**body)
        assert whole.choices[0].message.content == wanted
        assert whole.usage.prompt_tokens == asked.plan.tokens
        stream = await served.create(**body, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
        assert chunks[-1].usage == whole.usage
        assert {trace.state for trace in made.language.traces.recent()} == {"done"}


async def test_an_answer_whose_length_nobody_named_has_what_the_context_leaves(moe: Path) -> None:
    async with system(moe, kv_bytes=MiB // 2) as made, serving(made) as served:
        planner, limit = halves(moe).planner, made.language.engine.limit
        empty, long = (planner.plan(chat("Look " * words)).tokens for words in (1, 101))
        words = 1 + (limit - 20 - empty) * 100 // (long - empty)
        text = "Look " * words
        left = limit - planner.plan(chat(text)).tokens
        assert 1 < left < 128
        body = chat_body(made.language, text, extra_body={"ignore_eos": True})
        answer = await served.create(**body)
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", left)
        with pytest.raises(openai.BadRequestError) as caught:
            await served.create(**body, max_tokens=left + 1)
        assert caught.value.code == "context_length_exceeded"
        short = chat_body(made.language, "Hello", extra_body={"ignore_eos": True})
        assert (await served.create(**short)).usage.completion_tokens == limit - planner.plan(chat("Hello")).tokens


async def test_traces_carry_the_clients_request_id_and_the_stages_of_its_items(moe: Path) -> None:
    async with system(moe) as made, serving(made) as served:
        body = chat_body(made.language, GOOD, "What do you see?", max_tokens=3, stream=True)
        headers = {"x-request-id": "mine"}
        async with served.session.post("/v1/chat/completions", json=body, headers=headers) as sent:
            assert sent.status == 200
            await sent.read()
        async with served.session.get("/debug/requests") as found:  # complete as soon as the stream is
            (trace,) = await found.json()
        assert (trace["request_id"], trace["state"], trace["error"]) == ("mine", "done", "")
        (item,) = trace["items"]
        rows = halves(moe).planner.plan(chat(GOOD, "What do you see?")).items[0].rows
        assert item["rows"] == item["rows_arrived"] == rows
        assert item["bytes_arrived"] == rows * made.language.rows.layout.row_bytes
        assert item["peers"] == ["encode-1"] and item["moves"] == 0 and item["stage"] == "complete"
        times = [trace["planned_s"], item["asked_s"], item["encoded_s"], item["complete_s"], trace["first_token_s"]]
        assert times[0] >= 0 and times == sorted(times) and times[-1] <= trace["total_s"]


# -- errors -----------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 40,000 x 40,000 pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"\0" * 64)) + part(b"IEND", b"")


def truncated() -> bytes:
    """The header is fine, so it can be planned; the pixels are not all there, which only decoding finds."""
    whole = encoded(noise(200, 150), "JPEG", quality=90)
    return whole[: len(whole) // 2]


@pytest.fixture
async def served(moe: Path) -> AsyncIterator[Served]:
    async with system(moe, encoders=2, transports=("ipc",)) as made, serving(made) as found:
        yield found


WRONG: dict[str, tuple[list[Any], dict[str, Any], int, str]] = {
    "not an image": ([ImagePart(b"not an image at all"), "?"], {}, 400, "image"),
    "an empty image": ([ImagePart(b""), "?"], {}, 400, "image"),
    "a truncated header": ([ImagePart(png(64, 64)[:20]), "?"], {}, 400, "image"),
    "a truncated image": ([ImagePart(truncated()), "?"], {}, 400, "truncated"),
    "a bomb": ([ImagePart(bomb()), "?"], {}, 400, "pixels"),
    "too many tokens": (["word " * 40_000], {}, 400, "tokens"),
    "max_tokens beyond the context": (["Hello"], {"max_tokens": 10_000_000}, 400, "tokens"),
    "another model": (["Hello"], {"model": "gpt-4o"}, 404, "gpt-4o"),
    "a temperature out of range": (["Hello"], {"temperature": 3.0}, 400, "temperature"),
    "frames of two sizes": (
        [{"type": "video", "video": [p["image_url"]["url"] for p in content(GOOD, ImagePart(png(64, 64)))]}, "?"],
        {}, 400, "size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_what_a_client_does_wrong_is_said_and_the_peers_go_on(served: Served, stream: bool) -> None:
    """Every mistake at once, several times, between good requests; then everybody still serves."""

    async def one(name: str) -> None:
        parts, settings, status, word = WRONG[name]
        body = chat_body(served.made.language, *parts, **{"max_tokens": 4, **settings}, stream=stream)
        with pytest.raises(openai.APIStatusError) as caught:
            await served.create(**body)
        assert caught.value.status_code == status, name
        error = caught.value.response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and word in error["message"], (name, error)

    for name in WRONG:
        await one(name)
    await asyncio.gather(*(one(name) for name in WRONG for _ in range(3)), *(served.good() for _ in range(4)))
    await served.good()
    assert len(served.made.language.peers.linked) == 2


async def test_one_bad_image_among_good_ones_of_other_requests(served: Served) -> None:
    """They share a batch of the tower; the bad one fails alone."""
    bad = chat_body(served.made.language, GOOD, ImagePart(truncated()), "?", max_tokens=4)

    async def fails() -> None:
        with pytest.raises(openai.BadRequestError, match=r"messages\[0\]\.content\[1\]"):
            await served.create(**bad)

    await asyncio.gather(*(served.good() if i % 2 else fails() for i in range(12)))


async def test_unknown_roles_and_numbers_that_are_none(served: Served) -> None:
    bodies: list[tuple[dict[str, Any], str]] = [
        ({"messages": [{"role": "wizard", "content": "Hello"}]}, "wizard"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "Hello"}], "temperature": float("nan")}, "temperature"),
        ({"messages": [{"role": "user", "content": "Hello"}], "top_p": float("inf")}, "top_p"),
    ]
    headers = {"content-type": "application/json"}
    for body, word in bodies:  # not through the client, whose JSON has no NaN
        text = json.dumps({"model": served.made.language.model_name, "max_tokens": 2, **body})
        async with served.session.post("/v1/chat/completions", data=text, headers=headers) as response:
            assert response.status == 400
            assert word in (await response.json())["error"]["message"]
    await served.good()


async def test_an_encode_peer_of_other_weights_is_never_used(
    moe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = build_tiny(tmp_path, moe=True, levels=3, seed=1)
    caplog.set_level(logging.ERROR)
    config = language_config(moe, peer_wait_s=0.3)
    async with (
        LanguageService(config) as language,
        EncodeService(encode_config(other, name="stranger")) as stranger,
        serving(System(language, [stranger])) as served,
    ):
        language.add_peer(stranger.address)
        body = chat_body(language, GOOD, "What do you see?", max_tokens=6)
        with pytest.raises(openai.InternalServerError) as caught:
            await served.create(**body)
        assert caught.value.status_code == 503 and caught.value.code == "no_encode_peer"
        assert (await served.create(**chat_body(language, "Only text.", max_tokens=2))).choices
        await eventually(lambda: "is not usable" in caplog.text)  # a busy machine may not have linked it in that time
        assert sum("is not usable" in line and "stranger" in line for line in caplog.messages) == 1
        assert "is not usable" in caplog.text and not language.ready()[0]
        async with EncodeService(encode_config(moe)) as friend:
            served.made.encoders.append(friend)
            language.add_peer(friend.address)
            await served.made.linked(1)
            await served.good()
            assert stranger.pipeline.items_encoded == 0
            await served.made.quiet()


async def test_an_encode_peer_without_a_transport_in_common_is_never_used(
    moe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was "ready" everywhere, and every picture got a 503 that did not say why."""
    caplog.set_level(logging.WARNING, "aiodisagg.language.peers")
    config = language_config(moe, name="words", peer_wait_s=0.3)
    async with (
        LanguageService(config) as language,
        EncodeService(encode_config(moe, name="tower", transports=("zmq",))) as tower,
        serving(System(language, [tower])) as served,
    ):
        language.add_peer(tower.address)
        body = chat_body(language, GOOD, "What do you see?", max_tokens=6)
        with pytest.raises(openai.InternalServerError) as caught:
            await served.create(**body)
        why = f"tower ({tower.config.incarnation}) sends by zmq, words receives by memory"
        why += ": none in common (--transports)"
        assert caught.value.status_code == 503 and caught.value.code == "no_encode_peer" and why in str(caught.value)
        assert language.ready() == (False, f"no encode peer is linked: {why}")
        async with served.session.get("/debug/peers") as response:
            wanted = {"name": "tower", "address": tower.address, "standing": "unusable", "why": why}
            assert await response.json() == [wanted]
        said = [record.getMessage() for record in caplog.records if record.name == "aiodisagg.language.peers"]
        assert said == [f"encode peer at {tower.address} is not usable: {why}"]
        async with EncodeService(encode_config(moe)) as friend:
            served.made.encoders.append(friend)
            language.add_peer(friend.address)
            await served.made.linked(1)
            assert language.ready() == (True, "ok")
            await served.good()
            await served.made.quiet()


async def test_videos_of_one_and_of_many_frames(served: Served, moe: Path) -> None:
    both = halves(moe)
    for frames in (1, 2, 5):
        body = chat_body(served.made.language, video(frames), "What happens?", max_tokens=5)
        answer = await served.create(**body)
        tokens = both.true_tokens(both.ask(chat(video(frames), "What happens?")), 5)
        wanted = both.planner.decode([t for t in tokens if t not in both.planner.eos_ids])
        assert answer.choices[0].message.content == wanted


def test_the_truncated_image_can_be_planned(moe: Path) -> None:
    """Or the test above would not reach the encode peer."""
    assert halves(moe).planner.plan(chat(ImagePart(truncated()), "?")).items[0].rows > 0
    assert io.BytesIO(truncated()).read()
