"""``aiodisagg bench``: measurements. Heavy imports wait for the command."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

import click

from aiodisagg.cli.process import announcer, begin, process_options, run, setup_logging
from aiodisagg.errors import AiodisaggError


@click.group()
def bench() -> None:
    """Measure on this machine."""


@bench.command("load")
@click.option("--model", type=click.Path(path_type=Path), help="A Qwen3-VL(-MoE) folder; a synthetic one if left out.")
@click.option("--dtype", default="bfloat16", help="Of all weights.")
@click.option("--repeats", default=5, type=click.IntRange(min=1), help="Fresh processes for each of the three.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every run and the medians as JSON.")
def bench_load_command(model: Path | None, dtype: str, repeats: int, json_file: Path | None) -> None:
    """Peak memory and load time of each half against the monolith."""
    import msgspec

    from aiodisagg.bench.load import bench_load, table

    try:
        report = bench_load(model, dtype=dtype, repeats=repeats)
    except AiodisaggError as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(report))
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


@bench.command("source", hidden=True)
@click.option("--hidden", default=2048)
@click.option("--levels", default=3)
@click.option("--transports", default="ipc")
@click.option("--source-mib", default=1024)
@process_options
def bench_source_command(
    hidden: int,
    levels: int,
    transports: str,
    source_mib: int,
    verbose: int,
    ready_fd: int | None,
    parent: int | None,
) -> None:
    """Run an encode peer of synthetic items; part of bench resume."""
    begin("source", verbose, parent)
    announce = announcer(ready_fd)

    async def serve(stop: asyncio.Event) -> None:
        from aiodisagg.bench.synthetic import SyntheticEncoder, synthetic_model
        from aiodisagg.encode.service import EncodeService
        from aiodisagg.peer.config import EncodeConfig, MiB
        from aiodisagg.peer.http import MetricsServer

        config = EncodeConfig(
            model=Path.cwd(), transports=tuple(transports.split(",")), source_bytes=source_mib * MiB, self_test_s=0.0
        )  # fmt: skip
        encoder = SyntheticEncoder(synthetic_model(hidden, levels))
        async with (
            EncodeService(config, encoder=encoder) as service,
            MetricsServer(service.metrics, "127.0.0.1", 0) as server,
        ):
            announce({"address": service.address, "url": server.url})
            await stop.wait()

    run(serve)


@bench.command("resume")
@click.option("--transport", default="ipc", help="Data plane: ipc, stream or zmq.")
@click.option("--repeats", default=5, type=click.IntRange(min=1), help="Rounds; every kind of run once in each.")
@click.option("--quick", is_flag=True, help="A fiftieth of the rows: shows that it works, not how fast.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every run and the medians as JSON.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Write a PNG; needs the extra bench.")
def bench_resume_command(json_file: Path | None, plot_file: Path | None, **options: Any) -> None:
    """Transfers that are interrupted, beside ones that are not; memory of blocks against fixed buffers."""
    import uvloop
    from rich.console import Console

    from aiodisagg.bench.resume import ResumeOptions, bench_resume, write
    from aiodisagg.bench.tables import resume_tables

    setup_logging(0, "bench")
    logging.getLogger("aiodisagg.language.peers").setLevel(logging.ERROR)  # links are lost on purpose
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        report = uvloop.run(bench_resume(ResumeOptions(**options), lambda text: click.echo(text, err=True)))
        write(report, json_file, plot_file)
    except AiodisaggError as error:
        raise click.ClickException(str(error)) from error
    except ImportError as error:
        raise click.ClickException(f"{error}; pip install 'aiodisagg[bench]'") from error
    console.print(resume_tables(report))


@bench.command("faults")
@click.option("--scenario", type=click.Choice(["kill", "bootstrap", "stop", "netcut"]), default="kill")
@click.option("--rounds", default=20, type=click.IntRange(min=1), help="Faults, each in a load of its own.")
@click.option("--requests", default=200, type=click.IntRange(min=1), help="At once, each with three to six images.")
@click.option("--transports", help="Data planes, best first; ipc, and zmq for netcut, if left out.")
@click.option("--seed", default=0, help="Of the moments of the faults.")
@click.option("-v", "--verbose", count=True, help="Show the logs of the processes.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every round as JSON.")
def bench_faults_command(json_file: Path | None, transports: str | None, **options: Any) -> None:
    """Real processes under load while one is killed (kill), stopped for 5 s (stop), the bootstrap server is away for
    10 s (bootstrap), or the network to the encode peers is cut for 5 s (netcut: needs root and iproute2)."""
    import msgspec
    import uvloop
    from rich.console import Console

    from aiodisagg.bench.faults import FaultOptions, bench_faults
    from aiodisagg.bench.tables import fault_table

    setup_logging(0, "bench")
    chosen = transports or ("zmq" if options["scenario"] == "netcut" else "ipc")
    try:
        report = uvloop.run(
            bench_faults(FaultOptions(transports=chosen, **options), lambda text: click.echo(text, err=True))
        )
    except AiodisaggError as error:
        raise click.ClickException(str(error)) from error
    Console(width=None if sys.stdout.isatty() else 120).print(fault_table(report))
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    raise SystemExit(1 if report.failed or report.wrong else 0)
