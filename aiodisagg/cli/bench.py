"""``aiodisagg bench``: measurements. Heavy imports wait for the command."""

from __future__ import annotations

from pathlib import Path

import click

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
