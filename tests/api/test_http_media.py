"""Images by data URL and by http, and what a server must not be made to fetch."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from http_fakes import MODEL, ScriptedBackend, Served, Silent, asking, data_url, image, media_host, png, says, serving

from aiodisagg.api import fetch
from aiodisagg.api.data_url import decode_data_url
from aiodisagg.models.base import ImagePart, VideoPart

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

LOOPBACK = ("127.0.0.1",)
PATHS = ("/", "/x", "/~me/\u00e9(1)/..;v=[2]/x", "/caf\u00e9")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


def leads_to(location: str, status: int = 302) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": location})

    return handle


async def refusal(served: Served, *urls: str) -> str:
    """The message of the 400 that a request for images gets."""
    with pytest.raises(openai.BadRequestError) as caught:
        await served.client.chat.completions.create(model=MODEL, messages=asking(*map(image, urls)))
    assert caught.value.code == "invalid_media"
    assert caught.value.param is not None and caught.value.param.startswith("messages[0].content[")
    return caught.value.message


class OneAddress(AbstractResolver):
    """Answers every name with the same addresses, or knows none."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_UNSPEC) -> list[ResolveResult]:
        if not self.addresses:
            raise OSError("no such host")
        return [
            ResolveResult(hostname=host, host=a, port=port, family=socket.AF_INET, proto=0, flags=0)
            for a in self.addresses
        ]

    async def close(self) -> None:
        pass


async def test_media_are_bounded_in_size_and_number() -> None:
    backend = ScriptedBackend()
    big, small = data_url(b"x" * 1001), data_url(b"x" * 700)
    async with serving(backend, max_media_bytes=1000, max_media_total_bytes=2000, max_media_files=3) as served:
        assert "more than 1000 bytes" in await refusal(served, small, big)
        assert "more than 2000 bytes together" in await refusal(served, small, small, small)
        status, error = await served.refused(messages=asking({"type": "video", "video": [small] * 4}))
        assert status == 400 and "more than 3 images and frames" in error["message"]
        assert not backend.calls
        await served.client.chat.completions.create(model=MODEL, messages=asking(image(small), image(small)))


async def test_media_of_urls_are_bounded_together() -> None:
    async with (
        media_host({"/x": says(b"x" * 700)}) as (url, _),
        serving(ScriptedBackend(), allow_private_media_hosts=LOOPBACK, max_media_total_bytes=2000) as served,
    ):
        assert "more than 2000 bytes together" in await refusal(served, *[f"{url}/x"] * 3)


async def test_megabytes_arrive_whole() -> None:
    data = bytes(range(256)) * 4096 * 6
    backend = ScriptedBackend()
    async with serving(backend) as served:
        parts = [image(data_url(data)), image(data_url(data[::-1]))]
        await served.client.chat.completions.create(model=MODEL, messages=asking(*parts))
    assert backend.calls[0].messages[0].parts == (ImagePart(data), ImagePart(data[::-1]))


async def test_many_small_data_urls_leave_the_loop_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    on_loop: dict[bool, list[int]] = {True: [], False: []}

    def decode(raw: memoryview, max_bytes: int, param: str) -> bytes:
        on_loop[threading.current_thread() is threading.main_thread()].append(len(raw))
        return decode_data_url(raw, max_bytes, param)

    monkeypatch.setattr(fetch, "decode_data_url", decode)
    frames = [bytes([i]) * 40_000 for i in range(64)]
    backend = ScriptedBackend()
    async with serving(backend) as served:
        for _ in range(2):  # each request has its own allowance
            parts = {"type": "video", "video": [data_url(frame) for frame in frames]}
            await served.client.chat.completions.create(model=MODEL, messages=asking(parts))
    assert backend.calls[1].messages[0].parts == (VideoPart(tuple(frames), 2.0),)
    assert sum(on_loop[True]) <= 2 << 18
    assert (len(on_loop[True]), len(on_loop[False])) == (2 * 4, 2 * 60)


# -- http ---------------------------------------------------------------------------------------------------------


async def test_images_are_fetched_in_order_and_through_redirects() -> None:
    first, second = png(color=1), png(color=2)
    routes = {
        "/a.png": says(first),
        "/b": says(second, "application/octet-stream"),
        "/moved": leads_to("/moved again", 308),
        "/moved again": leads_to("b?x=1"),
    }
    backend = ScriptedBackend()
    async with (
        media_host(routes) as (url, asked),
        serving(backend, allow_private_media_hosts=LOOPBACK) as served,
    ):
        parts = [image(f"{url}/moved"), image(data_url(first)), image(f"{url}/a.png")]
        await served.client.chat.completions.create(model=MODEL, messages=asking(*parts))
    assert backend.calls[0].messages[0].parts == (ImagePart(second), ImagePart(first), ImagePart(first))
    assert sorted(asked) == ["/a.png", "/b", "/moved", "/moved again"]


@pytest.mark.parametrize(
    ("written", "fetched"),
    [
        ("/x?X-Amz-Credential=AKIA%2F2020&p=x%3Ay&u=%7E&sig=a%2Bb+c%3d", None),
        ("/x?", "/x"),
        ("/%7Eme/%c3%a9(1)/..;v=[2]/x", None),
        ("?u=%7E", "/?u=%7E"),
        ("/x?a b=%7E", "/x?a+b=~"),
        ("/caf\u00e9?100%", "/caf%C3%A9?100%25"),
    ],
    ids=["signed", "no query", "path", "no path", "a space", "no URI"],
)
@pytest.mark.parametrize("by", ["client", "redirect"])
async def test_a_url_is_fetched_as_it_is_written(by: str, written: str, fetched: str | None) -> None:
    """Signatures are of the query as it is written; only what could not be sent so is quoted."""
    lines = list[str]()

    async def handle(request: web.Request) -> web.Response:
        lines.append(request.raw_path)
        return web.Response(body=png(), content_type="image/png")

    async with (
        media_host(dict.fromkeys(PATHS, handle)) as (host, _),
        media_host({"/moved": leads_to(host + written)}) as (other, _),
        serving(ScriptedBackend(), allow_private_media_hosts=LOOPBACK) as served,
    ):
        url = host + written if by == "client" else f"{other}/moved"
        await served.client.chat.completions.create(model=MODEL, messages=asking(image(url)))
    assert lines == [fetched or written]


async def test_what_a_host_may_answer() -> None:
    async def chunked(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        await response.prepare(request)
        try:
            for _ in range(1000):
                await response.write(b"x" * 1000)
        except ConnectionError:
            pass
        return response

    async def gone(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def missing(request: web.Request) -> web.StreamResponse:
        return web.Response(status=404, text="SECRET")

    routes = {
        "/large": says(b"x" * 10_001),
        "/chunked": chunked,
        "/page": says(b"SECRET", "text/html"),
        "/zipped": says(b"SECRET", "image/png", **{"Content-Encoding": "gzip"}),
        "/empty": says(b""),
        "/missing": missing,
        "/gone": gone,
        "/loop": leads_to("/loop"),
        "/nowhere": leads_to(""),
        "/file": leads_to("file:///etc/passwd"),
    }
    expected = {
        "/large": "more than 10000 bytes",
        "/chunked": "more than 10000 bytes",
        "/page": "text/html is not an image type",
        "/zipped": "compressed",
        "/empty": "nothing",
        "/missing": "answered 404",
        "/gone": "could not be fetched",
        "/loop": "more than 2 redirects",
        "/nowhere": "more than 2 redirects",
        "/file": "must be a data:, http:, https: or sha256: URL",
    }
    settings = {"max_media_bytes": 10_000, "max_media_redirects": 2, "allow_private_media_hosts": LOOPBACK}
    async with media_host(routes) as (url, _), serving(ScriptedBackend(), **settings) as served:
        for path, message in expected.items():
            told = await refusal(served, url + path)
            assert message in told and "SECRET" not in told


async def test_as_many_redirects_are_followed_as_may_be() -> None:
    routes = {"/2": leads_to("/1"), "/1": leads_to("/0"), "/0": says(png()), "/3": leads_to("/2")}
    backend = ScriptedBackend()
    settings = {"max_media_redirects": 2, "allow_private_media_hosts": LOOPBACK}
    async with media_host(routes) as (url, _), serving(backend, **settings) as served:
        await served.client.chat.completions.create(model=MODEL, messages=asking(image(f"{url}/2")))
        assert backend.calls[0].messages[0].parts == (ImagePart(png()),)
        assert "more than 2 redirects" in await refusal(served, f"{url}/3")


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})])  # for ``skip``
async def test_a_slow_host_times_out_and_is_let_go(skip: Callable[[float], None]) -> None:
    arrived, hung_up = asyncio.Event(), asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        await response.prepare(request)
        await response.write(b"x")
        arrived.set()
        try:
            await asyncio.Event().wait()
        finally:
            hung_up.set()
        return response

    async with (
        media_host({"/slow": slow}) as (url, _),
        serving(ScriptedBackend(), media_timeout_s=20.0, allow_private_media_hosts=LOOPBACK) as served,
    ):
        refused = asyncio.create_task(refusal(served, f"{url}/slow"))
        await arrived.wait()
        skip(20.0)
        assert "within 20 s" in await refused
        await hung_up.wait()


async def test_the_first_failure_stops_the_other_fetches() -> None:
    slow = Silent()

    async def missing(request: web.Request) -> web.StreamResponse:
        await slow.asked.wait()
        return web.Response(status=410)

    async with (
        media_host({"/slow": slow, "/missing": missing}) as (url, _),
        serving(ScriptedBackend(), allow_private_media_hosts=LOOPBACK) as served,
    ):
        assert "answered 410" in await refusal(served, f"{url}/slow", f"{url}/missing")
        await slow.left.wait()


async def test_urls_that_are_not_utf8() -> None:
    async with serving(ScriptedBackend()) as served:
        for url in (b"http://example.com/\xff", b"data:image\\/png;base64,QUJ\xff"):
            part = json.dumps({"model": MODEL, "messages": asking(image("URL"))}).encode().replace(b"URL", url)
            status, body, _ = await served.post(part)
            assert (status, body["error"]["code"]) == (400, "invalid_media")
            assert body["error"]["message"] == "messages[0].content[0].image_url.url: not UTF-8"


NOT_TRIED = [
    "http://user%40x@example.com/x",
    "HTTP://@[::1",
    "https:///%2e%2e/x",
    "",
    "x.png",
    "/etc/passwd",
    "file:///etc/passwd",
    "ftp://example.com/x",
    "gopher://127.0.0.1/",
    "http://",
    "http:///x",
    "http://user:pass@example.com/x",
    "http://[::1",
    "http://example.com:99999/",
    "https://exa mple.com/",
    "http://" + "a" * 9000,
]


async def test_urls_that_are_not_tried() -> None:
    async with serving(ScriptedBackend(), resolver=OneAddress()) as served:
        for url in NOT_TRIED:
            await refusal(served, url)


# -- addresses ----------------------------------------------------------------------------------------------------


async def test_a_private_address_is_refused_by_default() -> None:
    async with media_host({}) as (url, asked), serving(ScriptedBackend()) as served:
        port = url.rsplit(":", 1)[1]
        for host in (
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f.1",
            "0.0.0.0",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "localhost",
        ):
            told = await refusal(served, f"http://{host}:{port}/x")
            assert "not public" in told or "fetched" in told or "not a URL" in told, told
        assert "not public" in await refusal(served, f"http://127.0.0.1:{port}/x")
        assert "not public" in await refusal(served, "http://169.254.169.254/latest/meta-data")
    assert not asked


async def test_a_public_name_with_a_private_address_is_refused() -> None:
    async with media_host({}) as (url, asked):
        port = url.rsplit(":", 1)[1]
        for addresses in (("127.0.0.1",), ("127.0.0.1", "10.1.2.3"), ("169.254.169.254",)):
            async with serving(ScriptedBackend(), resolver=OneAddress(*addresses)) as served:
                assert "not public" in await refusal(served, f"http://pictures.example.com:{port}/x")
    assert not asked


async def test_a_redirect_to_a_private_address_is_refused() -> None:
    async with media_host({"/x": says(png())}, "127.0.0.2") as (inside, asked):
        port = inside.rsplit(":", 1)[1]
        routes = {
            "/address": leads_to(f"{inside}/x"),
            "/name": leads_to(f"http://inside.example.com:{port}/x"),
        }
        async with (
            media_host(routes) as (url, _),
            serving(ScriptedBackend(), allow_private_media_hosts=LOOPBACK, resolver=OneAddress("127.0.0.2")) as served,
        ):
            for path in routes:
                assert "not public" in await refusal(served, url + path)
        assert not asked
        async with serving(ScriptedBackend(), allow_private_media_hosts=("127.0.0.0/8",)) as served:
            await served.client.chat.completions.create(model=MODEL, messages=asking(image(f"{inside}/x")))
    assert asked == ["/x"]


async def test_allowed_domains_hold_for_redirects_too() -> None:
    routes: dict[str, Any] = {"/x": says(png())}
    async with media_host(routes) as (url, asked):
        port = url.rsplit(":", 1)[1]
        routes["/away"] = leads_to(f"http://evil-example.com:{port}/x")
        async with serving(
            ScriptedBackend(),
            allow_private_media_hosts=LOOPBACK,
            allowed_media_domains=("example.com",),
            resolver=OneAddress("127.0.0.1"),
        ) as served:
            for host in ("example.com", "a.b.EXAMPLE.com.", "example.com."):
                messages = asking(image(f"http://{host}:{port}/x"))
                await served.client.chat.completions.create(model=MODEL, messages=messages)
            assert asked == ["/x"] * 3
            for target in (
                "http://evil-example.com",
                "http://example.com.evil.org",
                "http://127.0.0.1",
                "http://example.com%2f.evil.org",
                "http://evil.org%00.example.org",
            ):
                assert "may come from" in await refusal(served, f"{target}:{port}/x")
            assert "may come from" in await refusal(served, f"http://example.com:{port}/away")
    assert asked == ["/x"] * 3 + ["/away"]
