"""Answers, streamed and whole, as the real ``openai`` client sees them."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from http_fakes import HELLO, MODEL, ScriptedBackend, answer, asking, data_url, image, png, serving
from openai import OpenAI

from aiodisagg.engine.types import Delta, FinishReason, SamplingParams
from aiodisagg.models.base import ChatMessage, ImagePart, TextPart, VideoPart

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


async def test_a_whole_answer() -> None:
    backend = ScriptedBackend(answer("Hello", " there", "!"))
    async with serving(backend) as served:
        completion = await served.client.chat.completions.create(model=MODEL, messages=HELLO)
    assert completion.object == "chat.completion" and completion.model == MODEL
    (choice,) = completion.choices
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello there!")
    assert completion.usage is not None
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 3, 10)
    (call,) = backend.calls
    assert call.messages == [ChatMessage("user", (TextPart("hello"),))]
    assert call.sampling == SamplingParams(max_tokens=4096, as_fits=True)
    assert completion.id.startswith("chatcmpl-")


async def test_a_model_of_several_names() -> None:
    backend = ScriptedBackend()
    backend.model_names = ("qwen", "org/qwen-vl")
    async with serving(backend) as served:
        create = served.client.chat.completions.create
        assert [model.id async for model in served.client.models.list()] == ["qwen", "org/qwen-vl"]
        for name in backend.model_names:
            assert (await served.client.models.retrieve(name)).id == name
            assert (await create(model=name, messages=HELLO)).model == "qwen"
            chunks = [chunk async for chunk in await create(model=name, messages=HELLO, stream=True)]
            assert {chunk.model for chunk in chunks} == {"qwen"}
        with pytest.raises(openai.NotFoundError, match="served is 'qwen' or 'org/qwen-vl'"):
            await create(model=MODEL, messages=HELLO)


async def test_a_streamed_answer_in_openai_s_order_of_chunks() -> None:
    backend = ScriptedBackend(answer("Hel", "", "lo", finish=FinishReason.LENGTH))
    async with serving(backend) as served:
        stream = await served.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        chunks = [chunk async for chunk in stream]
    assert {(c.object, c.model) for c in chunks} == {("chat.completion.chunk", MODEL)}
    (completion_id,) = {c.id for c in chunks}
    assert completion_id.startswith("chatcmpl-")
    deltas = [(c.choices[0].delta.role, c.choices[0].delta.content, c.choices[0].finish_reason) for c in chunks]
    assert deltas == [("assistant", "", None), (None, "Hel", None), (None, "lo", None), (None, None, "length")]
    assert all(c.usage is None for c in chunks)


async def test_usage_comes_last_and_only_if_asked_for() -> None:
    async with serving(ScriptedBackend()) as served:
        stream = await served.client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = [chunk async for chunk in stream]
        assert last.choices == [] and last.usage is not None and last.usage.total_tokens == 9
        assert all(len(c.choices) == 1 and c.usage is None for c in chunks)


async def test_the_bytes_of_a_stream() -> None:
    async with serving(ScriptedBackend()) as served:
        body = {"model": MODEL, "messages": HELLO, "stream": True}
        async with served.session.post("/v1/chat/completions", json=body) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            text = await response.text()
    *events, empty = text.split("\n\n")
    assert empty == "" and events[-1] == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events[:-1])
    assert '"usage"' not in text


async def test_deltas_leave_as_they_come() -> None:
    gate = asyncio.Event()
    async with serving(ScriptedBackend([Delta("first", (1,)), gate, *answer("last")])) as served:
        stream = await served.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        seen = []
        async for chunk in stream:
            seen.append(chunk.choices[0].delta.content)
            if seen[-1] == "first":
                gate.set()  # a server that gathers chunks would never get here
    assert seen == ["", "first", "last", None]


async def test_several_images_and_roles_arrive_in_order() -> None:
    first, second = png(color=1), png(color=2)
    backend = ScriptedBackend()
    async with serving(backend) as served:
        await served.client.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "system", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]},
                {
                    "role": "user",
                    "content": [
                        image(data_url(first)),
                        {"type": "text", "text": "and"},
                        {"type": "image_url", "image_url": {"url": data_url(second), "detail": "high"}},
                        {"type": "text", "text": "?"},
                    ],
                },
                {"role": "assistant", "content": "two"},
                {"role": "user", "content": [image(data_url(second, "image/PNG"))]},
            ],
        )
    assert backend.calls[0].messages == [
        ChatMessage("system", (TextPart("be brief"),)),
        ChatMessage("system", (TextPart("be"), TextPart("kind"))),
        ChatMessage("user", (ImagePart(first), TextPart("and"), ImagePart(second), TextPart("?"))),
        ChatMessage("assistant", (TextPart("two"),)),
        ChatMessage("user", (ImagePart(second),)),
    ]


async def test_a_video_is_a_list_of_frames() -> None:
    frames = tuple(png(color=c) for c in range(5))
    video = {"type": "video", "video": [data_url(f) for f in frames], "fps": 4}
    plain = {"type": "video", "video": [data_url(frames[0])]}
    backend = ScriptedBackend()
    async with serving(backend) as served:
        await served.client.chat.completions.create(model=MODEL, messages=asking(video, plain))
    assert backend.calls[0].messages[0].parts == (VideoPart(frames, 4.0), VideoPart(frames[:1], 2.0))


async def test_sampling_parameters_pass_through() -> None:
    backend = ScriptedBackend()
    async with serving(backend, default_max_tokens=9) as served:
        create = served.client.chat.completions.create
        began = time.monotonic()
        await create(
            model=MODEL,
            messages=HELLO,
            max_tokens=5,
            temperature=0.5,
            top_p=0.25,
            seed=-3,
            stop=["a", "bc"],
            user="someone",
            extra_body={"top_k": 40, "no_such_field": {"deep": [1]}},
        )
        await create(model=MODEL, messages=HELLO, max_tokens=5, max_completion_tokens=6, stop="x", temperature=0)
        await create(model=MODEL, messages=HELLO, extra_body={"ignore_eos": True})
        await create(model=MODEL, messages=HELLO, stop=None, n=1, extra_body={"top_k": -1, "tools": None})
    assert [call.sampling for call in backend.calls] == [
        SamplingParams(max_tokens=5, temperature=0.5, top_p=0.25, top_k=40, seed=-3, stop=("a", "bc")),
        SamplingParams(max_tokens=6, stop=("x",)),
        SamplingParams(max_tokens=9, ignore_eos=True, as_fits=True),
        SamplingParams(max_tokens=9, as_fits=True),
    ]
    took = time.monotonic() - began
    assert all(call.timeout_s is not None and 599.9 - took <= call.timeout_s < 600.1 for call in backend.calls)


async def test_the_sync_client_in_a_thread() -> None:
    def ask(url: str) -> tuple[str | None, str, list[str]]:
        with OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=HELLO)
            stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return whole.choices[0].message.content, text, [model.id for model in client.models.list()]

    with ThreadPoolExecutor(1) as pool:  # not anyio's threads, which may outlive the loop by a moment
        async with serving(ScriptedBackend()) as served:
            asked = asyncio.get_running_loop().run_in_executor(pool, ask, served.server.url)
            assert await asked == ("Hello there", "Hello there", [MODEL])


async def test_models() -> None:
    async with serving(ScriptedBackend()) as served:
        models = [model async for model in served.client.models.list()]
        assert [(m.id, m.created, m.object) for m in models] == [(MODEL, 1_700_000_000, "model")]
        assert (await served.client.models.retrieve(MODEL)).id == MODEL


async def test_request_ids_go_in_and_out_and_reach_the_backend(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "aiodisagg.api")
    backend = ScriptedBackend()
    body = {"model": MODEL, "messages": HELLO}
    async with serving(backend) as served:
        for _ in range(2):
            _, _, response = await served.post(body, x_request_id="mine-1")
            assert response.headers["x-request-id"] == "mine-1"
        _, _, response = await served.post({**body, "stream": False}, x_request_id="two words")
        assert response.headers["x-request-id"].startswith("req-")
        async with served.session.post("/v1/chat/completions", json={**body, "stream": True}) as response:
            assert response.headers["x-request-id"].startswith("req-")
    assert [call.request_id for call in backend.calls[:2]] == ["mine-1", "mine-1"]
    assert len({call.request_id for call in backend.calls[1:]}) == 3
    assert sum("mine-1 POST '/v1/chat/completions': 200" in line for line in caplog.messages) == 2
    assert "mine-1 is chatcmpl-" in caplog.text


async def test_a_request_id_that_is_in_use_gets_a_number() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend([gate, *answer("Hello")])
    body = {"model": MODEL, "messages": HELLO}
    async with serving(backend) as served:
        posts = [asyncio.ensure_future(served.post(body, x_request_id="mine")) for _ in range(3)]
        for _ in posts:
            await backend.started.get()
        gate.set()
        for _, _, response in await asyncio.gather(*posts):
            assert response.headers["x-request-id"] == "mine"
    assert sorted(call.request_id for call in backend.calls) == ["mine", "mine-2", "mine-3"]
