"""``aiodisagg bench system``, ``bench reuse`` and ``bench control``: this package against itself, on this machine."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from aiodisagg.cli.bench_serve import numbers, progress
from aiodisagg.cli.process import NEW_FILE, check_plot, setup_logging
from aiodisagg.errors import AiodisaggError, ConfigError


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


@click.command("system")
@click.option("--model", default="", help="A Qwen3-VL(-MoE) folder; a synthetic one if left out.")
@click.option("--size", type=click.Choice(["tiny", "115m"]), default="115m", help="Of the synthetic model.")
@click.option(
    "--shapes",
    default="dp2-inline,dp2,1+1-waits,1+1,2both",
    help="The first is the unit of load; the last is judged by the best.",
)
@click.option("--mixes", default="images-1-8,servegen", help="As bench serve --mix.")
@click.option("--full-mixes", is_flag=True, help="Pictures and texts of full size; on CPU cores they are scaled down.")
@click.option("--loads", default="0.2,0.5,0.7,0.85", help="Shares of what the first shape can do.")
@click.option("--capacity", help="Requests per second of the first shape for each mix, if known: 1.5,2.")
@click.option("--seeds", default="0,1,2", help="Each run is repeated with each of them.")
@click.option("--requests", default=60, help="Of each run.")
@click.option("--concurrency", default=16, help="At which the capacity is measured.")
@click.option("--cv", default=1.0, help="Burstiness of arrivals: 1 is Poisson.")
@click.option("--on", type=click.Choice(["cores", "gpus"]), default="cores", help="What each place of a shape is.")
@click.option("--places", default="0,1", help="Numbers of the cores or GPUs.")
@click.option("--encode-options", default="", help="More options of encode peers, with spaces.")
@click.option("--language-options", default="", help="More options of language peers, with spaces.")
@click.option("--quick", is_flag=True, help="A tiny model, first and last shape, one load: shows that it works.")
@click.option("-v", "--verbose", count=True, help="Show the logs of the processes.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write everything as JSON.")
@click.option("--plot", "plot_file", type=NEW_FILE, help="Write a PNG; needs the extra bench.")
def bench_system_command(**options: Any) -> None:
    """Compare shapes of a system on equal hardware: replicas, a split that waits, one that overlaps, flexible peers."""
    setup_logging(0, "bench")
    try:
        _system(**options)
    except AiodisaggError as error:
        raise click.ClickException(str(error)) from error


def _system(
    *, model: str, size: str, shapes: str, mixes: str, full_mixes: bool, loads: str, capacity: str | None, seeds: str,
    requests: int, concurrency: int, cv: float, on: Any, places: str, encode_options: str, language_options: str,
    quick: bool, verbose: int, json_file: Path | None, plot_file: Path | None,
) -> None:  # fmt: skip
    import msgspec
    import uvloop
    from rich.console import Console

    from aiodisagg.bench.compare import CompareOptions, bench_compare
    from aiodisagg.bench.compare_view import best_table, compare_table, plot_compare
    from aiodisagg.bench.shapes import Setting

    check_plot(plot_file)
    names, known = _names(mixes), numbers("capacity", capacity, float)
    if known and len(known) != len(names):
        raise ConfigError("capacity", f"{len(names)} mixes need as many, not {len(known)}")
    setting = Setting(
        model=model, on=on, places=numbers("places", places, int), encode_options=tuple(encode_options.split()),
        language_options=tuple(language_options.split()), verbose=verbose,
    )  # fmt: skip
    given = CompareOptions(
        setting=setting, size=size, shapes=_names(shapes), mixes=names, small=on == "cores" and not full_mixes,
        loads=numbers("loads", loads, float), seeds=numbers("seeds", seeds, int), requests=requests, cv=cv,
        concurrency=concurrency, capacity=dict(zip(names, known, strict=False)),
    )  # fmt: skip
    if quick:
        two = tuple(dict.fromkeys((given.shapes[0], given.shapes[-1])))
        given = replace(
            given, size="tiny", shapes=two, mixes=names[:1], loads=(0.5,), seeds=(0,), requests=12, warmup=1, probes=1,
            concurrency=4,
        )  # fmt: skip
    with progress() as say:
        report = uvloop.run(bench_compare(given, say))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(compare_table(report))
    if len(report.shapes) > 1:
        console.print(best_table(report))
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if plot_file is not None:
        plot_compare(report, plot_file)


@click.command("control")
@click.option("--peers", default="2,4,8,16,32,64", help="Encode peers; one measurement each.")
@click.option("--requests", default=10_000, help="Of each measurement.")
@click.option("--concurrency", default=64, help="Requests at a time when throughput is measured.")
@click.option("--rows", default=4, help="Rows of an item; each has 128 bytes.")
@click.option("--transport", default="ipc")
@click.option("--cores", default="0,1", help="Of the receiver and of all encode peers.")
@click.option("--quick", is_flag=True, help="A few requests to two and four peers.")
@click.option("-v", "--verbose", count=True, help="Show the logs of the encode peers.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write everything as JSON.")
def bench_control_command(
    peers: str, requests: int, concurrency: int, rows: int, transport: str, cores: str, quick: bool, verbose: int,
    json_file: Path | None,
) -> None:  # fmt: skip
    """What scheduling, protocol and ipc cost: requests per second and latency with a model that does nothing."""
    import msgspec
    import uvloop
    from rich.console import Console

    setup_logging(0, "bench")
    try:
        two = numbers("cores", cores, int)
        if len(two) != 2:
            raise ConfigError("cores", f"two are needed, not {cores!r}")
        from aiodisagg.bench.control import ControlOptions, bench_control  # after the checks: torch takes seconds
        from aiodisagg.bench.tables import control_table

        options = ControlOptions(
            peers=(2, 4) if quick else numbers("peers", peers, int), requests=500 if quick else requests,
            concurrency=concurrency, rows=rows, transport=transport, cores=two, verbose=verbose,
        )  # fmt: skip
        report = uvloop.run(bench_control(options, lambda text: click.echo(text, err=True)))
    except AiodisaggError as error:
        raise click.ClickException(str(error)) from error
    Console(width=None if sys.stdout.isatty() else 160).print(control_table(report))
    if report.growth:
        click.echo(report.growth)
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


@click.command("reuse")
@click.option("--model", default="", help="A Qwen3-VL(-MoE) folder; a synthetic one if left out.")
@click.option("--size", type=click.Choice(["tiny", "115m"]), default="115m", help="Of the synthetic model.")
@click.option("--requests", default=1000, help="Of each run.")
@click.option("--concurrency", default=64, help="Requests at a time.")
@click.option("--rounds", default=3, type=click.IntRange(min=1), help="Both ways once in each.")
@click.option("--pool", default=200, help="Pictures that come again.")
@click.option("--reuse", default=0.8, help="How many of the pictures are from the pool.")
@click.option("--scale", default=1 / 9, help="Sizes of pictures, texts and answers, as a share of the mix's.")
@click.option("--on", type=click.Choice(["cores", "gpus"]), default="cores", help="What each of the two peers has.")
@click.option("--places", default="0,1", help="Numbers of the cores or GPUs.")
@click.option("--quick", is_flag=True, help="A tiny model, one round, few requests: shows that it works.")
@click.option("-v", "--verbose", count=True, help="Show the logs of the processes.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write everything as JSON.")
def bench_reuse_command(
    model: str, size: str, requests: int, concurrency: int, rounds: int, pool: int, reuse: float, scale: float, on: Any,
    places: str, quick: bool, verbose: int, json_file: Path | None,
) -> None:  # fmt: skip
    """What the caches are worth when pictures come again, and that none is encoded twice while it is held."""
    import msgspec
    import uvloop
    from rich.console import Console

    setup_logging(0, "bench")
    try:
        from aiodisagg.bench.reuse import ReuseOptions, bench_reuse
        from aiodisagg.bench.shapes import Setting
        from aiodisagg.bench.tables import reuse_table

        setting = Setting(model=model, on=on, places=numbers("places", places, int), verbose=verbose)
        options = ReuseOptions(
            setting=setting, size=size, requests=requests, concurrency=concurrency, rounds=rounds, pool=pool,
            reuse=reuse, scale=scale,
        )  # fmt: skip
        if quick:
            options = replace(options, size="tiny", requests=60, concurrency=8, rounds=1, pool=8, scale=1 / 36)
        with progress() as say:
            report = uvloop.run(bench_reuse(options, say))
    except AiodisaggError as error:
        raise click.ClickException(str(error)) from error
    Console(width=None if sys.stdout.isatty() else 180).print(reuse_table(report))
    click.echo(f"caches: {report.throughput_gain:.2f} times the requests a second")
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
