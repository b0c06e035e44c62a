"""What a client gets for wrong input and for what goes wrong behind the edge."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import openai
import pytest
from http_fakes import HELLO, MODEL, ScriptedBackend, answer, asking, data_url, image, png, serving

from aiodisagg.engine.types import Delta, FinishReason, Usage
from aiodisagg.errors import (
    DeadlineExceeded,
    EncodeFailed,
    EngineError,
    InvalidRequest,
    LinkClosed,
    MediaError,
    NoEncodePeer,
    Overloaded,
    PromptTooLong,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

SECRET = "10.0.0.7:4711"

BACKEND_ERRORS = [
    (InvalidRequest("stop", "no"), openai.BadRequestError, 400, "invalid_value", "stop"),
    (
        MediaError("messages[0].content[1]", "no"),
        openai.BadRequestError,
        400,
        "invalid_media",
        "messages[0].content[1]",
    ),
    (PromptTooLong(900, 512), openai.BadRequestError, 400, "context_length_exceeded", "messages"),
    (Overloaded(2.2, "busy"), openai.RateLimitError, 429, "overloaded", None),
    (NoEncodePeer(SECRET), openai.InternalServerError, 503, "no_encode_peer", None),
    (DeadlineExceeded("r", 3.0, (SECRET,)), openai.InternalServerError, 504, "deadline_exceeded", None),
    (EncodeFailed("i", SECRET, (SECRET,)), openai.InternalServerError, 500, "encode_failed", None),
    (EngineError("r", SECRET), openai.InternalServerError, 500, "internal_error", None),
    (LinkClosed(SECRET, SECRET), openai.InternalServerError, 500, "internal_error", None),
    (ConnectionResetError(SECRET), openai.InternalServerError, 500, "internal_error", None),
    (TimeoutError(SECRET), openai.InternalServerError, 500, "internal_error", None),
    (KeyError(SECRET), openai.InternalServerError, 500, "internal_error", None),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_errors_before_the_first_token_have_a_status(stream: bool) -> None:
    backend = ScriptedBackend()
    async with serving(backend) as served:
        for error, kind, status, code, param in BACKEND_ERRORS:
            backend.script = [error]
            with pytest.raises(openai.APIStatusError) as caught:
                await served.client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
            failure = caught.value
            assert type(failure) is kind, error
            assert (failure.status_code, failure.code, failure.param) == (status, code, param)
            retry = failure.response.headers.get("retry-after")
            assert retry == {429: "3", 503: "1"}.get(status)
            assert SECRET not in failure.response.text and "Traceback" not in failure.response.text
            assert failure.request_id


async def test_errors_in_a_stream_are_its_last_event() -> None:
    backend = ScriptedBackend()
    async with serving(backend) as served:
        for error, _, _, code, _ in BACKEND_ERRORS:
            backend.script = [Delta("so far", (1,)), error]
            stream = await served.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
            texts = []
            with pytest.raises(openai.APIError) as caught:
                async for chunk in stream:
                    texts.append(chunk.choices[0].delta.content)
            assert texts == ["", "so far"]
            assert caught.value.code == code and SECRET not in str(caught.value.body)
        backend.script = [Delta("so far", (1,)), KeyError(SECRET)]
        body = {"model": MODEL, "messages": HELLO, "stream": True}
        async with served.session.post("/v1/chat/completions", json=body) as response:
            events = (await response.text()).split("\n\n")
        assert events[-2].startswith('data: {"error":') and "[DONE]" not in str(events)


async def test_a_request_that_ran_out_of_time_is_not_sent_again() -> None:
    """The client's time is over, and under load it would cost as much three times."""
    backend = ScriptedBackend([DeadlineExceeded("r", 3.0)])
    async with serving(backend) as served:
        client = served.client.with_options(max_retries=2)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.code == "deadline_exceeded" and len(backend.calls) == 1


async def test_the_log_has_what_the_client_may_not_see(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(ScriptedBackend([KeyError(SECRET)])) as served:
        _, body, _ = await served.post({"model": MODEL, "messages": HELLO}, x_request_id="look-here")
    assert "look-here" in body["error"]["message"]
    assert any("look-here" in r.message and SECRET in str(r.exc_info) for r in caplog.records)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_an_answer_that_is_cut_short_is_an_error(stream: bool) -> None:
    backend = ScriptedBackend()
    async with serving(backend) as served:
        for script, code in (
            ([Delta("x", (1,))], "internal_error"),
            ([Delta("x", (1,)), Delta("", (), FinishReason.CANCELLED, Usage(1, 1))], "cancelled"),
        ):
            backend.script = script
            with pytest.raises(openai.APIError) as caught:
                reply = await served.client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
                async for _ in reply:
                    pass
            assert caught.value.code == code


async def test_a_backend_that_fails_while_it_closes_ends_the_connection_and_no_more() -> None:
    async def run(call: Any) -> Any:
        try:
            for delta in answer("x", "y"):
                yield delta
        finally:
            raise EngineError("r", "cannot close")

    backend = ScriptedBackend(run)
    async with serving(backend) as served:
        stream = await served.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        assert [c.choices[0].delta.content async for c in stream][:3] == ["", "x", "y"]
        reader, writer = await served.connect(stream=True)
        async with asyncio.timeout(60):
            sent = b"".join([piece async for piece in reader])
        assert sent.count(b"HTTP/1.1 ") == 1 and sent.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        backend.script = answer("next")
        completion = await served.client.chat.completions.create(model=MODEL, messages=HELLO)
        assert completion.choices[0].message.content == "next"


async def test_a_backend_that_is_late_is_stopped(skip: Callable[[float], None]) -> None:
    backend = ScriptedBackend([asyncio.Event()])
    async with serving(backend, request_timeout_s=10.0) as served:
        refused = asyncio.create_task(served.refused())
        await backend.started.get()
        skip(10.0)
        status, error = await refused
        assert (status, error["code"]) == (504, "deadline_exceeded")
        backend.script = [Delta("so far", (1,)), asyncio.Event()]
        stream = await served.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        skip(10.0)
        with pytest.raises(openai.APIError) as caught:
            async for _ in stream:
                pass
        assert caught.value.code == "deadline_exceeded"
    assert [call.closed.is_set() for call in backend.calls] == [True, True]


PNG = data_url(png())
WRONG: list[tuple[str, dict[str, Any], str | None]] = [
    ("no messages", {"messages": []}, "messages"),
    ("messages null", {"messages": None}, "messages"),
    ("messages of text", {"messages": "hello"}, "messages"),
    ("model a number", {"model": 3}, "model"),
    ("unknown role", {"messages": [*HELLO, {"role": "robot", "content": "x"}]}, "messages[1].role"),
    ("tool role", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ("no role", {"messages": [{"content": "x"}]}, "messages[0].role"),
    ("no content", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("no parts", {"messages": asking()}, "messages[0].content"),
    ("content a number", {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ("part a string", {"messages": asking("x")}, "messages[0].content[0]"),  # type: ignore[arg-type]
    ("part unknown", {"messages": asking({"type": "input_audio"})}, "messages[0].content[0].type"),
    ("part without text", {"messages": asking({"type": "text"})}, "messages[0].content[0].text"),
    (
        "video file",
        {"messages": asking({"type": "video_url", "video_url": {"url": "x"}})},
        "messages[0].content[0].type",
    ),
    ("video empty", {"messages": asking({"type": "video", "video": []})}, "messages[0].content[0].video"),
    ("fps zero", {"messages": asking({"type": "video", "video": [PNG], "fps": 0})}, "messages[0].content[0].fps"),
    ("fps text", {"messages": asking({"type": "video", "video": [PNG], "fps": "2"})}, "messages[0].content[0].fps"),
    ("frame bad", {"messages": asking({"type": "video", "video": [PNG, 7]})}, "messages[0].content[0].video[1]"),
    ("image by system", {"messages": [{"role": "system", "content": [image(PNG)]}]}, "messages[0].content[0]"),
    ("image by assistant", {"messages": [{"role": "assistant", "content": [image(PNG)]}]}, "messages[0].content[0]"),
    (
        "url a number",
        {"messages": asking({"type": "image_url", "image_url": {"url": 7}})},
        "messages[0].content[0].image_url.url",
    ),
    (
        "url missing",
        {"messages": asking({"type": "image_url", "image_url": {}})},
        "messages[0].content[0].image_url.url",
    ),
    ("max_tokens negative", {"max_tokens": -1}, "max_tokens"),
    ("max_tokens zero", {"max_completion_tokens": 0}, "max_completion_tokens"),
    ("max_tokens huge", {"max_tokens": 10**30}, "max_tokens"),
    ("max_tokens fraction", {"max_tokens": 1.5}, "max_tokens"),
    ("temperature text", {"temperature": "hot"}, "temperature"),
    ("temperature true", {"temperature": True}, "temperature"),
    ("temperature high", {"temperature": 2.1}, "temperature"),
    ("temperature negative", {"temperature": -0.1}, "temperature"),
    ("temperature NaN", {"temperature": float("nan")}, "temperature"),
    ("temperature infinite", {"temperature": float("-inf")}, "temperature"),
    ("top_p zero", {"top_p": 0}, "top_p"),
    ("top_p high", {"top_p": 1.1}, "top_p"),
    ("top_k negative", {"top_k": -2}, "top_k"),
    ("seed fraction", {"seed": 0.5}, "seed"),
    ("seed huge", {"seed": 2**63}, "seed"),
    ("stop empty", {"stop": ["a", ""]}, "stop"),
    ("stop many", {"stop": ["a"] * 17}, "stop"),
    ("stop long", {"stop": ["a", "b" * 1025]}, "stop[1]"),
    ("stop numbers", {"stop": [1]}, "stop[0]"),
    ("n two", {"n": 2}, "n"),
    ("n zero", {"n": 0}, "n"),
    ("stream text", {"stream": "yes"}, "stream"),
    ("stream_options alone", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("logprobs", {"logprobs": True}, "logprobs"),
    ("tools", {"tools": [{"type": "function"}]}, "tools"),
    ("json", {"response_format": {"type": "json_object"}}, "response_format"),
    ("penalty", {"frequency_penalty": 0.5}, "frequency_penalty"),
    ("not base64", {"messages": asking(image("data:image/png;base64,@@@@"))}, "messages[0].content[0].image_url.url"),
    ("not an image", {"messages": asking(image(data_url(b"x", "text/html")))}, "messages[0].content[0].image_url.url"),
]


async def test_wrong_input_is_a_400_that_names_the_field() -> None:
    backend = ScriptedBackend()
    async with serving(backend) as served:
        for name, fields, param in WRONG:
            status, error = await served.refused(**fields)
            assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param), (name, error)
        assert not backend.calls
        completion = await served.client.chat.completions.create(model=MODEL, messages=HELLO)
        assert completion.choices[0].message.content == "Hello there"


NOT_REQUESTS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"model": "\xff"}',
    b'{"model": "\\ud800", "messages": []}',
    b'{"model": "m", "messages": [], "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
]


async def test_bodies_that_are_not_requests() -> None:
    async with serving(ScriptedBackend()) as served:
        for body in NOT_REQUESTS:
            status, decoded, _ = await served.post(body)
            assert (status, decoded["error"]["param"]) == (400, "body"), body[:50]


async def test_a_body_with_a_byte_order_mark() -> None:
    async with serving(ScriptedBackend()) as served:
        body = b"\xef\xbb\xbf" + json.dumps({"model": MODEL, "messages": HELLO}).encode()
        assert (await served.post(body))[0] == 200


async def test_types_and_sizes_of_bodies() -> None:
    backend = ScriptedBackend()
    good = json.dumps({"model": MODEL, "messages": HELLO}).encode()
    async with serving(backend, max_body_bytes=1000) as served:
        status, body, _ = await served.post(good + b" " * 1000)
        assert (status, body["error"]["code"]) == (413, "request_too_large")

        async def endless() -> Any:
            for _ in range(20):
                yield b" " * 100

        headers = {"Content-Type": "application/json"}
        async with served.session.post("/v1/chat/completions", data=endless(), headers=headers) as response:
            assert response.status == 413  # without a Content-Length that would tell
        assert (await served.post(good, content_type="text/plain"))[0] == 415
        assert (await served.post(good, content_encoding="gzip"))[0] == 415
        assert (await served.post(good))[0] == 200
    assert len(backend.calls) == 1


async def test_text_that_takes_long_to_tokenize_is_refused() -> None:
    backend = ScriptedBackend()
    async with serving(backend, max_text_chars=100) as served:
        message = {"role": "user", "content": [{"type": "text", "text": "x" * 50}]}
        assert (await served.post({"model": MODEL, "messages": [message, message]}))[0] == 200
        status, error = await served.refused(messages=[message, message, {"role": "user", "content": "y"}])
        assert (status, error["param"], error["code"]) == (400, "messages", "context_length_exceeded")
    assert len(backend.calls) == 1


async def test_requests_together_hold_no_more_memory_than_allowed() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend([gate, *answer("done")])
    body = {"model": MODEL, "messages": asking(image(data_url(png() + b" " * 3_000)))}
    async with serving(backend, max_held_bytes=8_000, max_body_bytes=7_500) as served:
        budget = served.server._chat._budget
        async with asyncio.TaskGroup() as group:
            first = group.create_task(served.post(body))
            await backend.started.get()
            assert 4_500 < budget.left < 5_000  # its picture, but not its body any more
            status, error, response = await served.post(body)
            assert (status, error["error"]["code"], response.headers["Retry-After"]) == (429, "overloaded", "1")
            left = budget.left
            assert (await served.post({**body, "user": "x" * 3_000}))[0] == 429
            assert budget.left == left
            gate.set()
        assert first.result()[0] == 200
        assert (await served.post(body))[0] == 200
        assert budget.left == 8_000
    assert len(backend.calls) == 2


async def test_a_body_that_never_ends_times_out() -> None:
    never = asyncio.Event()

    async def slow() -> Any:
        yield b"{"
        await never.wait()

    async with serving(ScriptedBackend(), body_timeout_s=0.05) as served:
        headers = {"Content-Type": "application/json"}
        async with served.session.post("/v1/chat/completions", data=slow(), headers=headers) as response:
            assert response.status == 408


async def test_unknown_models_urls_and_methods() -> None:
    async with serving(ScriptedBackend()) as served:
        with pytest.raises(openai.NotFoundError) as caught:
            await served.client.chat.completions.create(model="gpt-17", messages=HELLO)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert f"'gpt-17' does not exist here; served is {MODEL!r}" in caught.value.message
        with pytest.raises(openai.NotFoundError) as caught:
            await served.client.models.retrieve("gpt-17")
        assert caught.value.code == "model_not_found"
        async with served.session.get("/v1/models/%ff") as response:
            assert response.status == 404
        async with served.session.get("/v1/embeddings") as response:
            assert (response.status, (await response.json())["error"]["code"]) == (404, "unknown_url")
        with pytest.raises(openai.NotFoundError, match="base URL ends with /v1"):
            client = served.client.with_options(base_url=served.server.url)
            await client.chat.completions.create(model=MODEL, messages=HELLO)
        async with served.session.get("/v1/chat/completions") as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")
            assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_keys() -> None:
    body = {"model": MODEL, "messages": HELLO}
    async with serving(ScriptedBackend(), api_key="secret") as served:
        assert [model.id async for model in served.client.models.list()] == [MODEL]
        with pytest.raises(openai.AuthenticationError) as caught:
            await served.client.with_options(api_key="wrong").chat.completions.create(model=MODEL, messages=HELLO)
        assert caught.value.code == "invalid_api_key"
        for given in ("", "secret", "Basic secret", "Bearer ", "Bearer secrets", "Bearer s\udcffcret"):
            status, _, _ = await served.post(body, authorization=given)
            assert status == 401, given
        assert (await served.post(body, authorization="bearer secret"))[0] == 200
        async with served.session.get("/v1/nothing") as response:
            assert response.status == 401
        async with served.session.get("/health") as response:
            assert response.status == 200
        assert "secret" not in repr(served.server) + repr(served.server._config)


async def test_more_requests_than_allowed() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend([gate, *answer("done")])
    async with serving(backend, max_requests=1) as served, asyncio.TaskGroup() as group:
        first = group.create_task(served.post({"model": MODEL, "messages": HELLO}))
        await backend.started.get()
        with pytest.raises(openai.RateLimitError) as caught:
            await served.client.chat.completions.create(model=MODEL, messages=HELLO)
        assert caught.value.response.headers["retry-after"] == "1"
        gate.set()
        assert (await first)[0] == 200
        assert (await served.post({"model": MODEL, "messages": HELLO}))[0] == 200
