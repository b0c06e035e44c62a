"""``aiodisagg bench``: measurements. Heavy imports wait for the command."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import click

from aiodisagg.cli.bench_serve import bench_serve_command
from aiodisagg.cli.bench_system import bench_control_command, bench_reuse_command, bench_system_command
from aiodisagg.cli.bench_times import bench_times_command
from aiodisagg.cli.measuring import INTEGERS, NUMBERS, measure, plot_option, say, show, write_json
from aiodisagg.cli.process import GIVEN_FILE, NEW_FILE, Announce, begin, process_options, run, setup_logging
from aiodisagg.errors import ConfigError
from aiodisagg.protocol.rows import DTYPE_BYTES


@click.group()
@click.pass_context
def bench(context: click.Context) -> None:
    """Measure on this machine."""
    if context.invoked_subcommand != "source":  # which logs as a peer does
        setup_logging(0, "bench")


@bench.command("load")
@click.option("--model", type=click.Path(path_type=Path), help="A Qwen3-VL(-MoE) folder; a synthetic one if left out.")
@click.option("--dtype", default="bfloat16", type=click.Choice(list(DTYPE_BYTES)), help="Of all weights.")
@click.option("--repeats", default=5, type=click.IntRange(min=1), help="Fresh processes for each of the three.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write every run and the medians as JSON.")
def bench_load_command(model: Path | None, dtype: str, repeats: int, json_file: Path | None) -> None:
    """Peak memory and load time of each half against the monolith."""
    from aiodisagg.bench.load import bench_load, table

    report = bench_load(model, dtype=dtype, repeats=repeats)
    click.echo(table(report))
    write_json(json_file, report)


@bench.command("overload")
@click.option("--loads", default="0.5,0.7,0.85,1,1.2,1.5,2", callback=NUMBERS, help="Times the capacity, with commas.")
@click.option("--requests", "count", default=2000, type=click.IntRange(min=20), help="For each load and policy.")
@click.option("--seed", default=0)
@click.option("--max-wait-s", default=10.0, help="The aging bound.")
@click.option("--real", type=click.Choice(["tiny", "115m"]), help="Real services with a synthetic model of this size.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write what the table shows as JSON.")
def bench_overload_command(
    loads: tuple[float, ...], count: int, seed: int, max_wait_s: float, real: str | None, json_file: Path | None
) -> None:
    """Requests in time under more load than can be served, with the line before the engine and without. In virtual
    time with the times of a 30B-A3B model on H200s, unless --real."""
    from aiodisagg.bench.overload import POLICIES, bench_overload, overload_table
    from aiodisagg.bench.workload import check

    if not loads:
        raise ConfigError("loads", "at least one is needed")
    check("loads", loads, above=0)
    if real is None:
        report = bench_overload(loads, count, seed, max_wait_s)
    else:
        from aiodisagg.bench.overload_real import bench_overload_real

        report = measure(bench_overload_real(loads, count, seed, size=real, max_wait_s=max_wait_s))
    show(overload_table(report))
    for policy in POLICIES if max(loads) > 1 else ():
        if report.of(policy):
            click.echo(f"{policy}: beyond capacity {report.kept(policy):.3f} of its best, or more")
    write_json(json_file, report)


@bench.command("source", hidden=True)
@click.option("--hidden", default=2048)
@click.option("--levels", default=3)
@click.option("--transports", default="ipc")
@click.option("--source-mib", type=click.IntRange(min=1), default=1024)
@click.option("--peers", "count", default=1, help="Encode peers in this process.")
@click.option("--null", is_flag=True, help="Rows are zeros that cost nothing.")
@process_options
def bench_source_command(
    hidden: int,
    levels: int,
    transports: str,
    source_mib: int,
    count: int,
    null: bool,
    verbose: int,
    ready_fd: int | None,
    parent: int | None,
) -> None:
    """Run encode peers of synthetic items; part of bench resume and bench control."""
    begin("source", verbose, parent)

    async def serve(stop: asyncio.Event, announce: Announce) -> None:
        from aiodisagg.bench.synthetic import NullEncoder, SyntheticEncoder, synthetic_model
        from aiodisagg.encode.service import EncodeService
        from aiodisagg.peer.config import EncodeConfig, MiB
        from aiodisagg.peer.http import MetricsServer

        encoder = (NullEncoder if null else SyntheticEncoder)(synthetic_model(hidden, levels))
        async with AsyncExitStack() as stack:
            services = []
            for _ in range(count):
                config = EncodeConfig(
                    model=Path.cwd(),
                    transports=tuple(transports.split(",")),
                    source_bytes=source_mib * MiB,
                    self_test_s=0.0,
                )
                services.append(await stack.enter_async_context(EncodeService(config, encoder=encoder)))
            server = await stack.enter_async_context(
                MetricsServer(services[0].metrics, services[0].ready, "127.0.0.1", 0)
            )
            announce({"address": " ".join(service.address for service in services), "url": server.url})
            await stop.wait()

    run(serve, ready_fd)


@bench.command("resume")
@click.option("--transport", default="ipc", help="Data plane: ipc, stream or zmq.")
@click.option("--repeats", default=5, type=click.IntRange(min=1), help="Rounds; every kind of run once in each.")
@click.option("--quick", is_flag=True, help="A fiftieth of the rows: shows that it works, not how fast.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write every run and the medians as JSON.")
@plot_option
def bench_resume_command(json_file: Path | None, plot_file: Path | None, **options: Any) -> None:
    """Transfers that are interrupted, beside ones that are not; memory of blocks against fixed buffers."""
    from aiodisagg.bench.plot import plot_resume
    from aiodisagg.bench.resume import ResumeOptions, bench_resume
    from aiodisagg.bench.tables import resume_tables

    logging.getLogger("aiodisagg.language.peers").setLevel(logging.ERROR)  # links are lost on purpose
    report = measure(bench_resume(ResumeOptions(**options), say))
    write_json(json_file, report)
    if plot_file is not None:
        plot_resume(report, plot_file)
    show(resume_tables(report), 120)


@bench.command("overlap")
@click.option("--concurrency", default="8,16", callback=INTEGERS, help="Clients at once, with commas.")
@click.option("--rounds", default=5, type=click.IntRange(min=1), help="Both modes once in each.")
@click.option("--requests", default=2, type=click.IntRange(min=1), help="Measured ones of each client in a round.")
@click.option("--tokens", default=128, type=click.IntRange(min=4), help="Of a mean answer.")
@click.option("--itl-budget-ms", default=200.0, help="Of both modes: what prefill may cost a running answer.")
@click.option("--transport", default="ipc")
@click.option("--quick", is_flag=True, help="A tiny model and short answers: shows that it works, not how fast.")
@click.option("-v", "--verbose", count=True, help="Show the logs of the processes.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write every round as JSON.")
def bench_overlap_command(json_file: Path | None, **options: Any) -> None:
    """TTFT and throughput with prefill while images arrive, against waiting for all of a request's images. Two cores:
    one encodes, one computes the language model."""
    from aiodisagg.bench.overlap import OverlapOptions, bench_overlap, table

    if options["quick"]:
        options |= {"tokens": min(options["tokens"], 16), "rounds": min(options["rounds"], 2)}
    report = measure(bench_overlap(OverlapOptions(**options), say))
    click.echo(table(report))
    write_json(json_file, report)


@bench.command("faults")
@click.option("--scenario", type=click.Choice(["kill", "bootstrap", "stop", "netcut"]), default="kill")
@click.option("--rounds", default=20, type=click.IntRange(min=1), help="Faults, each in a load of its own.")
@click.option("--requests", default=200, type=click.IntRange(min=1), help="At once, each with three to six images.")
@click.option("--transports", help="Data planes, best first; ipc, and zmq for netcut, if left out.")
@click.option("--seed", default=0, help="Of the moments of the faults.")
@click.option("-v", "--verbose", count=True, help="Show the logs of the processes.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write every round as JSON.")
def bench_faults_command(json_file: Path | None, transports: str | None, **options: Any) -> None:
    """Real processes under load while one is killed (kill), stopped for 5 s (stop), the bootstrap server is away for
    10 s (bootstrap), or the network to the encode peers is cut for 5 s (netcut: needs root and iproute2)."""
    from aiodisagg.bench.faults import FaultOptions, bench_faults
    from aiodisagg.bench.tables import fault_table

    chosen = transports or ("zmq" if options["scenario"] == "netcut" else "ipc")
    report = measure(bench_faults(FaultOptions(transports=chosen, **options), say))
    show(fault_table(report), 120)
    write_json(json_file, report)
    raise SystemExit(1 if report.failed or report.wrong else 0)


@bench.command("transport")
@click.option("--only", multiple=True, help="Sections: sizes, handoff, link, fairness, gil, hosts; all if left out.")
@click.option("--runs", default=5, type=click.IntRange(min=1), help="Rounds; every path and its limit once in each.")
@click.option("--quick", is_flag=True, help="Small sizes and few repeats: shows that it works, not how fast.")
@click.option(
    "--netns", is_flag=True, help="Run in a network namespace of its own with TCP reno; needs root, iproute2."
)
@click.option("--read", "read_file", type=GIVEN_FILE, help="Show an earlier --json; measure nothing.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write every run and the medians as JSON.")
@plot_option
def bench_transport_command(
    only: tuple[str, ...],
    runs: int,
    quick: bool,
    netns: bool,
    read_file: Path | None,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Every transport of this machine beside the bare limit of its path, two processes; Markdown on stdout."""
    from aiodisagg.bench.network import in_namespace
    from aiodisagg.bench.plot import plot_transport
    from aiodisagg.bench.transport import SECTIONS, TransportOptions, bench_transport, read_report
    from aiodisagg.bench.transport_tables import markdown

    if unknown := set(only) - set(SECTIONS):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}", param_hint="--only")
    if netns:
        again = [argument for argument in sys.argv[1:] if argument != "--netns"]
        raise SystemExit(measure(in_namespace("reno", (sys.executable, "-m", "aiodisagg", *again))))
    if read_file is not None:
        report = read_report(read_file)
    else:
        report = measure(bench_transport(TransportOptions(only or SECTIONS, runs, quick), say))
    write_json(json_file, report)
    if plot_file is not None:
        plot_transport(report, plot_file)
    click.echo(markdown(report))


for command in (
    bench_serve_command,
    bench_system_command,
    bench_reuse_command,
    bench_control_command,
    bench_times_command,
):
    bench.add_command(command)
