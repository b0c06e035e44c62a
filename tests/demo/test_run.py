"""What the demo gathers about its requests."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
from unittest.mock import Mock

import psutil
import pytest
from aiohttp import web
from rich.console import Console

from aiodisagg.demo.cluster import Cluster, Member, ProcessEnded
from aiodisagg.demo.run import Demo, DemoOptions, run_demo

pytestmark = pytest.mark.anyio
KEPT = 3
PATIENCE_S = 20.0


class _Peer:
    """A language peer that remembers the last few requests only, and answers nobody of whom it was not looked at."""

    def __init__(self) -> None:
        self.finished: list[dict[str, object]] = []
        self.looked = asyncio.Condition()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        async with self.looked:
            await self.looked.wait()
        name = request.headers["x-request-id"]
        item = {"rows": 9, "bytes_arrived": 18, "asked_s": 0.0, "encoded_s": 0.1, "complete_s": 0.2, "moves": 0}
        item |= {"rows_kept": 0, "peers": ["encode-1"], "rows_arrived": 9, "stage": "complete"}
        trace = {"request_id": name, "items": [item], "first_token_s": 0.3, "total_s": 0.4, "state": "finished"}
        self.finished = [*self.finished, trace | {"output_tokens": 1}][-KEPT:]
        return web.Response(text='data: {"choices": [{"delta": {"content": "7"}}]}\n\ndata: [DONE]\n\n')

    async def requests(self, request: web.Request) -> web.Response:
        async with self.looked:
            self.looked.notify(1)
        return web.json_response(self.finished)

    async def peers(self, request: web.Request) -> web.Response:
        return web.json_response(["encode-1", "encode-2"])


async def test_what_the_user_says_of_threads_reaches_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process had one, whatever the variable said."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    async with Cluster() as cluster:
        member = await cluster.start("bootstrap", "bootstrap", "--port", "0")
        assert psutil.Process(member.process.pid).environ()["OMP_NUM_THREADS"] == "3"


async def test_the_users_api_key_is_not_that_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shell in which it was set the demo waited for ever: its language peer let nobody in."""
    monkeypatch.setenv("AIODISAGG_API_KEY", "sekret")
    async with Cluster() as cluster:
        member = await cluster.start("bootstrap", "bootstrap", "--port", "0")
        assert "AIODISAGG_API_KEY" not in psutil.Process(member.process.pid).environ()


@pytest.mark.parametrize("kill", [False, True])
async def test_device_and_dtype_are_those_of_the_peers(kill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, tuple[str, ...]] = {}

    async def start(self: Cluster, name: str, *command: str) -> Member:
        started[name] = command
        if name == "language-1":
            raise ProcessEnded(name, 1, "that is enough")
        member = Member(name, Mock(stderr=None))
        member.facts = {"url": "http://127.0.0.1:1"}
        return member

    monkeypatch.setattr(Cluster, "start", start)
    options = DemoOptions(device="cuda:1", dtype="float16", kill_encoder=kill, compare=False)
    with pytest.raises(ProcessEnded):
        await Demo(options, Console(quiet=True)).run()
    said = {name: dict(itertools.pairwise(command)) for name, command in started.items()}
    assert [said[name]["--device"] for name in ("encode-1", "encode-2", "language-1")] == ["cuda:1"] * 3
    assert said["language-1"]["--dtype"] == "float16" and "--dtype" not in said["encode-1"]
    assert ("--block-rows" in said["language-1"]) == kill


def test_a_process_that_does_not_start_is_told_before_the_monolith_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told when that had been loaded, minutes later."""
    loaded = []

    async def start(*_: object, **__: object) -> str:
        raise ProcessEnded("encode-1", 1, "there is none")

    monkeypatch.setattr("aiodisagg.demo.run.Monolith", lambda *_: loaded.append(True))
    monkeypatch.setattr("aiodisagg.demo.run.start_system", start)
    with pytest.raises(ProcessEnded):
        run_demo(DemoOptions(device="abacus"))
    assert not loaded


def test_ctrl_c_does_not_wait_for_the_monolith(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(PATIENCE_S)
        loaded.append(True)

    async def start(*_: object, **__: object) -> str:
        return "http://127.0.0.1:1"

    async def work(*_: object) -> None:
        pass

    monkeypatch.setattr("aiodisagg.demo.run.Monolith", load)
    monkeypatch.setattr("aiodisagg.demo.run.start_system", start)
    monkeypatch.setattr(Demo, "_work", work)
    assert run_demo(DemoOptions()) == 130
    assert not loaded


async def test_requests_that_a_peer_has_forgotten_are_in_the_table() -> None:
    peer = _Peer()
    app = web.Application()
    app.router.add_get("/debug/requests", peer.requests)
    app.router.add_get("/debug/peers", peer.peers)
    app.router.add_post("/v1/chat/completions", peer.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        demo = Demo(DemoOptions(count=3 * KEPT), Console(quiet=True))
        async with Cluster() as cluster:
            await asyncio.wait_for(demo._work(cluster, f"{site.name}"), 30)
    finally:
        await runner.cleanup()
    assert [answer.error for answer in demo.answers] == [""] * (3 * KEPT)
    assert set(demo.traces) == {f"demo-{i}" for i in range(3 * KEPT)}
