"""Files that are sent once and referred to by digest afterwards."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from http_fakes import (
    MODEL,
    Call,
    ScriptedBackend,
    Served,
    answer,
    asking,
    data_url,
    image,
    media_host,
    png,
    says,
    serving,
)

from aiodisagg.api import ApiKey, HttpConfig, fetch
from aiodisagg.api.media_cache import ENTRY_BYTES, sha256_of
from aiodisagg.cli.main import http_config, main
from aiodisagg.engine.types import Delta
from aiodisagg.errors import ConfigError
from aiodisagg.models.base import ImagePart, VideoPart
from aiodisagg.scheduler.shares import Tenant

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

PARAM = "messages[0].content[{}].image_url.url"
UNKNOWN = (400, "unknown_media", PARAM.format(0))
A, B, C, D = (bytes([i]) * 1_000 for i in range(4))
ROOM = 1_000 + ENTRY_BYTES


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


def ref(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def frames(*urls: str) -> dict[str, Any]:
    return {"type": "video", "video": list(urls), "fps": 4.0}


async def ask(served: Served, *parts: Any, **headers: str) -> Any:
    """The answer's text; of an error its status, code and param. A part that is a string is an image's URL."""
    messages = asking(*(image(part) if isinstance(part, str) else part for part in parts))
    status, body, _ = await served.post({"model": MODEL, "messages": messages}, **headers)
    if status == 200:
        return body["choices"][0]["message"]["content"]
    return status, body["error"]["code"], body["error"]["param"]


async def metrics(served: Served) -> dict[str, float]:
    """What the cache counts, by name without prefix."""
    async with served.session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    found = (line.removeprefix("aiodisagg_media_cache_").split() for line in lines if "_media_cache_" in line)
    return {name: float(value) for name, value in (words for words in found if len(words) == 2)}


async def digests(call: Call) -> AsyncGenerator[Delta, None]:
    """An answer that only the same files have."""
    files = [part.data for part in call.messages[0].parts if isinstance(part, ImagePart)]
    for delta in answer(*map(ref, files)):
        yield delta


async def test_a_file_is_sent_once_and_referred_to_later() -> None:
    backend = ScriptedBackend(digests)
    large = png() + bytes(range(256)) * 1_000  # not one that is decoded on the loop
    async with serving(backend) as served:
        for data in (png(), large):
            told = await ask(served, data_url(data))
            assert await ask(served, ref(data)) == told == ref(data)
            assert await ask(served, ref(data).upper()) == told
        assert await ask(served, ref(large), data_url(A), ref(png())) == ref(large) + ref(A) + ref(png())
        assert await metrics(served) == {
            "hits_total": 6.0,
            "misses_total": 0.0,
            "saved_bytes_total": 3.0 * (len(png()) + len(large)),
            "evictions_total": 0.0,
            "bytes": len(png()) + len(large) + len(A) + 3.0 * ENTRY_BYTES,
        }


async def test_a_file_from_elsewhere_is_fetched_once_and_referred_to_later() -> None:
    small, large = png(), png() + bytes(100_000)

    async with (
        media_host({"/small": says(small), "/large": says(large)}) as (url, asked),
        serving(ScriptedBackend(digests), allow_private_media_hosts=("127.0.0.1",)) as served,
    ):
        told = await ask(served, f"{url}/small", f"{url}/large")
        assert await ask(served, ref(small), ref(large)) == told == ref(small) + ref(large)
    assert sorted(asked) == ["/large", "/small"]


async def test_frames_of_a_video_may_be_references() -> None:
    backend = ScriptedBackend()
    async with serving(backend) as served:
        await ask(served, frames(data_url(A), data_url(B)))
        await ask(served, frames(ref(B), data_url(C), ref(A)), ref(B))
        assert await ask(served, frames(ref(A), ref(D))) == (400, "unknown_media", "messages[0].content[0].video[1]")
    assert backend.calls[1].messages[0].parts == (VideoPart((B, C, A), 4.0), ImagePart(B))
    assert len(backend.calls) == 2


async def test_a_file_that_is_unknown_is_asked_for_and_disturbs_nothing() -> None:
    backend = ScriptedBackend(digests)
    async with (
        media_host({}) as (url, asked),
        serving(backend, allow_private_media_hosts=("127.0.0.1",)) as served,
    ):
        budget = served.server._chat._budget
        before = budget.left
        await ask(served, data_url(A))
        status, error = await served.refused(messages=asking(image(ref(A)), image(f"{url}/x"), image(ref(B))))
        assert (status, error["type"], error["code"]) == (400, "invalid_request_error", "unknown_media")
        assert error["param"] == PARAM.format(2)
        assert "send the file again" in error["message"]
        assert (asked, len(backend.calls), budget.left) == ([], 1, before)
        assert await ask(served, data_url(A), data_url(B)) == await ask(served, ref(A), ref(B))
        assert (await metrics(served))["misses_total"] == 1


async def test_a_file_of_another_tenant_is_as_unknown_as_any() -> None:
    keys = (
        ApiKey("key-a", Tenant("alice", 2.0)),
        ApiKey("key-a2", Tenant("alice", 2.0)),
        ApiKey("key-b", Tenant("bob")),
    )
    alice, alice_too, bob, operator = (
        {"authorization": f"Bearer {key}"} for key in ("key-a", "key-a2", "key-b", "key-o")
    )
    backend = ScriptedBackend(digests)
    async with serving(backend, api_key="key-o", api_keys=keys) as served:
        await ask(served, data_url(A), **alice)
        assert await ask(served, ref(A), **alice_too) == ref(A)
        bodies = []
        for headers in (bob, operator, bob | {"x_tenant": "alice"}):
            for data in (A, B):
                _, body, _ = await served.post({"model": MODEL, "messages": asking(image(ref(data)))}, **headers)
                bodies.append(body)
        assert bodies[0]["error"]["code"] == "unknown_media"
        assert bodies == bodies[:1] * 6
        # Who speaks for anybody, speaks for this one too, whatever its weight.
        assert await ask(served, ref(A), **operator, x_tenant="alice") == ref(A)
        await ask(served, data_url(B), **operator, x_tenant="bob")
        assert await ask(served, ref(B), **bob) == ref(B)
        assert await ask(served, ref(B), **alice) == UNKNOWN


@pytest.mark.parametrize("use", [ref, data_url], ids=["referred to", "sent again"])
async def test_the_file_that_was_not_used_for_longest_goes_first(use: Callable[[bytes], str]) -> None:
    async with serving(ScriptedBackend(digests), media_cache_bytes=3 * ROOM) as served:
        for data in (A, B, C):
            await ask(served, data_url(data))
        assert (await metrics(served))["evictions_total"] == 0
        assert await ask(served, use(A)) == ref(A)
        await ask(served, data_url(D))
        assert await ask(served, ref(B)) == UNKNOWN
        assert await ask(served, ref(C), ref(A), ref(D)) == ref(C) + ref(A) + ref(D)
        await ask(served, data_url(bytes(1_001)))  # a byte more than one of them leaves
        assert [await ask(served, ref(data)) for data in (C, A, D)] == [UNKNOWN, UNKNOWN, ref(D)]
        counted = await metrics(served)
        assert (counted["evictions_total"], counted["bytes"]) == (3, 2 * ROOM + 1)


async def test_many_small_files_stay_within_the_bound_too() -> None:
    async with serving(ScriptedBackend(), media_cache_bytes=10_000) as served:
        await ask(served, frames(*(data_url(bytes([i])) for i in range(100))))
        counted = await metrics(served)
        assert counted["bytes"] <= 10_000
        assert counted["evictions_total"] >= 80


async def test_what_a_request_refers_to_is_not_pushed_out_by_what_it_sends() -> None:
    async with serving(ScriptedBackend(digests), media_cache_bytes=ROOM) as served:
        await ask(served, data_url(A))
        assert await ask(served, data_url(B), ref(A)) == ref(B) + ref(A)
        assert [await ask(served, ref(data)) for data in (A, B)] == [UNKNOWN, ref(B)]
        # Its own files are not earlier ones, whichever happens to be loaded first.
        assert await ask(served, data_url(C), ref(C)) == (400, "unknown_media", PARAM.format(1))


async def test_a_file_larger_than_the_cache_is_not_kept_and_pushes_nothing_out() -> None:
    async with serving(ScriptedBackend(digests), media_cache_bytes=ROOM) as served:
        await ask(served, data_url(A))
        assert await ask(served, data_url(bytes(1_001))) == ref(bytes(1_001))
        assert await ask(served, ref(bytes(1_001))) == UNKNOWN
        assert await ask(served, ref(A)) == ref(A)


async def test_without_a_cache_nothing_is_kept_or_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(data: bytes) -> str:
        raise AssertionError("hashed for nothing")

    monkeypatch.setattr(fetch, "sha256_of", hashed)
    async with (
        media_host({"/a": says(A)}) as (url, _),
        serving(ScriptedBackend(digests), allow_private_media_hosts=("127.0.0.1",), media_cache_bytes=0) as served,
    ):
        assert await ask(served, data_url(A), f"{url}/a") == 2 * ref(A)
        assert await ask(served, ref(A)) == UNKNOWN
        assert (await metrics(served))["bytes"] == 0


async def test_large_files_are_not_hashed_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    on_loop: dict[bool, list[int]] = {True: [], False: []}
    large = png() + bytes(700_000)

    def hashed(data: bytes) -> str:
        on_loop[threading.current_thread() is threading.main_thread()].append(len(data))
        return sha256_of(data)

    monkeypatch.setattr(fetch, "sha256_of", hashed)
    async with (
        media_host({"/large": says(large), "/small": says(bytes(60_000))}) as (url, _),
        serving(ScriptedBackend(), allow_private_media_hosts=("127.0.0.1",)) as served,
    ):
        await ask(served, data_url(large))
        await ask(served, f"{url}/large")
        assert on_loop == {True: [], False: [len(large)] * 2}
        await ask(served, frames(*[f"{url}/small"] * 16))
        assert sum(on_loop[True]) <= 1 << 18
        assert len(on_loop[True]) == 4


async def test_references_count_as_the_files_they_mean() -> None:
    backend = ScriptedBackend()
    limits = {"max_media_total_bytes": 2_500, "max_media_files": 3}
    async with serving(backend, **limits) as served:
        await ask(served, data_url(A))
        assert await ask(served, ref(A), ref(A), ref(A)) == (400, "invalid_media", PARAM.format(2))
        assert await ask(served, data_url(B), data_url(B), ref(A)) == (400, "invalid_media", PARAM.format(1))
        status, error = await served.refused(messages=asking(frames(*[ref(A)] * 4)))
        assert status == 400 and "more than 3 images and frames" in error["message"]
        assert len(backend.calls) == 1
        assert await ask(served, ref(A), data_url(B)) == "Hello there"


async def test_what_is_referred_to_is_held_until_it_is_answered() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend()
    data = png() + bytes(3_000)
    async with serving(backend, max_held_bytes=8_000, max_body_bytes=7_500) as served:
        budget = served.server._chat._budget
        await ask(served, data_url(data))
        await backend.started.get()
        assert budget.left == 8_000
        backend.script = [gate, *answer("done")]
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            running = []
            for n in (1, 2):
                running.append(group.create_task(ask(served, ref(data))))
                await backend.started.get()
                assert budget.left == 8_000 - n * len(data)
            assert await ask(served, ref(data)) == (429, "overloaded", None)
            gate.set()
        assert [task.result() for task in running] == ["done"] * 2
        assert await ask(served, ref(data)) == "done"
        assert budget.left == 8_000


async def test_references_that_are_none() -> None:
    digest = hashlib.sha256(A).hexdigest()
    backend = ScriptedBackend()
    async with serving(backend) as served:
        await ask(served, data_url(A))
        for wrong in (
            *("", digest[1:], f"{digest}0", f" {digest}", f"{digest}\n", f"{digest[1:]}g", f"{digest[1:]}Ä"),
            *(f"//{digest}", f"{digest}?", "0" * 100_000),
        ):
            status, error = await served.refused(messages=asking(image(f"sha256:{wrong}")))
            assert (status, error["code"], error["param"]) == (400, "invalid_media", PARAM.format(0)), wrong
            assert "a reference is sha256:<64 hex digits>" in error["message"]
        for wrong in (f"sha512:{digest}", f"sha256-{digest}", digest):
            status, error = await served.refused(messages=asking(image(wrong)))
            assert (status, error["code"], error["param"]) == (400, "invalid_media", PARAM.format(0)), wrong
            assert "sha256: URL" in error["message"]
        counted = await metrics(served)
        assert (counted["hits_total"], counted["misses_total"], len(backend.calls)) == (0, 0, 1)
        assert await ask(served, ref(A)) == "Hello there"


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_the_size_of_the_cache_is_checked(value: Any) -> None:
    assert HttpConfig(media_cache_bytes=0).media_cache_bytes == 0
    with pytest.raises(ConfigError, match=r"http\.media_cache_bytes"):
        HttpConfig(media_cache_bytes=value)


@pytest.mark.parametrize("role", ["language", "both"])
def test_the_size_of_the_cache_can_be_said(role: str) -> None:
    def config(*arguments: str) -> HttpConfig:
        command = main.commands[role]
        return http_config(command.make_context(role, ["--model", ".", *arguments]).params)

    assert config().media_cache_bytes == HttpConfig().media_cache_bytes == 256 << 20
    assert config("--media-cache-mib", "7").media_cache_bytes == 7 << 20
    assert config("--media-cache-mib", "0").media_cache_bytes == 0
