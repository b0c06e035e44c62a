"""The line before the engine, in the whole system: who is turned away, who overtakes, and that nobody is encoded who
does not get his turn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from aiodisagg import LanguageService
from aiodisagg.api import ApiKey, HttpConfig, HttpServer
from aiodisagg.errors import DeadlineExceeded, EngineError, InvalidRequest, Overloaded, PromptTooLong
from aiodisagg.language.service import PLANNERS
from aiodisagg.models.base import ChatMessage, ImagePart, Planner, PromptPlan, TextPart
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from aiodisagg.scheduler.admission import AdmissionConfig
from aiodisagg.scheduler.shares import Tenant
from tests.models.halves import chat, png
from tests.services.openai_chat import chat_body
from tests.services.system import PATIENCE_S, Held, System, eventually, finished, system

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(scope="module")
def vision(moe: Path) -> Qwen3VLVisionEncoder:
    return Qwen3VLVisionEncoder(moe, dtype="float32")


def picture(seed: int, side: int = 64) -> ImagePart:
    return ImagePart(png(side, side, 50 + seed))


def in_line(service: LanguageService) -> list[str]:
    return [entry.request_id for entry in service.admission._queue.waiting]


class Line:
    """Requests of a system that come one after another; ``done``: their ids in the order of their first tokens."""

    def __init__(self, made: System) -> None:
        self.made = made
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.done: list[str] = []

    async def ask(self, name: str, *parts: Any, **settings: Any) -> None:
        """Returns when the request is in line, or past it."""

        async def answer() -> None:
            await self.made.ask(chat(*parts), 1, request_id=name, **settings)
            self.done.append(name)

        admission = self.made.language.admission
        self.tasks[name] = asyncio.ensure_future(answer())
        await eventually(lambda: name in admission._known or self.tasks[name].done(), f"{name} is in line")

    async def all(self) -> None:
        await asyncio.gather(*self.tasks.values())


@asynccontextmanager
async def held_system(
    moe: Path, vision: Qwen3VLVisionEncoder, **settings: Any
) -> AsyncIterator[tuple[System, Line, Held]]:
    """One request at a time is let through to an encoder that is held; the first, "first", is there already."""
    held = Held(vision)
    settings = {"min_in_flight": 1, **settings}
    async with system(moe, encoder=held, admission=AdmissionConfig(**settings)) as made:
        line = Line(made)
        try:
            await line.ask("first", picture(0), "?")
            await eventually(lambda: held.entered["encode"] == 1)
            yield made, line, held
            held.gate.set()
            await line.all()
        finally:
            held.gate.set()
            await finished(*line.tasks.values())


async def test_text_is_answered_while_images_wait(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    async with held_system(moe, vision) as (made, line, held):
        for n in range(3):
            await line.ask(f"image {n}", picture(1 + n), "?")
        await line.ask("text", "Hello")
        await line.tasks["text"]
        assert line.done == ["text"]
        assert in_line(made.language) == ["image 0", "image 1", "image 2"]
        assert held.entered["prepare"] == 1


async def test_one_image_overtakes_eight_and_classes_overtake_it(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    async with held_system(moe, vision) as (_, line, held):
        await line.ask("eight", *(picture(1 + n, 256) for n in range(8)), "?")
        await line.ask("one", picture(10, 256), "?")
        await line.ask("urgent", *(picture(11 + n, 256) for n in range(8)), "?", priority=-1)
        held.gate.set()
        await line.all()
    assert line.done == ["first", "urgent", "one", "eight"]


async def test_a_flooding_tenant_delays_another_by_one_request_only(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    async with held_system(moe, vision) as (_, line, held):
        for n in range(5):
            await line.ask(f"a{n}", picture(1 + n), "?", tenant=Tenant("alice"))
        await line.ask("b0", picture(6), "?", tenant=Tenant("bob"))
        await line.ask("b1", picture(7), "?", tenant=Tenant("bob"))
        held.gate.set()
        await line.all()
    # The tokens that were generated meanwhile decide between a1 and b1.
    assert line.done[:3] == ["first", "a0", "b0"] and set(line.done[3:5]) == {"a1", "b1"}
    assert line.done[5:] == ["a2", "a3", "a4"]


@pytest.mark.parametrize("kept", [{"cache_bytes": 0}, {"prefix_cache": False}], ids=["pages", "rows"])
async def test_pictures_that_are_here_cost_a_chat_nothing(
    moe: Path, vision: Qwen3VLVisionEncoder, kept: dict[str, Any]
) -> None:
    """Its next turn waits behind no pictures, is not predicted to be late, and its tenant pays for what is done."""
    turn = (picture(0), "A harbour, early in the day.")
    admission = AdmissionConfig(min_in_flight=1, max_ttft_s=20.0)
    held = Held(vision)
    async with system(moe, encoder=held, admission=admission, **kept) as made:
        line, lanes = Line(made), made.language.admission._queue.lanes
        try:
            held.gate.set()
            await line.ask("first turn", *turn)
            await line.all()
            held.gate.clear()
            for lane in lanes:  # a slow machine's
                lane.prices.known, lane.prices.patch_s, lane.prices.token_s, lane.latency_s = True, 1.0, 0.001, 0.0
            await line.ask("another", picture(1), "?", tenant=Tenant("bob"))
            await eventually(lambda: held.entered["encode"] == 2)
            await line.ask("second turn", *turn, "What do you see in it?", tenant=Tenant("alice"))
            async with asyncio.timeout(PATIENCE_S):
                await line.tasks["second turn"]
            assert line.done == ["first turn", "second turn"]
            assert held.entered == {"prepare": 2, "encode": 2}
            charged = made.language.admission._charged
            assert 0 < charged["alice"] < 1.0 < charged["bob"]
            held.gate.set()
            await line.all()
        finally:
            held.gate.set()
            await finished(*line.tasks.values())


async def test_a_deadline_in_line_is_kept_without_any_encoding(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    async with held_system(moe, vision) as (made, line, held):
        with pytest.raises(DeadlineExceeded, match="hurried"):
            await made.ask(chat(picture(1), "?"), 1, request_id="hurried", timeout_s=0.3)
        assert in_line(made.language) == []
        held.gate.set()
        await line.all()
        assert held.entered == {"prepare": 1, "encode": 1}
        assert 'refused_total{reason="deadline"} 1.0' in made.language.metrics()


async def test_who_does_not_fit_is_told_so_before_it_waits(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    async with held_system(moe, vision) as (made, _, _):
        with pytest.raises(PromptTooLong):
            await made.ask(chat(picture(1), "?"), 1 << 30)
        with pytest.raises(InvalidRequest, match="priority"):
            await made.ask(chat(picture(1), "?"), 1, priority=9)
        assert in_line(made.language) == []


async def test_a_full_line_sheds_without_encoding_and_takes_the_next_when_one_leaves(
    moe: Path, vision: Qwen3VLVisionEncoder
) -> None:
    async with held_system(moe, vision, max_queue=1) as (made, line, held):
        await line.ask("waits", picture(1), "?")
        with pytest.raises(Overloaded) as shed:
            await made.ask(chat(picture(2), "?"), 1)
        assert shed.value.retry_after_s >= 1.0
        await finished(line.tasks.pop("waits"))
        assert in_line(made.language) == []
        await line.ask("next", picture(3), "?")
        held.gate.set()
        await line.all()
        assert line.done == ["first", "next"]
        assert held.entered["prepare"] == 2


async def test_closing_lets_nobody_wait(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    held = Held(vision)
    asked: list[asyncio.Task[tuple[int, ...]]] = []
    with pytest.raises(ZeroDivisionError):
        async with system(moe, encoder=held, admission=AdmissionConfig(min_in_flight=1)) as made:
            asked += [asyncio.ensure_future(made.ask(chat(picture(n), "?"), 1)) for n in range(3)]
            await eventually(lambda: held.entered["encode"] == 1 and len(in_line(made.language)) == 2)
            held.gate.set()
            raise ZeroDivisionError
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(error, EngineError) and "service is closed" in str(error) for error in found) == 2
    with pytest.raises(EngineError, match="closed"):
        await made.ask(chat("Hello"), 1)


# -- behind HTTP ------------------------------------------------------------------------------------------------


async def test_429_and_hanging_up_in_line(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    async with (
        held_system(moe, vision, max_queue=1) as (made, _, held),
        HttpServer(made.language, port=0) as server,
        aiohttp.ClientSession(server.url) as session,
    ):
        body = chat_body(made.language, picture(1), "?", max_tokens=1)
        waits = asyncio.ensure_future(session.post("/v1/chat/completions", json=body))
        await eventually(lambda: len(in_line(made.language)) == 1)
        async with session.post("/v1/chat/completions", json=body) as refused:
            assert (refused.status, (await refused.json())["error"]["code"]) == (429, "overloaded")
            assert int(refused.headers["Retry-After"]) >= 1
        await finished(waits)
        await eventually(lambda: not in_line(made.language), "who hangs up leaves the line")
        headers = {"X-Request-Timeout": "0.2"}
        async with session.post("/v1/chat/completions", json=body, headers=headers) as late:
            assert (late.status, (await late.json())["error"]["code"]) == (504, "deadline_exceeded")
        assert held.entered == {"prepare": 1, "encode": 1}


async def test_a_tenant_of_a_gateway_that_floods_makes_room_for_another(
    moe: Path, vision: Qwen3VLVisionEncoder
) -> None:
    """At the door, which it has filled, and in the line."""
    async with (
        held_system(moe, vision, max_queue=2) as (made, _, held),
        HttpServer(made.language, port=0, config=HttpConfig(api_key="gateway", max_requests=2)) as server,
        aiohttp.ClientSession(server.url, headers={"Authorization": "Bearer gateway"}) as session,
        asyncio.TaskGroup() as group,
    ):

        async def post(tenant: str, name: str) -> int:
            body = chat_body(made.language, picture(1), "?", max_tokens=1)
            headers = {"X-Tenant": tenant, "X-Request-Id": name}
            async with session.post("/v1/chat/completions", json=body, headers=headers) as response:
                return response.status

        asked = {}
        for tenant, name in (("batch", "b1"), ("batch", "b2"), ("urgent", "u1")):
            asked[name] = group.create_task(post(tenant, name))
            await eventually(lambda name=name: name in in_line(made.language) or asked[name].done())
        assert await asked["b2"] == 429 and sorted(in_line(made.language)) == ["b1", "u1"]
        held.gate.set()
        assert [await asked["u1"], await asked["b1"]] == [200, 200]


async def test_keys_classes_and_metrics_reach_the_line(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    config = HttpConfig(api_keys=(ApiKey("key-a", Tenant("alice")), ApiKey("key-b", Tenant("bob", 2.0))))
    async with (
        held_system(moe, vision) as (made, _, held),
        HttpServer(made.language, port=0, config=config) as server,
        aiohttp.ClientSession(server.url) as session,
    ):

        async def post(key: str, name: str, priority: int = 0) -> None:
            headers = {"Authorization": f"Bearer {key}", "X-Request-Id": name}
            body = chat_body(made.language, picture(ord(name[-1])), "?", max_tokens=1, priority=priority)
            async with session.post("/v1/chat/completions", json=body, headers=headers) as response:
                assert response.status == 200, await response.text()
            order.append(name)

        order: list[str] = []
        async with asyncio.TaskGroup() as group:
            sent = (("key-a", "a1", 0), ("key-a", "a2", 0), ("key-a", "a3", -1), ("key-b", "b1", 0), ("key-b", "b2", 0))
            for key, name, priority in sent:
                group.create_task(post(key, name, priority))
                await eventually(lambda name=name: name in in_line(made.language))
            metrics = made.language.metrics().splitlines()
            assert 'aiodisagg_admission_waiting{priority="-1"} 1.0' in metrics
            assert 'aiodisagg_admission_waiting{priority="0"} 4.0' in metrics
            assert 'aiodisagg_admission_let_through{lane="media"} 1.0' in metrics
            held.gate.set()
        # Alice's first turn, then bob's two, which weigh as much as one of hers.
        assert order == ["a3", "b1", "b2", "a1", "a2"]
        await eventually(lambda: not made.language.traces.open)
        text = made.language.metrics()
        cost = {
            tenant: float(line.split()[-1])
            for tenant in ("alice", "bob", "default")
            for line in text.splitlines()
            if line.startswith(f'aiodisagg_tenant_cost_seconds_total{{tenant="{tenant}"}}')
        }
        assert cost["alice"] == pytest.approx(1.5 * cost["bob"]) and cost["default"] > 0
        assert "aiodisagg_admission_wait_seconds_count 6.0" in text


async def test_many_tenants_share_a_few_labels(moe: Path) -> None:
    async with system(moe, encoders=0) as made:
        for n in range(40):
            await made.ask(chat("Hello"), 1, tenant=Tenant(f"t{n}"))
        await made.quiet()
        lines = [line for line in made.language.metrics().splitlines() if line.startswith("aiodisagg_tenant_cost_sec")]
        assert len(lines) == 33 and '{tenant="(others)"}' in lines[-1]


class Counting:
    """A planner that says what it plans, how many prompts at once, and waits until it may go on."""

    def __init__(self, planner: Planner) -> None:
        self._planner, self._lock = planner, threading.Lock()
        self.now = self.most = 0
        self.let, self.begun = threading.Semaphore(0), list[str]()
        self.eos_ids, self.decode = planner.eos_ids, planner.decode

    def plan(self, messages: Sequence[ChatMessage], *, limit: int | None = None) -> PromptPlan:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.begun += [part.text for part in messages[0].parts if isinstance(part, TextPart)]
        assert self.let.acquire(timeout=60)
        with self._lock:
            self.now -= 1
        return self._planner.plan(messages, limit=limit)


async def test_of_a_burst_the_first_is_not_planned_with_the_last(moe: Path) -> None:
    async with system(moe) as made:
        counting = Counting(made.language._planner)
        made.language._planner = counting
        asked = [asyncio.ensure_future(made.ask(chat("What?"), 1)) for _ in range(4 * PLANNERS)]
        await eventually(lambda: counting.now == PLANNERS)
        counting.let.release(4 * PLANNERS)
        await asyncio.gather(*asked)
        assert counting.most == PLANNERS


async def test_who_floods_the_planners_keeps_no_other_tenant_out(moe: Path) -> None:
    async with system(moe) as made:
        counting = made.language._planner = Counting(made.language._planner)
        names = [*(f"a{n}" for n in range(PLANNERS + 2)), "b"]
        asked = [asyncio.ensure_future(made.ask(chat(name), 1, tenant=Tenant(name[0]))) for name in names]
        await eventually(lambda: "aiodisagg_planning_waiting 3.0" in made.language.metrics())
        counting.let.release()
        await eventually(lambda: len(counting.begun) == PLANNERS + 1)
        assert counting.begun[-1] == "b"
        counting.let.release(len(names))
        await asyncio.gather(*asked)


async def test_who_asks_a_service_that_is_closed_is_told_so(moe: Path) -> None:
    async with system(moe) as made:
        pass
    with pytest.raises(EngineError, match="closed"):
        await made.ask(chat("What?"), 1)
