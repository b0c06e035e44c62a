"""The commands and their options."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import click

import aiodisagg
from aiodisagg.cli.bench import bench
from aiodisagg.cli.process import announcer, begin, process_options, run, setup_logging
from aiodisagg.cli.simulate import bench_simulate, plan_command, simulate
from aiodisagg.errors import AiodisaggError

Command = Callable[..., None]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(aiodisagg.__version__)
def main() -> None:
    """Encode/language disaggregation for vision-language models on asyncio."""
    # A torch process with as many threads as cores collapses when the cores are busy elsewhere. Before torch is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def peer_options(command: Command) -> Command:
    """Options of both kinds of peers."""
    for option in (
        click.option("--model", type=click.Path(path_type=Path), required=True, help="Checkpoint folder."),
        click.option("--bootstrap", multiple=True, help="URL of a bootstrap server; may be given several times."),
        click.option("--bootstrap-token", envvar="AIODISAGG_BOOTSTRAP_TOKEN", help="Token of the bootstrap servers."),
        click.option("--name", default="", help="For people."),
        click.option("--secret-file", type=click.Path(path_type=Path, exists=True), help="Shared by all peers."),
        click.option("--transports", help="Data planes that may be used, best first, with commas."),
        click.option("--data-host", default="127.0.0.1", help="Interface on which network transports receive."),
        click.option("--device", default="cpu", help="As torch names it."),
        click.option("--row-dtype", default="bfloat16", help="Element type of rows and of the vision tower."),
    ):
        command = option(command)
    return process_options(command)


def _peer_settings(
    model: Path,
    bootstrap: tuple[str, ...],
    bootstrap_token: str | None,
    name: str,
    secret_file: Path | None,
    transports: str | None,
    data_host: str,
    device: str,
    row_dtype: str,
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": model,
        "bootstrap": bootstrap,
        "bootstrap_token": bootstrap_token,
        "name": name,
        "data_host": data_host,
        "device": device,
        "row_dtype": row_dtype,
    }
    if secret_file is not None:
        settings["secret"] = secret_file.read_bytes().strip()
    if transports is not None:
        settings["transports"] = tuple(part.strip() for part in transports.split(",") if part.strip())
    return settings


@main.command()
@click.option("--host", default="127.0.0.1")
@click.option("--port", default=8500, help="0 takes a free one.")
@click.option("--token", envvar="AIODISAGG_BOOTSTRAP_TOKEN", help="Bearer token that peers must send.")
@process_options
def bootstrap(host: str, port: int, token: str | None, verbose: int, ready_fd: int | None, parent: int | None) -> None:
    """Run a bootstrap server: peers register there and learn of each other."""
    begin("bootstrap", verbose, parent)
    announce = announcer(ready_fd)

    async def serve(stop: asyncio.Event) -> None:
        from aiodisagg.bootstrap.server import BootstrapConfig, BootstrapServer

        async with BootstrapServer(host, port, BootstrapConfig(token=token)) as server:
            announce({"url": server.url})
            await stop.wait()

    run(serve)


@main.command()
@click.option("--listen", default="unix:", help="Where links are accepted: unix:, unix:/path or tcp:host:port.")
@click.option("--source-mib", default=1024, help="Memory for encoded items.")
@click.option("--batch-patches", default=16384, help="Patches of one tower batch.")
@click.option("--prepare-threads", default=2)
@click.option("--zero-deepstack", is_flag=True, help="Send zeros for DeepStack: shows what these rows are worth.")
@click.option("--http-port", type=int, help="Serve /health and /metrics there; 0 takes a free port.")
@click.option("--http-host", default="127.0.0.1")
@click.option("--retain-s", default=30.0, help="How long rows are kept for a receiver whose link is lost.")
@peer_options
def encode(
    listen: str,
    source_mib: int,
    batch_patches: int,
    prepare_threads: int,
    zero_deepstack: bool,
    http_port: int | None,
    http_host: str,
    retain_s: float,
    verbose: int,
    ready_fd: int | None,
    parent: int | None,
    **peer: Any,
) -> None:
    """Run an encode peer: it runs the vision tower for language peers."""
    begin(peer["name"] or "encode", verbose, parent)
    announce = announcer(ready_fd)

    async def serve(stop: asyncio.Event) -> None:
        from aiodisagg.peer.config import EncodeConfig, MiB

        config = EncodeConfig(
            **_peer_settings(**peer),
            listen=listen,
            source_bytes=source_mib * MiB,
            batch_patches=batch_patches,
            prepare_threads=prepare_threads,
            retain_s=retain_s,
        )
        from aiodisagg.encode.service import EncodeService, load_encoder  # after the checks: torch takes seconds

        encoder = None
        if zero_deepstack:
            from aiodisagg.encode.ablation import WithoutDeepStack

            encoder = WithoutDeepStack(await asyncio.to_thread(load_encoder, config))
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(EncodeService(config, encoder=encoder))
            facts = {"name": service.name, "address": service.address, "incarnation": config.incarnation}
            if http_port is not None:
                from aiodisagg.peer.http import MetricsServer

                server = MetricsServer(service.metrics, http_host, http_port)
                facts["url"] = (await stack.enter_async_context(server)).url
            announce(facts)
            await stop.wait()

    run(serve)


@main.command()
@click.option("--host", default="127.0.0.1", help="Of the HTTP API.")
@click.option("--port", default=8000, help="Of the HTTP API; 0 takes a free one.")
@click.option("--api-key", envvar="AIODISAGG_API_KEY", help="Clients must send it as a bearer token.")
@click.option("--peer", "peers", multiple=True, help="Address of an encode peer, besides those of the bootstrap.")
@click.option("--pool-mib", default=64.0, help="Memory that encode peers write into.")
@click.option("--block-rows", default=256, help="Rows of a block.")
@click.option("--window-blocks", default=4, help="Blocks lent to one item at a time.")
@click.option("--failover-s", default=1.0, help="How long a lost link may take to come back.")
@click.option("--stall-s", default=5.0, help="Silence after which an encode peer is asked again.")
@click.option("--max-requests", default=256, help="Chat requests at once.")
@click.option("--kv-mib", default=256, help="Memory of the paged KV pool.")
@click.option("--token-budget", default=2048, help="Tokens of one engine step.")
@click.option("--max-running", default=64, help="Requests that hold KV pages at once.")
@click.option("--dtype", help="Of the language half; float32 on a CPU, bfloat16 elsewhere.")
@click.option("--max-pixels", type=int, help="Of an image after resizing; the checkpoint's limit if less.")
@peer_options
def language(
    host: str,
    port: int,
    api_key: str | None,
    peers: tuple[str, ...],
    pool_mib: float,
    block_rows: int,
    window_blocks: int,
    failover_s: float,
    stall_s: float,
    max_requests: int,
    kv_mib: int,
    token_budget: int,
    max_running: int,
    dtype: str | None,
    max_pixels: int | None,
    verbose: int,
    ready_fd: int | None,
    parent: int | None,
    **peer: Any,
) -> None:
    """Run a language peer with an OpenAI-compatible HTTP API."""
    begin(peer["name"] or "language", verbose, parent)
    announce = announcer(ready_fd)

    async def serve(stop: asyncio.Event) -> None:
        from aiodisagg.peer.config import LanguageConfig, MiB

        config = LanguageConfig(
            **_peer_settings(**peer),
            pool_bytes=int(pool_mib * MiB),
            block_rows=block_rows,
            window_blocks=window_blocks,
            failover_s=failover_s,
            stall_s=stall_s,
            kv_bytes=kv_mib * MiB,
            token_budget=token_budget,
            max_running=max_running,
            dtype=dtype,
            max_pixels=max_pixels,
        )
        from aiodisagg.api import HttpConfig, HttpServer  # after the checks: torch takes seconds
        from aiodisagg.language.service import LanguageService

        http = HttpConfig(api_key=api_key, max_requests=max_requests)
        async with LanguageService(config) as service:
            for address in peers:
                service.add_peer(address)
            async with HttpServer(service, host, port, http, debug=service.debug()) as server:
                announce({"name": service.name, "url": server.url, "model": service.model_name})
                await stop.wait()

    run(serve)


@main.command()
@click.option("--requests", "count", default=24, help="How many prompts of one to six digits.")
@click.option("--full", is_flag=True, help="All held-out digits, alone and four to a prompt; reports accuracy.")
@click.option("--model", type=click.Path(path_type=Path), help="Any Qwen3-VL(-MoE) folder instead of the digit reader.")
@click.option("--image", "images", type=click.Path(path_type=Path, exists=True), multiple=True, help="With --model.")
@click.option("--prompt", default="Describe the image.", help="With --model.")
@click.option("--max-tokens", default=64, help="With --model.")
@click.option("--compare/--no-compare", default=None, help="Run the monolith too; by default only without --model.")
@click.option("--transports", default="ipc", help="Data planes, best first.")
@click.option("--encoders", default=2, help="Encode peers.")
@click.option("--zero-deepstack", is_flag=True, help="Send zeros for DeepStack and see the answers fail.")
@click.option("--kill-encoder", is_flag=True, help="Kill an encode peer in the middle and see its items move.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write what the table shows as JSON.")
@click.option("-v", "--verbose", count=True, help="Show the logs of the processes.")
def demo(**options: Any) -> None:
    """Start a bootstrap, encode and language peers here, send real requests, compare the answers with the monolith."""
    from aiodisagg.demo.run import DemoOptions, run_demo

    setup_logging(options["verbose"], "demo")
    try:
        raise SystemExit(run_demo(DemoOptions(**options)))
    except AiodisaggError as error:
        raise click.ClickException(str(error)) from error


bench.add_command(bench_simulate)
main.add_command(bench)
main.add_command(simulate)
main.add_command(plan_command)


if __name__ == "__main__":
    main()
