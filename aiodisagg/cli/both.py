"""``aiodisagg both``: a peer with both halves, in one process or, with ``--separate``, the tower in one of its own."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aiodisagg.cli.process import PORT, Announce, begin, begin_loading, fail, run, until
from aiodisagg.errors import AiodisaggError, ConfigError, own_error
from aiodisagg.link.address import check_bind

if TYPE_CHECKING:
    from aiodisagg.api.config import HttpConfig
    from aiodisagg.both.service import BothService
    from aiodisagg.demo.cluster import Cluster
    from aiodisagg.language.service import LanguageService
    from aiodisagg.peer.config import EncodeConfig, LanguageConfig

INLINE_HELP = "The tower takes turns with the engine, prefill waits for all images: a plain server, to compare with."
INTER_TOKEN_MS = 50.0
INTER_TOKEN_HELP = "Pace that running streams are owed while images are encoded."
TOKEN_VARIABLE = "AIODISAGG_BOOTSTRAP_TOKEN"
NO_DTYPE = "no_dtype"
_LEFT_OUT = ("zero_deepstack", "steps_fd", NO_DTYPE)
"""Of an encode peer's options."""


def both_command(
    encode: click.Command,
    language: click.Command,
    encode_config: Callable[[dict[str, Any]], EncodeConfig],
    language_config: Callable[[dict[str, Any]], LanguageConfig],
    http_config: Callable[[dict[str, Any]], HttpConfig],
) -> click.Command:
    """The command, with the options of both kinds of peers, each once, and its own."""

    @click.command()
    @click.option(
        "--inter-token-ms",
        type=float,
        help=f"{INTER_TOKEN_HELP} If left out: --itl-budget-ms; on a CPU none, unless --separate.",
    )
    @click.option("--separate", is_flag=True, help="Run the tower in a process of its own; it registers as one, too.")
    @click.option(
        "--http-port", type=PORT, help="With --separate: the tower's /live, /health and /metrics; 0 takes a free port."
    )
    @click.option("--inline", is_flag=True, help=INLINE_HELP)
    def both(
        host: str,
        port: int,
        peers: tuple[str, ...],
        inter_token_ms: float | None,
        separate: bool,
        inline: bool,
        verbose: int,
        ready_fd: int | None,
        parent: int | None,
        **options: Any,
    ) -> None:
        """Run a peer that is both: an HTTP API, and a vision tower for itself and for other peers."""
        begin(options["name"] or "both", verbose, parent)

        async def serve(stop: asyncio.Event, announce: Announce) -> None:
            if separate and inline:
                raise ConfigError("inline", "a tower in a process of its own is not part of the engine's loop")
            if options["http_port"] is not None and not separate:
                raise ConfigError("http_port", "is a tower's in a process of its own (--separate); else all is at port")
            of_both = options | {"name": options["name"] or f"both-{secrets.token_hex(3)}"}
            of_language, of_encode = language_config(of_both), encode_config(of_both)
            front = _Front(http_config(options), host, port, peers, announce)
            if inter_token_ms is not None and not inter_token_ms > 0:
                raise ConfigError("inter_token_ms", f"must be above 0, not {inter_token_ms:g}")
            await check_bind(host, port)
            await check_bind(of_language.data_host, 0, "data_")
            await asyncio.to_thread(check_tower, of_encode.model)
            if not separate:
                from aiodisagg.both.service import BothService

                pace = None if inter_token_ms is None else inter_token_ms / 1000
                service = BothService(of_language, of_encode, inter_token_s=pace, inline=inline)
                await service.encode.check()
                loaded = await begin_loading("both halves", of_encode.model, of_encode.device, ready_fd)
                async with service:
                    loaded()
                    facts = {"address": service.address, "incarnation": of_encode.incarnation}
                    await front.serve(service, facts, stop)
                return
            arguments = _arguments(encode, of_both | {"name": f"{of_both['name']}-tower"})
            arguments += ["--inter-token-ms", str(inter_token_ms or of_language.pace_ms or INTER_TOKEN_MS)]
            if options["bootstrap_token"]:  # not where everybody reads it
                os.environ[TOKEN_VARIABLE] = options["bootstrap_token"]
            loaded = await begin_loading("both halves", of_encode.model, of_encode.device, ready_fd)
            await _serve_separate(front, of_language, arguments, verbose, stop, loaded)

        run(serve, ready_fd)

    own = {param.name: param for param in both.params}  # not an encode peer's of the same name
    of_encode, of_language = ({param.name: param for param in command.params} for command in (encode, language))
    known = of_language | own | of_encode | of_language | own
    both.params = [param for name, param in known.items() if name not in _LEFT_OUT]
    return both


class _Front:
    """The HTTP API of whichever service answers."""

    def __init__(
        self, http: HttpConfig, host: str, port: int, peers: tuple[str, ...], announce: Announce
    ) -> None:  # fmt: skip
        self._http, self._host, self._port, self._peers, self._announce = http, host, port, peers, announce

    async def serve(
        self, service: BothService | LanguageService, facts: dict[str, str], stop: asyncio.Event
    ) -> None:  # fmt: skip
        """Returns when the service has drained."""
        from aiodisagg.api import HttpServer

        for address in self._peers:
            service.add_peer(address)
        async with HttpServer(service, self._host, self._port, self._http, debug=service.debug()) as server:
            self._announce({"name": service.name, "url": server.url, "model": service.model_name, **facts})
            await until(stop, service)
            await service.drain()


async def _serve_separate(
    front: _Front, config: LanguageConfig, arguments: list[str], verbose: int, stop: asyncio.Event,
    loaded: Callable[[], None],
) -> None:  # fmt: skip
    """The tower is a child: it is told of every engine step, and its end is this peer's."""
    from aiodisagg.demo.cluster import Cluster
    from aiodisagg.encode.steps import StepSender, step_pair
    from aiodisagg.language.service import LanguageService

    async with AsyncExitStack() as stack:
        ours, theirs = step_pair()
        steps = StepSender(ours)
        cluster = await stack.enter_async_context(Cluster(verbose=verbose, quiet=False))
        stack.callback(steps.close)  # before the cluster ends: it is the word by which the tower drains
        try:
            with theirs:
                child = ("encode", *arguments, "--steps-fd", str(theirs.fileno()))
                async with asyncio.TaskGroup() as group:  # both load at once
                    starting = group.create_task(_start_tower(cluster, child, theirs.fileno()))
                    service = await stack.enter_async_context(LanguageService(config, watcher=steps))
            tower = starting.result()
            loaded()
            address = tower["address"]
            service.add_tower(address, tower["incarnation"])
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(cluster.watch())
                facts = {"address": address, "incarnation": config.incarnation}
                if "url" in tower:
                    facts["tower_url"] = tower["url"]
                await front.serve(service, facts, stop)
                watch.cancel()
        except ExceptionGroup as failed:
            raise own_error(failed) from None
        steps.close()
        await cluster.members.pop("tower").process.wait()  # it finishes what other peers asked it for


async def _start_tower(cluster: Cluster, command: Sequence[str], steps_fd: int) -> Mapping[str, str]:
    """What it announced. If it does not get there, this process ends as well, whatever it is loading."""
    try:
        return (await cluster.start("tower", *command, pass_fds=[steps_fd])).facts
    except AiodisaggError as error:
        fail(error)


def _arguments(command: click.Command, options: dict[str, Any]) -> list[str]:
    """What makes ``command`` see these options as they are here; the token is left out."""
    found: list[str] = []
    for param in command.params:
        value = options.get(param.name or "")
        if value is None or param.name == "bootstrap_token" or param.name in _LEFT_OUT:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            found += [param.opts[-1], str(one)]
    return found


def check_tower(folder: Path) -> None:
    """Before either half is loaded. Raises CheckpointError."""
    from aiodisagg.models.checkpoint import read_info

    read_info(folder).check_tower()
