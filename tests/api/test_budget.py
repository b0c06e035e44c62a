"""Memory for bodies and media: no tenant gets the last of it."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest
from http_fakes import MODEL, ScriptedBackend, Served, answer, asking, data_url, image, png, serving

from aiodisagg.api.budget import Budget
from aiodisagg.api.config import ApiKey, HttpConfig
from aiodisagg.api.schema import ChatRequest
from aiodisagg.errors import ConfigError, Overloaded
from aiodisagg.scheduler.shares import Tenant

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

BODY = {"model": MODEL, "messages": asking(image(data_url(png() + b" " * 1_000)))}
"""Takes 2.5 kB while it is read, and 1 kB while it is answered."""


async def flood(served: Served, backend: ScriptedBackend, group: asyncio.TaskGroup, **headers: str) -> int:
    """Asks with a backend that does not answer until no more is taken, and gives how often."""
    for count in range(1000):
        task = group.create_task(served.post(BODY, **headers))
        started = asyncio.ensure_future(backend.started.get())
        await asyncio.wait((task, started), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            started.cancel()
            status, body, response = task.result()
            assert (status, body["error"]["code"], response.headers["Retry-After"]) == (429, "overloaded", "1")
            return count
    raise AssertionError("everything is taken")


@pytest.mark.parametrize("of", ["gateway", "keys"])
async def test_a_tenant_whose_pictures_wait_leaves_memory_to_others(of: str) -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend([gate, *answer("done")])
    keys = () if of == "gateway" else tuple(ApiKey(name, Tenant(name)) for name in ("batch", "urgent"))

    def who(name: str) -> dict[str, Any]:
        return {"x_tenant": name} if of == "gateway" else {"authorization": f"Bearer {name}"}

    async with serving(backend, max_held_bytes=100_000, max_body_bytes=9_000, api_keys=keys) as served:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            assert await flood(served, backend, group, **who("batch")) > 80
            assert await flood(served, backend, group, **who("urgent")) > 0
            assert await flood(served, backend, group, **who("batch")) == 0
            gate.set()
        assert (await served.post(BODY, **who("batch")))[0] == 200


async def test_names_that_a_gateway_makes_up_leave_memory_to_who_has_a_key() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend([gate, *answer("done")])
    keys = (ApiKey("key-a", Tenant("alice")),)
    async with serving(backend, max_held_bytes=100_000, max_body_bytes=9_000, api_key="key-o", api_keys=keys) as served:
        gateway = {"authorization": "Bearer key-o"}
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            assert await flood(served, backend, group, **gateway, x_tenant="user-0") > 80
            for number in range(1, 4):
                assert await flood(served, backend, group, **gateway, x_tenant=f"user-{number}") == 0
            assert await flood(served, backend, group, authorization="Bearer key-a") > 0
            gate.set()


def test_of_two_that_want_all_each_comes_to_have_half() -> None:
    """Requests of one byte: whoever is refused has given one back meanwhile."""
    budget = Budget(3_100)
    held: dict[str, list[Any]] = {"early": [], "late": []}

    def ask(name: str) -> bool:
        share = budget.share(name)
        try:
            share.__enter__().take(1)
        except Overloaded:
            share.__exit__(None, None, None)
            return False
        held[name].append(share)
        return True

    while ask("early"):
        pass
    assert len(held["early"]) == 3_100 * 15 // 16
    for _ in range(3_100):  # one of the early ones is answered, and both ask again
        held["early"].pop().__exit__(None, None, None)
        ask("early"), ask("late")
    assert abs(len(held["early"]) - len(held["late"])) < 20
    assert budget.left >= 100
    for share in (*held["early"], *held["late"]):
        share.__exit__(None, None, None)
    assert budget.left == 3_100


async def test_a_body_that_may_be_sent_finds_room_where_there_is_no_other() -> None:
    """It was told to come again in a second, for ever."""
    with pytest.raises(ConfigError, match=r"http\.max_held_bytes: .*max_body_bytes, 15001, .* 16000"):
        HttpConfig(max_held_bytes=16_000, max_body_bytes=15_001)
    async with serving(ScriptedBackend(), max_held_bytes=16_000, max_body_bytes=15_000) as served:
        body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}]}).encode()
        assert (await served.post(body.ljust(15_000)))[0] == 200
        assert (await served.post(body.ljust(15_001)))[0] == 413


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_refused_body_does_not_stay(stream: bool) -> None:
    """Its bytes are given back to the budget, so they have to be free by then, and not when garbage is next looked
    for: hundreds of megabytes of broken pictures stayed that way."""

    def bodies() -> int:
        return sum(isinstance(one, ChatRequest) for one in gc.get_objects())

    broken = image("data:image/png;base64," + "A" * 100_001)
    async with serving(ScriptedBackend()) as served:
        gc.collect()
        before = bodies()
        gc.disable()
        try:
            for _ in range(3):
                status, _, _ = await served.post({"model": MODEL, "messages": asking(broken, broken), "stream": stream})
                assert status == 400
            async with asyncio.timeout(10):  # the last handler may still be on its way out
                while bodies() > before:  # noqa: ASYNC110
                    await asyncio.sleep(0)
        finally:
            gc.enable()
