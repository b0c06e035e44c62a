"""The commands and their options."""

from __future__ import annotations

import asyncio
import math
import os
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import aiodisagg
from aiodisagg.cli.bench import bench
from aiodisagg.cli.both import INTER_TOKEN_HELP, INTER_TOKEN_MS, NO_DTYPE, TOKEN_VARIABLE, both_command, check_tower
from aiodisagg.cli.options import no_dtype, peer_options, rare_peer_options
from aiodisagg.cli.process import (
    GIVEN_FILE,
    KEY_VARIABLE,
    NEW_FILE,
    PORT,
    POSITIVE,
    Announce,
    begin,
    begin_loading,
    check_address,
    not_empty,
    order_option,
    process_options,
    run,
    setup_logging,
    until,
)
from aiodisagg.cli.simulate import bench_simulate, plan_command, simulate
from aiodisagg.errors import AiodisaggError, ConfigError
from aiodisagg.link.address import check_bind
from aiodisagg.peer.tls import Tls
from aiodisagg.protocol.rows import DTYPE_BYTES

if TYPE_CHECKING:
    from aiodisagg.api.config import HttpConfig
    from aiodisagg.peer.config import EncodeConfig, LanguageConfig

Command = Callable[..., None]


class _Main(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """An error of ours is a line, whichever command raises it."""
        try:
            return super().invoke(ctx)
        except AiodisaggError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(aiodisagg.__version__)
def main() -> None:
    """Encode/language disaggregation for vision-language models on asyncio.

    On a CPU every process computes on one thread, unless the variable OMP_NUM_THREADS says on how many.
    """
    # A torch process with as many threads as cores collapses when the cores are busy elsewhere. Before torch is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _settings(options: dict[str, Any], *same: str, **other: Any) -> dict[str, Any]:
    """Of a peer's configuration; ``same``: options that are called as its fields are."""
    settings = {key: options[key] for key in (*_PEER, *same)} | other
    settings["bootstrap_token"] = not_empty(TOKEN_VARIABLE, options["bootstrap_token"])
    if options["secret_file"] is not None:
        settings["secret"] = options["secret_file"].read_bytes().strip()
    tls = [options[f"tls_{what}"] for what in ("certificate", "key", "authority")]
    if all(tls):
        settings["tls"] = Tls(*tls)
    elif any(tls):
        raise ConfigError("tls", "--tls-certificate, --tls-key and --tls-authority go together")
    if options["transports"] is not None:
        settings["transports"] = tuple(part.strip() for part in options["transports"].split(",") if part.strip())
    return settings


_PEER = ("model", "bootstrap", "name", "data_host", "device", "row_dtype")


def encode_config(options: dict[str, Any]) -> EncodeConfig:
    """Raises ConfigError."""
    from aiodisagg.peer.config import EncodeConfig, MiB

    same = ("listen", "batch_patches", "prepare_threads", "retain_s", "self_test_s")
    return EncodeConfig(**_settings(options, *same, source_bytes=options["source_mib"] * MiB))


def language_config(options: dict[str, Any]) -> LanguageConfig:
    """Raises ConfigError."""
    from aiodisagg.peer.config import LanguageConfig, MiB
    from aiodisagg.scheduler.admission import AdmissionConfig

    same = (
        "served_names",
        "block_rows",
        "window_blocks",
        "failover_s",
        "stall_s",
        "hedge_s",
        "token_budget",
        "max_running",
        "itl_budget_ms",
        "overlap",
        "prefix_cache",
        "dtype",
        "max_pixels",
    )
    given = {f"{what}_bytes": options[f"{what}_mib"] for what in ("pool", "cache", "kv")}
    for key, mib in given.items():
        if mib is not None and not math.isfinite(mib):
            raise ConfigError(key, f"must be finite, not {mib} MiB")
    sizes = {key: None if mib is None else int(mib * MiB) for key, mib in given.items()}
    line = {key: options[key] for key in ("max_queue", "max_ttft_s", "max_wait_s", "order")}
    return LanguageConfig(**_settings(options, *same, admission=AdmissionConfig(**line), **sizes))


_BEFORE_THE_LINE = 1024
"""Requests that are read, or whose media are fetched, or that are planned, when those behind have no room."""


def http_config(options: dict[str, Any]) -> HttpConfig:
    """Raises ConfigError."""
    from aiodisagg.api.config import PRIVATE_NETWORKS, HttpConfig, MiB, read_keys

    file: Path | None = options["keys_file"]
    return HttpConfig(
        api_key=not_empty(KEY_VARIABLE, options["api_key"]),
        api_keys=() if file is None else read_keys(file.read_bytes(), str(file)),
        max_requests=options["max_requests"] or options["max_queue"] + options["max_running"] + _BEFORE_THE_LINE,
        default_max_tokens=options["default_max_tokens"],
        media_cache_bytes=options["media_cache_mib"] * MiB,
        allowed_media_domains=options["media_domains"] or None,
        allow_private_media_hosts=PRIVATE_NETWORKS if options["allow_private_media"] else (),
    )


@main.command()
@click.option("--host", default="127.0.0.1")
@click.option("--port", default=8500, type=PORT, help="0 takes a free one.")
@click.option("--token", envvar=TOKEN_VARIABLE, show_envvar=True, help="Bearer token that peers must send.")
@process_options
def bootstrap(host: str, port: int, token: str | None, verbose: int, ready_fd: int | None, parent: int | None) -> None:
    """Run a bootstrap server: peers register there and learn of each other."""
    begin("bootstrap", verbose, parent)

    async def serve(stop: asyncio.Event, announce: Announce) -> None:
        from aiodisagg.bootstrap.server import BootstrapConfig, BootstrapServer

        async with BootstrapServer(host, port, BootstrapConfig(token=not_empty(TOKEN_VARIABLE, token))) as server:
            announce({"url": server.url})
            await stop.wait()

    run(serve, ready_fd)


@main.command()
@peer_options
@click.option(
    "--listen",
    default="unix:",
    callback=check_address,
    help="Where links are accepted: unix:, unix:/path or tcp:host:port.",
)
@click.option("--source-mib", type=click.IntRange(min=1), default=1024, help="Memory for encoded items.")
@click.option("--batch-patches", type=int, help="Patches of one tower batch; by device if not given.")
@click.option("--prepare-threads", default=2)
@click.option("--zero-deepstack", is_flag=True, help="Send zeros for DeepStack: shows what these rows are worth.")
@click.option("--http-port", type=PORT, help="Serve /live, /health and /metrics there; 0 takes a free port.")
@click.option("--http-host", default="127.0.0.1", help="Of --http-port.")
@click.option("--retain-s", default=30.0, help="How long rows are kept for a receiver whose link is lost.")
@click.option("--self-test-s", default=1.0, help="How long the tower may be measured at the start.")
@click.option("--inter-token-ms", default=INTER_TOKEN_MS, help=INTER_TOKEN_HELP, hidden=True)
@click.option("--steps-fd", type=int, hidden=True, help="Where an engine beside it tells of its steps.")
@click.option("--dtype", NO_DTYPE, hidden=True, expose_value=False, callback=no_dtype)
@rare_peer_options
def encode(
    zero_deepstack: bool,
    http_port: int | None,
    http_host: str,
    steps_fd: int | None,
    inter_token_ms: float,
    verbose: int,
    ready_fd: int | None,
    parent: int | None,
    **options: Any,
) -> None:
    """Run an encode peer: it runs the vision tower for language peers."""
    begin(options["name"] or "encode", verbose, parent)

    async def serve(stop: asyncio.Event, announce: Announce) -> None:
        config = encode_config(options)
        await check_bind(config.data_host, 0, "data_")
        if http_port is not None:
            await check_bind(http_host, http_port, "http_")
        from aiodisagg.encode.gate import SlackGate
        from aiodisagg.encode.service import EncodeService  # after the checks: torch takes seconds
        from aiodisagg.encode.steps import StepReader
        from aiodisagg.scheduler.slack import Slack

        async with AsyncExitStack() as stack:
            gate = None
            if steps_fd is not None:
                gate = SlackGate(Slack(inter_token_ms / 1000))
                reader = await stack.enter_async_context(StepReader(gate, socket.socket(fileno=steps_fd)))
                stop = reader.ended  # a signal to all processes of a unit is for the one that still needs this tower
            service = EncodeService(config, gate=gate, zero_deepstack=zero_deepstack)
            await service.check()
            await asyncio.to_thread(check_tower, config.model)
            loaded = await begin_loading("the encode half", config.model, config.device, ready_fd)
            await stack.enter_async_context(service)
            loaded()
            facts = {"name": service.name, "address": service.address, "incarnation": config.incarnation}
            if http_port is not None:
                from aiodisagg.peer.http import MetricsServer

                server = MetricsServer(
                    service.metrics, service.ready, http_host, http_port, broken=lambda: service.broken
                )
                facts["url"] = (await stack.enter_async_context(server)).url
            announce(facts)
            await until(stop, service)
            await service.drain()

    run(serve, ready_fd)


@main.command()
@peer_options
@click.option("--host", default="127.0.0.1", help="Of the HTTP API.")
@click.option("--port", default=8000, type=PORT, help="Of the HTTP API; 0 takes a free one.")
@click.option(
    "--served-model-name", "served_names", multiple=True, show_default="the last part of --model",
    help="What clients may call the model; answers have the first. May be given several times.",
)  # fmt: skip
@click.option("--api-key", envvar=KEY_VARIABLE, show_envvar=True, help="Clients must send it as a bearer token.")
@click.option("--keys-file", type=GIVEN_FILE, help="Keys of tenants, see docs/http.md.")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    callback=check_address,
    help="Address of an encode peer, besides those of the bootstrap; may be given several times.",
)
@click.option("--pool-mib", type=POSITIVE, help="Memory that encode peers write into; 64, or 1024 with a GPU.")
@click.option("--block-rows", type=int, help="Rows of a block; 256, or 1024 with a GPU.")
@click.option("--window-blocks", default=4, help="Blocks lent to one item at a time.")
@click.option("--failover-s", default=1.0, help="How long a lost link may take to come back.")
@click.option("--stall-s", default=5.0, help="Silence after which an encode peer is asked again.")
@click.option(
    "--cache-mib",
    default=256.0,
    type=click.FloatRange(min=0),
    help="Memory for rows of earlier images; 0: they are fetched again.",
)
@click.option("--hedge-s", default=2.0, help="Lateness after which a second encode peer is asked too; 0: never.")
@click.option(
    "--max-requests", type=click.IntRange(min=1), show_default="--max-queue, --max-running and 1024 more",
    help="Chat requests at once; with as many, a tenant is refused that has its share of them.",
)  # fmt: skip
@click.option(
    "--default-max-tokens", default=4096, type=click.IntRange(min=1),
    help="Of an answer where a request names no limit, or what the context leaves if that is less.",
)  # fmt: skip
@click.option(
    "--media-domain", "media_domains", multiple=True,
    help="Fetch media of requests from this host and its subdomains only; may be given several times.",
)  # fmt: skip
@click.option("--allow-private-media", is_flag=True, help="Fetch media from this host and from private networks, too.")
@click.option(
    "--media-cache-mib", default=256, type=click.IntRange(min=0),
    help="Memory for files of earlier requests, to which later ones may refer by digest; 0: none.",
)  # fmt: skip
@click.option("--max-queue", default=1024, help="Requests that wait for the engine.")
@click.option("--max-ttft-s", default=math.inf, help="Refuse what is predicted to take longer to its first token.")
@click.option("--max-wait-s", default=10.0, help="Requests that would wait longer are overtaken by nobody.")
@order_option
@click.option(
    "--kv-mib",
    type=click.IntRange(min=1),
    help="Memory of the paged KV pool; what a GPU has left, or 256, if not given.",
)
@click.option("--token-budget", type=int, help="Tokens of one engine step; 8192 unless given, and 2048 on a CPU.")
@click.option("--max-running", default=64, help="Requests that hold KV pages at once.")
@click.option(
    "--itl-budget-ms", type=float, help="What prefill may cost a running answer between two tokens. [50; on a CPU 100]"
)
@click.option("--overlap/--no-overlap", default=True, help="Prefill what has arrived, or wait for all of a prompt.")
@click.option("--prefix-cache/--no-prefix-cache", default=True, help="Reuse KV pages of prompts that begin alike.")
@click.option("--dtype", help="Of the language half; float32 on a CPU, bfloat16 elsewhere.")
@click.option("--max-pixels", type=int, help="Of an image after resizing; the checkpoint's limit if less.")
@rare_peer_options
def language(
    host: str,
    port: int,
    peers: tuple[str, ...],
    verbose: int,
    ready_fd: int | None,
    parent: int | None,
    **options: Any,
) -> None:
    """Run a language peer with an OpenAI-compatible HTTP API."""
    begin(options["name"] or "language", verbose, parent)

    async def serve(stop: asyncio.Event, announce: Announce) -> None:
        config, http = language_config(options), http_config(options)
        await check_bind(host, port)
        await check_bind(config.data_host, 0, "data_")
        from aiodisagg.api import HttpServer  # after the checks: torch takes seconds
        from aiodisagg.language.service import LanguageService

        loaded = await begin_loading("the language half", config.model, config.device, ready_fd)
        async with LanguageService(config) as service:
            loaded()
            for address in peers:
                service.add_peer(address)
            async with HttpServer(service, host, port, http, debug=service.debug()) as server:
                announce({"name": service.name, "url": server.url, "model": service.model_name})
                await until(stop, service)
                await service.drain()

    run(serve, ready_fd)


@main.command()
@click.option(
    "--requests", "count", default=24, type=click.IntRange(min=1), help="How many prompts of one to six digits."
)
@click.option("--full", is_flag=True, help="All held-out digits, alone and four to a prompt; reports accuracy.")
@click.option("--model", type=click.Path(path_type=Path), help="Any Qwen3-VL(-MoE) folder instead of the digit reader.")
@click.option("--image", "images", type=GIVEN_FILE, multiple=True, help="With --model; may be given several times.")
@click.option("--prompt", default="Describe the image.", help="With --model.")
@click.option("--max-tokens", default=64, type=click.IntRange(min=1), help="With --model.")
@click.option("--compare/--no-compare", default=None, help="Run the monolith too; by default only without --model.")
@click.option("--transports", default="ipc", help="Data planes, best first.")
@click.option("--encoders", default=2, type=click.IntRange(min=1), help="Encode peers.")
@click.option("--device", default="cpu", help="Of every peer, as torch names it.")
@click.option("--dtype", type=click.Choice(list(DTYPE_BYTES)), help="Of the language half; by device if left out.")
@click.option("--zero-deepstack", is_flag=True, help="Send zeros for DeepStack and see the answers fail.")
@click.option("--kill-encoder", is_flag=True, help="Kill an encode peer in the middle and see its items move.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write what the table shows as JSON.")
@click.option("-v", "--verbose", count=True, help="Show the logs of the processes.")
def demo(**options: Any) -> None:
    """Start a bootstrap, encode and language peers here, send real requests, compare the answers with the monolith."""
    from aiodisagg.demo.run import DemoOptions, run_demo

    setup_logging(options["verbose"], "demo")
    raise SystemExit(run_demo(DemoOptions(**options)))


bench.add_command(bench_simulate)
main.add_command(bench)
main.add_command(both_command(encode, language, encode_config, language_config, http_config))
main.add_command(simulate)
main.add_command(plan_command)


if __name__ == "__main__":
    main()
