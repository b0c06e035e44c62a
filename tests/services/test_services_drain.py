"""Signals, with real processes: the first drains a peer, the second ends it at once."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from aiodisagg.demo.cluster import Cluster
from aiodisagg.models.base import ImagePart
from tests.models.halves import png
from tests.services.openai_chat import content
from tests.services.system import PATIENCE_S

pytestmark = pytest.mark.anyio
STREAM_TOKENS = 800
"""The tiny model does not end its answer to this question before."""


def body(model: str, *parts: Any, **settings: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content(*parts)}]
    return {"model": model, "messages": messages, "temperature": 0.0, **settings}


async def answer(session: aiohttp.ClientSession, wanted: dict[str, Any]) -> str:
    async with session.post("/v1/chat/completions", json=wanted) as response:
        assert response.status == 200, await response.text()
        text: str = (await response.json())["choices"][0]["message"]["content"]
        return text


async def states(url: str) -> dict[str, tuple[str, str]]:
    """(role, state) of the peers that the bootstrap server knows, by name."""
    async with aiohttp.ClientSession(url) as session, session.get("/v1/peers") as response:
        return {e["record"]["name"]: (e["record"]["role"], e["state"]) for e in await response.json()}


async def until_states(url: str, wanted: dict[str, tuple[str, str]]) -> None:
    """For facts of another process, which announces them to nobody here."""
    async with asyncio.timeout(PATIENCE_S):
        while await states(url) != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.mark.slow
async def test_a_partner_killed_and_then_a_drain_with_a_stream_under_way(moe: Path) -> None:
    async with Cluster() as cluster:
        bootstrap = (await cluster.start("bootstrap", "bootstrap", "--port", "0")).facts["url"]
        options = (
            "--model",
            str(moe),
            "--bootstrap",
            bootstrap,
            "--port",
            "0",
            "--kv-mib",
            "64",
            "--transports",
            "ipc",
        )
        both = [cluster.start(name, "both", "--name", name, *options) for name in ("one", "two")]
        one, two = await asyncio.gather(*both)
        await until_states(bootstrap, {"one": ("both", "ready"), "two": ("both", "ready")})
        model = one.facts["model"]
        async with aiohttp.ClientSession(one.facts["url"]) as session:
            asks = [body(model, ImagePart(png(128, 96, n)), "What is it?", max_tokens=8) for n in range(6)]
            before = await asyncio.gather(*(answer(session, ask) for ask in asks))
            again = [asyncio.ensure_future(answer(session, ask)) for ask in asks]
            cluster.kill("two")
            assert await asyncio.gather(*again) == before
            async with aiohttp.ClientSession(bootstrap) as bootstraps:  # or wait for its lease to run out
                await bootstraps.delete(f"/v1/peers/{two.facts['incarnation']}")

            wanted = body(
                model, "Tell me 2.", max_tokens=STREAM_TOKENS, stream=True, stream_options={"include_usage": True}
            )
            async with session.post("/v1/chat/completions", json=wanted) as stream:
                lines = aiter(stream.content)
                while not (await anext(lines)).startswith(b"data: "):
                    pass
                cluster.signal("one", signal.SIGTERM)
                await until_states(bootstrap, {"one": ("both", "draining")})
                async with session.post("/v1/chat/completions", json=asks[0]) as refused:
                    assert refused.status == 503 and refused.headers["Connection"] == "close"
                    assert (await refused.json())["error"]["code"] == "stopping" and refused.headers["Retry-After"]
                async with session.get("/health") as health:
                    assert (health.status, (await health.json())["reason"]) == (503, "draining")
                usage = [
                    json.loads(line[6:])["usage"] async for line in lines if b'"usage":{' in line.replace(b" ", b"")
                ]
            assert usage[-1]["completion_tokens"] == STREAM_TOKENS
        drained = cluster.members.pop("one")
        code, said = await drained.wait()
        assert code == 0 and "Traceback" not in said
        await until_states(bootstrap, {})


RUN = """
import asyncio, sys
from aiodisagg.cli.process import run

async def serve(stop, announce):
    announce({"it": "is"})
    await stop.wait()
    print("draining", flush=True)
    await asyncio.Event().wait()

run(serve)
"""


def test_a_second_signal_ends_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready: it is\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "draining\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM


@pytest.mark.slow
async def test_a_tower_of_its_own_process_is_a_peer_and_ends_with_the_other_half(moe: Path) -> None:
    async with Cluster() as cluster:
        bootstrap = (await cluster.start("bootstrap", "bootstrap", "--port", "0")).facts["url"]
        options = ("--model", str(moe), "--bootstrap", bootstrap, "--port", "0", "--transports", "ipc")
        both = await cluster.start("both", "both", "--name", "x", "--separate", "--http-port", "0", *options)
        await until_states(bootstrap, {"x": ("language", "ready"), "x-tower": ("encode", "ready")})
        async with aiohttp.ClientSession(both.facts["url"]) as session:
            ask = body(both.facts["model"], ImagePart(png(128, 96, 1)), "What is it?", max_tokens=8)
            first = await answer(session, ask)
            assert await answer(session, ask) == first
            async with session.get("/debug/requests") as response:
                (trace, _) = await response.json()
            assert trace["items"][0]["peers"] == ["x-tower"]
            async with session.get(f"{both.facts['tower_url']}/metrics") as response:
                counted = (await response.text()).splitlines()
            assert "aiodisagg_items_encoded_total 1.0" in counted
            # All processes of a unit get the signal; the tower ends when the other half has, which may need it.
            psutil.Process(both.process.pid).children()[0].send_signal(signal.SIGTERM)
            for seed in (2, 3):
                late = body(both.facts["model"], ImagePart(png(128, 96, seed)), "What is it?", max_tokens=8)
                assert await answer(session, late)
        cluster.signal("both", signal.SIGTERM)
        code, said = await cluster.members.pop("both").wait()
        assert code == 0 and "Traceback" not in said
        await until_states(bootstrap, {})
