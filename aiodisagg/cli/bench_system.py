"""``aiodisagg bench system``, ``bench reuse`` and ``bench control``: this package against itself, on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from aiodisagg.cli.measuring import (
    INTEGERS,
    NAMES,
    NUMBERS,
    measure,
    plot_option,
    progress,
    say,
    show,
    write_json,
)
from aiodisagg.cli.process import NEW_FILE
from aiodisagg.errors import ConfigError


@click.command("system")
@click.option("--model", default="", help="A Qwen3-VL(-MoE) folder; a synthetic one if left out.")
@click.option("--size", type=click.Choice(["tiny", "115m"]), default="115m", help="Of the synthetic model.")
@click.option(
    "--shapes",
    default="dp2-inline,dp2,1+1-waits,1+1,2both",
    callback=NAMES,
    help="The first is the unit of load; the last is judged by the best.",
)
@click.option("--mixes", default="images-1-8,servegen", callback=NAMES, help="As bench serve --mix.")
@click.option("--full-mixes", is_flag=True, help="Pictures and texts of full size; on CPU cores they are scaled down.")
@click.option("--loads", default="0.2,0.5,0.7,0.85", callback=NUMBERS, help="Shares of what the first shape can do.")
@click.option(
    "--capacity", callback=NUMBERS, help="Requests per second of the first shape for each mix, if known: 1.5,2."
)
@click.option("--seeds", default="0,1,2", callback=INTEGERS, help="Each run is repeated with each of them.")
@click.option("--requests", default=60, help="Of each run.")
@click.option("--concurrency", default=16, help="At which the capacity is measured.")
@click.option("--cv", default=1.0, help="Burstiness of arrivals: 1 is Poisson.")
@click.option("--on", type=click.Choice(["cores", "gpus"]), default="cores", help="What each place of a shape is.")
@click.option("--places", default="0,1", callback=INTEGERS, help="Numbers of the cores or GPUs.")
@click.option("--encode-options", default="", help="More options of encode peers, with spaces.")
@click.option("--language-options", default="", help="More options of language peers, with spaces.")
@click.option("--quick", is_flag=True, help="A tiny model, first and last shape, one load: shows that it works.")
@click.option("-v", "--verbose", count=True, help="Show the logs of the processes.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write everything as JSON.")
@plot_option
def bench_system_command(
    model: str, mixes: tuple[str, ...], full_mixes: bool, capacity: tuple[float, ...] | None, on: Any,
    places: tuple[int, ...], encode_options: str, language_options: str, quick: bool, verbose: int,
    json_file: Path | None, plot_file: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Compare shapes of a system on equal hardware: replicas, a split that waits, one that overlaps, flexible peers."""
    from aiodisagg.bench.compare import CompareOptions, bench_compare
    from aiodisagg.bench.compare_view import best_table, compare_table, plot_compare
    from aiodisagg.bench.shapes import Setting

    if capacity and len(capacity) != len(mixes):
        raise ConfigError("capacity", f"{len(mixes)} mixes need as many, not {len(capacity)}")
    setting = Setting(
        model=model, on=on, places=places, encode_options=tuple(encode_options.split()),
        language_options=tuple(language_options.split()), verbose=verbose,
    )  # fmt: skip
    given = CompareOptions(
        setting=setting, mixes=mixes, small=on == "cores" and not full_mixes,
        capacity=dict(zip(mixes, capacity or (), strict=False)), **options,
    )  # fmt: skip
    if quick:
        two = tuple(dict.fromkeys((given.shapes[0], given.shapes[-1])))
        given = replace(
            given, size="tiny", shapes=two, mixes=mixes[:1], loads=(0.5,), seeds=(0,), requests=12, warmup=1, probes=1,
            concurrency=4,
        )  # fmt: skip
    with progress() as tell:
        report = measure(bench_compare(given, tell))
    show(compare_table(report))
    if len(report.shapes) > 1:
        show(best_table(report))
    write_json(json_file, report)
    if plot_file is not None:
        plot_compare(report, plot_file)


@click.command("control")
@click.option("--peers", default="2,4,8,16,32,64", callback=INTEGERS, help="Encode peers; one measurement each.")
@click.option("--requests", default=10_000, help="Of each measurement.")
@click.option("--concurrency", default=64, help="Requests at a time when throughput is measured.")
@click.option("--rows", default=4, help="Rows of an item; each has 128 bytes.")
@click.option("--transport", default="ipc")
@click.option("--cores", default="0,1", callback=INTEGERS, help="Of the receiver and of all encode peers.")
@click.option("--quick", is_flag=True, help="A few requests to two and four peers.")
@click.option("-v", "--verbose", count=True, help="Show the logs of the encode peers.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write everything as JSON.")
def bench_control_command(cores: tuple[int, ...], quick: bool, json_file: Path | None, **options: Any) -> None:
    """What scheduling, protocol and ipc cost: requests per second and latency with a model that does nothing."""
    if len(cores) != 2:
        raise ConfigError("cores", f"two are needed, not {','.join(map(str, cores))!r}")
    from aiodisagg.bench.control import ControlOptions, bench_control  # after the checks: torch takes seconds
    from aiodisagg.bench.tables import control_table

    if quick:
        options |= {"peers": (2, 4), "requests": 500}
    report = measure(bench_control(ControlOptions(cores=cores, **options), say))
    show(control_table(report))
    if report.growth:
        click.echo(report.growth)
    write_json(json_file, report)


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
@click.option("--places", default="0,1", callback=INTEGERS, help="Numbers of the cores or GPUs.")
@click.option("--quick", is_flag=True, help="A tiny model, one round, few requests: shows that it works.")
@click.option("-v", "--verbose", count=True, help="Show the logs of the processes.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write everything as JSON.")
def bench_reuse_command(
    model: str, on: Any, places: tuple[int, ...], quick: bool, verbose: int, json_file: Path | None, **options: Any
) -> None:  # fmt: skip
    """What the caches are worth when pictures come again, and that none is encoded twice while it is held."""
    from aiodisagg.bench.reuse import ReuseOptions, bench_reuse
    from aiodisagg.bench.shapes import Setting
    from aiodisagg.bench.tables import reuse_table

    given = ReuseOptions(setting=Setting(model=model, on=on, places=places, verbose=verbose), **options)
    if quick:
        given = replace(given, size="tiny", requests=60, concurrency=8, rounds=1, pool=8, scale=1 / 36)
    with progress() as tell:
        report = measure(bench_reuse(given, tell))
    show(reuse_table(report), 180)
    click.echo(f"caches: {report.throughput_gain:.2f} times the requests a second")
    write_json(json_file, report)
