"""Who asks, and what they may: keys, tenants, classes, time limits, shares of the places."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from http_fakes import HELLO, MODEL, ScriptedBackend, Served, answer, serving

from aiodisagg.api import ApiKey, HttpConfig, HttpServer, read_keys
from aiodisagg.errors import ConfigError, Overloaded
from aiodisagg.peer.config import LanguageConfig
from aiodisagg.scheduler.admission import AdmissionConfig
from aiodisagg.scheduler.shares import Tenant
from tests.services.system import PATIENCE_S

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

BODY = {"model": MODEL, "messages": HELLO}
ALICE, BOB = Tenant("alice", 2.0), Tenant("bob")
KEYS = (ApiKey("key-a", ALICE), ApiKey("key-a2", ALICE), ApiKey("key-b", BOB))


async def test_a_key_says_whose_request_it_is() -> None:
    backend = ScriptedBackend()
    async with serving(backend, api_keys=KEYS) as served:
        for key, status in (("key-a", 200), ("key-a2", 200), ("key-b", 200), ("key-c", 401), ("", 401)):
            headers = {"authorization": f"Bearer {key}", "x_tenant": "alice"}
            assert (await served.post(BODY, **headers))[0] == status
        assert [call.tenant for call in backend.calls] == [ALICE, ALICE, BOB]
        assert "key-a" not in repr(served.server._config) + repr(KEYS) + repr(served.server)


@pytest.mark.parametrize("key", [None, "secret"])
async def test_who_may_ask_for_anybody_says_for_whom(key: str | None) -> None:
    """A gateway with the only key, or with none needed, passes on whose request it is."""
    backend = ScriptedBackend()
    async with serving(backend, api_key=key) as served:
        sent = {"authorization": "Bearer secret"}
        assert (await served.post(BODY, **sent))[0] == 200
        assert (await served.post(BODY, **sent, x_tenant="team-a.1"))[0] == 200
        assert [call.tenant for call in backend.calls] == [Tenant(), Tenant("team-a.1")]
        for wrong in ("a b", "x" * 65, "", "é"):
            status, body, _ = await served.post(BODY, **sent, x_tenant=wrong)
            assert (status, body["error"]["param"]) == (400, "X-Tenant"), wrong
        assert len(backend.calls) == 2


async def test_a_gateway_does_not_change_the_weight_of_a_tenant() -> None:
    backend, default = ScriptedBackend(), Tenant("default", 3.0)
    async with serving(backend, api_key="gateway", api_keys=(*KEYS, ApiKey("key-d", default))) as served:
        for name in ("alice", "bob", "nobody", None):
            sent = {} if name is None else {"x_tenant": name}
            assert (await served.post(BODY, authorization="Bearer gateway", **sent))[0] == 200
        assert [call.tenant for call in backend.calls] == [ALICE, BOB, Tenant("nobody"), default]


async def test_tenants_do_not_look_into_the_server() -> None:
    config = HttpConfig(api_key="operator", api_keys=KEYS)
    async with (
        HttpServer(ScriptedBackend(), port=0, config=config, debug={"all": lambda: [1]}) as server,
        aiohttp.ClientSession(server.url) as session,
    ):

        async def get(path: str, key: str) -> int:
            async with session.get(path, headers={"Authorization": f"Bearer {key}"}) as response:
                return response.status

        assert await get("/debug/all", "operator") == 200
        assert await get("/debug/all", "key-a") == 403
        assert await get("/debug/all", "nobody") == 401
        assert await get("/v1/models", "key-a") == 200


async def test_classes() -> None:
    backend = ScriptedBackend()
    async with serving(backend) as served:
        assert (await served.post(BODY))[0] == (await served.post({**BODY, "priority": None}))[0] == 200
        assert (await served.post({**BODY, "priority": -8}))[0] == 200
        assert [call.priority for call in backend.calls] == [0, 0, -8]
        for wrong in (9, -9, 0.5, "high"):
            assert (await served.refused(priority=wrong))[1]["param"] == "priority"
    assert len(backend.calls) == 3


async def test_a_client_says_how_long_it_waits() -> None:
    backend = ScriptedBackend([asyncio.Event()])
    async with serving(backend, request_timeout_s=50.0) as served:
        status, body, _ = await served.post(BODY, x_request_timeout="0.05")
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        assert "0.05 s" in body["error"]["message"]
        assert backend.calls[0].closed.is_set()
        backend.script = answer("quick")
        assert (await served.post(BODY, x_request_timeout="1e9"))[0] == 200  # the server's own limit stays
        timeouts = [call.timeout_s or 0.0 for call in backend.calls]
        assert timeouts[0] == pytest.approx(0.05, abs=0.05) and timeouts[1] == pytest.approx(50.0, abs=5.0)
        for wrong in ("0", "-1", "nan", "soon", ""):
            status, body, _ = await served.post(BODY, x_request_timeout=wrong)
            assert (status, body["error"]["param"]) == (400, "X-Request-Timeout"), wrong
    assert len(backend.calls) == 2


async def test_a_backend_that_sheds_says_when_to_come_back() -> None:
    async with serving(ScriptedBackend([Overloaded(12.3, "the first token would come too late")])) as served:
        for stream in (False, True):
            status, body, response = await served.post({**BODY, "stream": stream})
            assert (status, body["error"]["code"], response.headers["Retry-After"]) == (429, "overloaded", "13")
            assert body["error"]["message"] == "the first token would come too late"


class Tenants:
    """Ask a backend that answers nothing yet."""

    def __init__(self, group: asyncio.TaskGroup, served: Served, backend: ScriptedBackend) -> None:
        self._group, self._served, self._backend = group, served, backend
        self.taken: list[asyncio.Task[Any]] = []

    async def get_in(self, count: int, **headers: str) -> None:
        for _ in range(count):
            self.taken.append(self._group.create_task(self._served.post(BODY, **headers)))
            await asyncio.wait_for(self._backend.started.get(), PATIENCE_S)

    async def refused(self, **headers: str) -> bool:
        status, body, response = await self._served.post(BODY, **headers)
        assert (status, body["error"]["code"], response.headers["Retry-After"]) == (429, "overloaded", "1")
        return True


@pytest.mark.parametrize(
    "of", ["gateway", "keys"], ids=["a gateway that says for whom it asks", "tenants with keys of their own"]
)
async def test_a_tenant_that_floods_leaves_room_for_others(of: str) -> None:
    """Of four places one tenant has all while nobody else wants any; then each has an equal share of them."""
    gate = asyncio.Event()
    backend = ScriptedBackend([gate, *answer("done")])

    def who(name: str) -> dict[str, str]:
        return {"x_tenant": name} if of == "gateway" else {"authorization": f"Bearer {name}"}

    keys = () if of == "gateway" else tuple(ApiKey(name, Tenant(name)) for name in ("batch", "urgent", "late"))
    async with serving(backend, max_requests=4, api_keys=keys) as served:
        async with asyncio.TaskGroup() as group:
            asked = Tenants(group, served, backend)
            await asked.get_in(4, **who("batch"))
            assert await asked.refused(**who("batch"))
            await asked.get_in(2, **who("urgent"))
            assert await asked.refused(**who("urgent"))
            await asked.get_in(1, **who("late"))
            for name in ("batch", "urgent", "late"):
                assert await asked.refused(**who(name))
            gate.set()
        assert [task.result()[0] for task in asked.taken] == [200] * 7
        assert {call.tenant.name for call in backend.calls} == {"batch", "urgent", "late"}
        for _ in range(5):  # what ended has given its place back
            assert (await served.post(BODY, **who("batch")))[0] == 200


async def test_a_tenant_is_one_whether_it_asks_itself_or_through_a_gateway() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend([gate, *answer("done")])
    async with serving(backend, max_requests=2, api_key="key-o", api_keys=KEYS) as served:
        async with asyncio.TaskGroup() as group:
            asked, operator = Tenants(group, served, backend), {"authorization": "Bearer key-o"}
            await asked.get_in(1, authorization="Bearer key-a")
            await asked.get_in(1, authorization="Bearer key-a2")
            assert await asked.refused(**operator, x_tenant="alice")
            await asked.get_in(1, **operator, x_tenant="carol")
            assert await asked.refused(**operator, x_tenant="carol")
            gate.set()


async def test_names_that_a_gateway_makes_up_do_not_shut_out_who_has_a_key() -> None:
    """Of four places each of as many end users has one: a further one of them waits, and tenants of the keys file do
    not; nor do these shut each other out, or the gateway that asks for nobody."""
    gate = asyncio.Event()
    backend = ScriptedBackend([gate, *answer("done")])
    async with serving(backend, max_requests=4, api_key="key-o", api_keys=KEYS) as served:
        async with asyncio.TaskGroup() as group:
            asked, gateway = Tenants(group, served, backend), {"authorization": "Bearer key-o"}
            for number in range(4):
                await asked.get_in(1, **gateway, x_tenant=f"user-{number}")
            assert await asked.refused(**gateway, x_tenant="user-4")
            await asked.get_in(2, authorization="Bearer key-a")
            assert await asked.refused(authorization="Bearer key-a")
            await asked.get_in(1, authorization="Bearer key-b")
            await asked.get_in(1, **gateway)
            gate.set()


async def test_every_tenant_of_the_keys_file_has_a_place() -> None:
    """Also where there are more of them than places."""
    gate = asyncio.Event()
    backend = ScriptedBackend([gate, *answer("done")])
    keys = tuple(ApiKey(f"key-{number}", Tenant(f"team-{number}")) for number in range(4))
    async with serving(backend, max_requests=2, api_keys=keys) as served:
        async with asyncio.TaskGroup() as group:
            asked = Tenants(group, served, backend)
            for own in keys:
                await asked.get_in(1, authorization=f"Bearer {own.key}")
            assert await asked.refused(authorization="Bearer key-0")
            gate.set()


def test_the_line_of_the_service_fills_before_the_door_closes() -> None:
    """Or nobody would ever be asked to make room in it."""
    waiting, running = AdmissionConfig().max_queue, LanguageConfig(model=Path()).max_running
    assert HttpConfig().max_requests > waiting + running


def test_a_keys_file() -> None:
    keys = read_keys(b'[{"key": "x", "tenant": "a", "weight": 2}, {"key": "y", "tenant": "b"}]')
    assert keys == (ApiKey("x", Tenant("a", 2.0)), ApiKey("y", Tenant("b", 1.0)))
    assert read_keys(b"[]") == ()


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[1]", '[{"key": "x"}]', '[{"key": "x", "tenant": "a", "wieght": 2}]', "[" * 100_000,
        '[{"key": "", "tenant": "a"}]', '[{"key": "x y", "tenant": "a"}]', '[{"key": "x", "tenant": "a b"}]',
        '[{"key": "x", "tenant": ""}]', '[{"key": "x", "tenant": "a", "weight": 0}]',
    ],
    ids=lambda text: text[:50],
)  # fmt: skip
def test_keys_files_that_are_wrong(text: str) -> None:
    with pytest.raises(ConfigError):
        read_keys(text.encode())


@pytest.mark.parametrize(
    "settings",
    [
        {"api_keys": (*KEYS, ApiKey("key-a", BOB))},
        {"api_keys": KEYS, "api_key": "key-b"},
        {"api_keys": (ApiKey("x", Tenant("a", 1.0)), ApiKey("y", Tenant("a", 2.0)))},
    ],
    ids=["twice", "the operator's", "two weights"],
)
def test_keys_that_do_not_go_together(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"http\.api_keys"):
        HttpConfig(**settings)
