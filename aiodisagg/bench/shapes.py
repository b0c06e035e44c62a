"""Ways to lay a system out on the same machine: which peers there are, and the core or GPU that each has to itself.

A shape is a line of parts. ``dp2-inline`` are the replicas everything is compared with: each place holds a whole model
whose tower is part of its engine's loop; in ``dp2`` these are two processes that share the core. There is nothing
between the places but a balancer in the client.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import aiohttp

from aiodisagg.demo.cluster import Cluster, Member
from aiodisagg.errors import ConfigError, own_error

On = Literal["cores", "gpus"]
READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Part:
    """A process: ``aiodisagg COMMAND OPTIONS``.

    ``place``: index into the cores or GPUs that a shape is given. ``peers``: names of the encode peers it is told of;
    parts that ``meet`` find each other through a bootstrap server instead.
    """

    name: str
    command: Literal["encode", "language", "both"]
    place: int
    options: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    meets: bool = False


INLINE = ("--inline", "--batch-patches", "16384")
"""All pictures of a prompt between two steps, as servers do whose tower is part of the engine's loop."""


def _replica(place: int, *options: str) -> tuple[Part, ...]:
    encode = f"encode-{place}"
    return Part(encode, "encode", place), Part(f"language-{place}", "language", place, options, (encode,))


def _split(*options: str) -> tuple[Part, ...]:
    return Part("encode", "encode", 0), Part("language", "language", 1, options, ("encode",))


SHAPES: dict[str, tuple[Part, ...]] = {
    "single": _replica(0),
    "single-both": (Part("both-0", "both", 0),),
    "single-both-first-come": (Part("both-0", "both", 0, ("--order", "first-come")),),
    "dp2": (*_replica(0), *_replica(1)),
    "dp2-waits": (*_replica(0, "--no-overlap"), *_replica(1, "--no-overlap")),
    "dp2-inline": (Part("both-0", "both", 0, INLINE), Part("both-1", "both", 1, INLINE)),
    "1+1": _split(),
    "1+1-waits": _split("--no-overlap"),
    "dp2-both": (Part("both-0", "both", 0), Part("both-1", "both", 1)),
    "2both": (Part("both-0", "both", 0, meets=True), Part("both-1", "both", 1, meets=True)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where shapes run, and what is the same for all of them.

    ``places``: numbers of cores or GPUs. ``options``: by command, added to what the shape says.
    """

    model: str
    on: On = "cores"
    places: tuple[int, ...] = (0, 1)
    transports: str = "ipc"
    encode_options: tuple[str, ...] = ()
    language_options: tuple[str, ...] = ()
    verbose: int = 0

    def command(self, part: Part) -> tuple[list[str], tuple[str, ...]]:
        """Arguments and the prefix that pins the process. Raises ConfigError if the shape has more places."""
        if part.place >= len(self.places):
            raise ConfigError("places", f"{part.name} needs {part.place + 1} of them")
        place = self.places[part.place]
        arguments = [part.command, "--name", part.name, "--model", self.model, "--transports", self.transports]
        if part.command != "encode":
            arguments += ["--port", "0", "--max-requests", "4096"]
        if part.command != "language":
            arguments += self.encode_options
        if part.command != "encode":
            arguments += self.language_options
        arguments += part.options
        if self.on == "gpus":
            return [*arguments, "--device", f"cuda:{place}"], ()
        return [*arguments, "--row-dtype", "float32"], ("taskset", "-c", str(place))  # a CPU's bfloat16 is no faster


@contextmanager
def modelled(setting: Setting, size: str) -> Iterator[tuple[Setting, str]]:
    """With a model, a synthetic one of ``size`` if there is none; and what to call it. Blocking."""
    if setting.model:
        yield setting, setting.model
        return
    from aiodisagg.models.synthetic import build_synthetic

    with tempfile.TemporaryDirectory(prefix="aiodisagg-bench-") as folder:
        yield replace(setting, model=str(build_synthetic(Path(folder) / size, size))), f"synthetic, {size}"


@asynccontextmanager
async def started(shape: str, setting: Setting) -> AsyncIterator[tuple[str, ...]]:
    """Yields the URLs of those of the shape's peers that have one, when all are ready and know each other.

    Raises ConfigError for an unknown shape, ProcessEnded for a part that does not start.
    """
    parts = SHAPES.get(shape)
    if parts is None:
        raise ConfigError("shapes", f"{shape!r} is none of {', '.join(SHAPES)}")
    commands = {part.name: setting.command(part) for part in parts}
    async with Cluster(verbose=setting.verbose) as cluster, aiohttp.ClientSession() as session:
        members: dict[str, Member] = {}
        meeting = sum(part.meets for part in parts)
        token = secrets.token_hex(16)
        shared: tuple[str, ...] = ()
        if meeting:
            server = await cluster.start("bootstrap", "bootstrap", "--port", "0", "--token", token)
            shared = ("--bootstrap", server.facts["url"], "--bootstrap-token", token)

        async def start(part: Part) -> None:
            arguments, prefix = commands[part.name]
            told = [option for peer in part.peers for option in ("--peer", members[peer].facts["address"])]
            more = shared if part.meets else ()
            members[part.name] = await cluster.start(part.name, *arguments, *told, *more, prefix=prefix)

        for wave in ([part for part in parts if not part.peers], [part for part in parts if part.peers]):
            try:
                async with asyncio.TaskGroup() as group:
                    for part in wave:
                        group.create_task(start(part))
            except ExceptionGroup as failed:
                raise own_error(failed) from None
        if meeting:
            await registered(session, server.facts["url"], token, meeting)
        urls = tuple(facts["url"] for part in parts if "url" in (facts := members[part.name].facts))
        for url in urls:
            await healthy(session, url)
        yield urls


async def registered(session: aiohttp.ClientSession, url: str, token: str, count: int) -> None:
    """Returns when a bootstrap server knows so many peers that are ready."""
    headers = {"Authorization": f"Bearer {token}"}
    async with asyncio.timeout(READY_S):
        while True:
            async with session.get(f"{url}/v1/peers", headers=headers) as response:
                if sum(entry["state"] == "ready" for entry in await response.json()) >= count:
                    return
            await asyncio.sleep(0.05)


async def healthy(session: aiohttp.ClientSession, url: str) -> None:
    """Returns when the peer says that it can serve requests with pictures."""
    async with asyncio.timeout(READY_S):
        while True:
            async with session.get(f"{url}/health") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.05)
