"""What goes over the wire, and what a client makes of what comes back."""

from __future__ import annotations

import asyncio
import io
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from aiohttp import web
from fake_openai import DONE, FakeClock, FakeServer, Step, answer_of, event, serving
from PIL import Image

from aiodisagg.api.data_url import decode_data_url
from aiodisagg.api.parse import media_urls, parse_request, sampling_of
from aiodisagg.bench.chat_body import Body, BodyStyle, make_bodies, make_text
from aiodisagg.bench.chat_client import Balancer, ChatClient, ServerError, open_session
from aiodisagg.bench.pictures import make_picture
from aiodisagg.bench.workload import ImageSpec, WorkloadRequest
from aiodisagg.errors import ConfigError

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

HELLO = Body((b'{"model":"fake-vl",', b'"messages":[]}'))
TWO = WorkloadRequest(0.0, (ImageSpec(0, 64, 32), ImageSpec(1, 40, 50), ImageSpec(0, 64, 32)), 20, 9)


def ended(reason: str) -> bytes:
    return msgspec.json.encode({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})


async def ask(script: list[Step] | int, *, timeout_s: float = 60.0, key: str | None = None) -> tuple[Any, FakeServer]:
    clock = FakeClock()
    async with serving(FakeServer(lambda body: script, clock)) as server, open_session(key) as session:
        answer = await ChatClient(session, clock, timeout_s=timeout_s).ask(server.url, HELLO)
    return answer, server


# -- answers ------------------------------------------------------------------------------------------------------


async def test_pieces_of_text_are_timed_and_empty_ones_are_not() -> None:
    answer, _ = await ask(answer_of([0.5, 0.25, 2.0], prompt=11, tokens=4))
    assert answer.text_s == [100.5, 100.75, 102.75]
    assert (answer.prompt_tokens, answer.output_tokens, answer.error) == (11, 4, "")


async def test_what_a_model_thinks_is_text_too() -> None:
    thought = msgspec.json.encode({"choices": [{"delta": {"reasoning_content": "hm"}}]})
    answer, _ = await ask([(1.0, thought), (1.0, event("so")), (0.0, DONE)])
    assert answer.text_s == [101.0, 102.0]
    assert answer.output_tokens == 2, "pieces, where the server counts no tokens"


@pytest.mark.parametrize(
    ("script", "error", "said"),
    [
        (429, "HTTP 429", FakeServer.said),
        (503, "HTTP 503", FakeServer.said),
        ([(0.0, event("a"))], "cut off", ""),
        ([(0.0, event("a")), (0.0, b'{"error": {"message": "lost", "code": 500}}')], "error in the stream", "lost"),
        ([(0.0, b'{"error": "lost"}'), (0.0, DONE)], "error in the stream", "lost"),
        ([(0.0, b'{"error": ["lost"]}'), (0.0, DONE)], "error in the stream", '{"error": ["lost"]}'),
        ([(0.0, b"{"), (0.0, DONE)], "not understood", "{"),
        ([(0.0, b'{"object": "error", "message": "lost", "code": 400}'), (0.0, DONE)], "error in the stream", "lost"),
        ([(0.0, event("a")), (0.0, ended("abort")), (0.0, DONE)], "finish reason abort", ""),
        ([(0.0, event("a")), (0.0, ended("stop"))], "", ""),
    ],
)
async def test_errors_have_kinds(script: list[Step] | int, error: str, said: str) -> None:
    server = FakeServer(lambda body: script)  # without a clock: not every event makes the client look at it
    async with serving(server), open_session(None) as session:
        answer = await ChatClient(session, FakeClock()).ask(server.url, HELLO)
    assert (answer.error, answer.said) == (error, said)


@pytest.mark.parametrize(
    ("sent", "error", "said"),
    [
        (web.json_response({"error": {"message": "lost"}}), "no stream but application/json", "lost"),
        (web.Response(text="<html>\nHello", content_type="text/html"), "no stream but text/html", "<html> Hello"),
        (web.Response(text="", content_type="text/event-stream"), "cut off", ""),
    ],
)
async def test_what_is_no_stream_is_named(sent: web.Response, error: str, said: str) -> None:
    class Other(FakeServer):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            await request.read()
            return sent

    async with serving(Other(lambda body: 200)) as server, open_session(None) as session:
        answer = await ChatClient(session, FakeClock()).ask(server.url, HELLO)
    assert (answer.error, answer.said) == (error, said)


async def test_pages_of_metrics_are_read_where_servers_would_compress_them() -> None:
    """As ``prometheus_client`` does, and with it vLLM: their counters were left out, and nobody was told."""

    class Compresses(FakeServer):
        async def metrics(self, request: web.Request) -> web.Response:
            response = web.Response(text="asked_total 3\n")
            response.enable_compression()  # if the client takes it
            return response

    async with serving(Compresses(lambda body: 200)) as server, open_session(None) as session:
        assert await ChatClient(session, FakeClock()).metrics(f"{server.url}/metrics") == "asked_total 3\n"


async def test_nobody_listens() -> None:
    async with serving(FakeServer(lambda body: 200)) as server:
        pass
    async with open_session(None) as session:
        client = ChatClient(session, FakeClock())
        assert (await client.ask(server.url, HELLO)).error.startswith("connection: Client")
        with pytest.raises(ServerError, match="Cannot connect"):
            await client.models(server.url)


async def test_a_server_that_never_answers_times_out() -> None:
    never = asyncio.Event()

    async def hang(body: dict[str, Any]) -> None:
        await never.wait()

    async with serving(FakeServer(lambda body: 200, before=hang)) as server, open_session(None) as session:
        answer = await ChatClient(session, FakeClock(), timeout_s=0.05).ask(server.url, HELLO)
        never.set()
    assert answer.error == "timeout"


async def test_the_key_and_the_models() -> None:
    _, server = await ask(answer_of([0.1]), key="secret")
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.headers[0]["Content-Length"] == str(HELLO.size_bytes), "not every server takes a body in chunks"
    assert "Transfer-Encoding" not in server.headers[0]
    async with serving(FakeServer(lambda body: 200)) as server, open_session(None) as session:
        assert await ChatClient(session, FakeClock()).models(server.url) == ["fake-vl"]


# -- bodies -------------------------------------------------------------------------------------------------------


async def test_a_body_is_what_our_own_api_reads() -> None:
    style = BodyStyle(model="m", tokens_per_word=2.0, extra={"ignore_eos": True, "temperature": 0.5})
    (body,) = await make_bodies([TWO], style, "salt")
    raw = b"".join(body.pieces)
    assert body.size_bytes == len(raw)
    request = parse_request(raw)
    sampling = sampling_of(request, 1)
    assert (request.model, request.stream, sampling.max_tokens, sampling.temperature) == ("m", True, 9, 0.5)
    assert request.stream_options is not None and request.stream_options.include_usage
    plain = msgspec.json.decode(raw)
    assert plain["ignore_eos"] is True
    assert len(plain["messages"][0]["content"][-1]["text"].split()) == 10, "20 tokens of half a word"
    files = [decode_data_url(url.raw, 1 << 20, url.param) for url in media_urls(request, 10)]
    assert [Image.open(io.BytesIO(data)).size for data in files] == [(64, 32), (40, 50), (64, 32)]
    assert files[0] == files[2] != files[1], "equal identities are one picture"


async def test_who_asks_and_how_urgently() -> None:
    style, plain = BodyStyle(model="m"), WorkloadRequest(0.0, (), 1, 1)
    bodies = await make_bodies([plain, replace(plain, tenant="big", priority=-2)], style, "salt")
    async with serving(FakeServer(lambda body: answer_of([0.0]))) as server, open_session(None) as session:
        for body in bodies:
            await ChatClient(session, FakeClock()).ask(server.url, body)
    assert [headers.get("X-Tenant") for headers in server.headers] == [None, "big"]
    assert [body.get("priority") for body in server.bodies] == [None, -2]


async def test_pictures_and_texts_are_the_same_for_equal_salts_only() -> None:
    style = BodyStyle(model="m")
    first, again, other = [await make_bodies([TWO], style, salt) for salt in ("a", "a", "b")]
    assert first == again
    assert not set(first[0].pieces[2::3]) & set(other[0].pieces[2::3])
    assert first[0].pieces[-1] != other[0].pieces[-1]


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_a_picture_is_a_file_of_a_realistic_size(form: Any) -> None:
    data = make_picture(ImageSpec(3, 640, 480), "s", form)
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size, image.mode) == (form.upper(), (640, 480), "RGB")
    assert 0.03 < len(data) / (640 * 480) < 2.0
    small = Image.open(io.BytesIO(make_picture(ImageSpec(3, 1, 1), "s", form)))
    assert small.size == (1, 1)


def test_texts() -> None:
    style = BodyStyle(model="m")
    assert make_text(250, style, "x").startswith(make_text(50, style, "x"))
    assert len(make_text(50, style, "x").split()) == 50
    assert make_text(0, style, "x"), "a prompt is never empty"


# -- replicas -----------------------------------------------------------------------------------------------------


def test_round_robin_does_not_look_at_what_is_open() -> None:
    balancer = Balancer(("a", "b", "c"), "round-robin")
    assert [balancer.take() for _ in range(4)] == ["a", "b", "c", "a"]
    balancer.give_back("c")
    assert balancer.take() == "b"


def test_least_outstanding_takes_ties_in_turn() -> None:
    balancer = Balancer(("a", "b", "c"))
    assert [balancer.take() for _ in range(3)] == ["a", "b", "c"]
    balancer.give_back("b")
    assert balancer.take() == "b"
    for url in ("a", "b", "c"):
        balancer.give_back(url)
    assert {balancer.take() for _ in range(3)} == {"a", "b", "c"}
    with pytest.raises(ConfigError, match="url"):
        Balancer(())


async def test_each_replica_gets_its_share() -> None:
    async with AsyncExitStack() as stack:
        fakes = [FakeServer(lambda body: answer_of([0.0])) for _ in range(2)]
        servers = [await stack.enter_async_context(serving(fake)) for fake in fakes]
        session = await stack.enter_async_context(open_session(None))
        client, balancer = ChatClient(session, FakeClock()), Balancer([server.url for server in servers])
        for _ in range(6):
            url = balancer.take()
            await client.ask(url, HELLO)
            balancer.give_back(url)
    assert [len(server.bodies) for server in servers] == [3, 3]
