"""A whole system in processes of its own, and a client that sends it many requests at once."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from aiodisagg.bench.counters import row_bytes
from aiodisagg.bench.network import Namespace
from aiodisagg.bench.shapes import registered
from aiodisagg.data import digits_model
from aiodisagg.demo.cluster import Cluster, Member
from aiodisagg.demo.tasks import Ask

REQUEST_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client saw of one request."""

    text: str
    tokens: int
    error: str
    seconds: float

    @property
    def said(self) -> tuple[str, int, str]:
        return self.text, self.tokens, self.error


@dataclass(slots=True)
class System:
    """``encoders``: names of the encode peers, started the same way again by ``start_encoder``."""

    cluster: Cluster
    asks: Sequence[Ask]
    model: str
    bootstrap: Member
    language: Member
    network: Namespace | None
    bootstrap_options: tuple[str, ...]
    encode_options: tuple[str, ...]
    session: aiohttp.ClientSession = field(repr=False)
    _round: int = 0

    async def restart_bootstrap(self) -> None:
        """On the port it had."""
        port = self.bootstrap.facts["url"].rpartition(":")[2]
        self.bootstrap = await self.cluster.start("bootstrap", "bootstrap", *self.bootstrap_options, "--port", port)

    async def start_encoder(self, name: str) -> Member:
        prefix = self.network.exec if self.network is not None else ()
        return await self.cluster.start(name, "encode", "--name", name, *self.encode_options, prefix=prefix)

    @property
    def encoders(self) -> list[Member]:
        return [member for name, member in self.cluster.members.items() if name.startswith("encode")]

    async def linked(self, count: int) -> None:
        """Returns when the language peer has a link to ``count`` encode peers."""
        async with asyncio.timeout(60):
            while len(await self.debug("peers")) != count:  # noqa: ASYNC110 - another process, which announces nothing
                await asyncio.sleep(0.05)

    async def registered(self, count: int) -> None:
        """Returns when the bootstrap server knows ``count`` peers."""
        await registered(self.session, self.bootstrap.facts["url"], self.bootstrap_options[-1], count)

    async def debug(self, what: str) -> list[dict[str, Any]]:
        async with self.session.get(f"{self.language.facts['url']}/debug/{what}") as response:
            found: list[dict[str, Any]] = await response.json()
            return found

    async def row_bytes(self, member: Member, outcome: str) -> float:
        """That a peer has counted."""
        async with self.session.get(f"{member.facts['url']}/metrics") as response:
            return row_bytes(await response.text(), outcome)

    async def wave(self) -> tuple[str, list[Answer]]:
        """Sends all requests at once; returns the prefix of their ids and the answers."""
        self._round += 1
        tag = f"round{self._round}"
        return tag, list(await asyncio.gather(*(self._ask(f"{tag}-{i}", ask) for i, ask in enumerate(self.asks))))

    async def _ask(self, request_id: str, ask: Ask) -> Answer:
        body = {**ask.body(self.model), "stream": False}
        del body["stream_options"]
        began = time.perf_counter()
        text, tokens, error = "", 0, ""
        try:
            url = f"{self.language.facts['url']}/v1/chat/completions"
            async with self.session.post(url, json=body, headers={"x-request-id": request_id}) as response:
                said = await response.json()
                if response.status == 200:
                    text, tokens = said["choices"][0]["message"]["content"], said["usage"]["completion_tokens"]
                else:
                    error = f"{response.status}: {said['error']['message']}"
        except (aiohttp.ClientError, TimeoutError) as failure:
            error = str(failure) or type(failure).__name__
        return Answer(text, tokens, error, time.perf_counter() - began)


@asynccontextmanager
async def system(
    asks: Sequence[Ask], *, transports: str, encoders: int, network: bool, block_rows: int, pool_mib: float,
    verbose: int = 0,
) -> AsyncIterator[System]:  # fmt: skip
    """Bootstrap, encode peers and one language peer with the digit reader, all linked.

    ``network``: encode peers live in a network namespace of their own, reached over TCP with a shared secret.
    """
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aiodisagg-bench-")))
        net = await stack.enter_async_context(Namespace()) if network else None
        cluster = await stack.enter_async_context(Cluster(verbose=verbose))
        here, there = (net.here, net.there) if net is not None else ("127.0.0.1", "127.0.0.1")
        token = secrets.token_hex(16)
        bootstrap_options = ("--host", here, "--token", token)
        bootstrap = await cluster.start("bootstrap", "bootstrap", *bootstrap_options, "--port", "0")
        common = ["--model", str(digits_model()), "--bootstrap", bootstrap.facts["url"], "--transports", transports]
        common += ["--data-host", here, "--bootstrap-token", token]
        encode_options = [*common, "--http-port", "0", "--http-host", there, "--source-mib", "1"]
        if net is not None:
            secret = folder / "secret"
            secret.write_text(secrets.token_hex(32))
            common += ["--secret-file", str(secret)]
            encode_options += ["--secret-file", str(secret), "--listen", f"tcp:{there}:0"]
        # Every wave asks the same: its images have to come each time.
        language_options = [*common, "--no-prefix-cache", "--name", "language-1", "--port", "0"]
        language_options += ["--block-rows", str(block_rows)]
        language_options += ["--pool-mib", str(pool_mib), "--max-requests", str(2 * len(asks))]
        language_options += ["--max-running", str(len(asks)), "--failover-s", "1"]
        # The same images round after round, each fetched once from one peer: what is measured is the way they come.
        language_options += ["--cache-mib", "0", "--hedge-s", "0"]
        timeout = aiohttp.ClientTimeout(total=REQUEST_S)
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=timeout))
        language = await cluster.start("language-1", "language", *language_options)
        made = System(
            cluster, asks, digits_model().name, bootstrap, language, net, bootstrap_options, tuple(encode_options),
            session,
        )  # fmt: skip
        await asyncio.gather(*(made.start_encoder(f"encode-{i + 1}") for i in range(encoders)))
        await made.linked(encoders)
        yield made
