"""What the demo gathers about its requests."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from rich.console import Console

from aiodisagg.demo.cluster import Cluster
from aiodisagg.demo.run import Demo, DemoOptions

pytestmark = pytest.mark.anyio
KEPT = 3


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
