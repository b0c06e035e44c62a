"""``aiodisagg bench times``: service times of this machine, for the simulator."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from aiodisagg.cli.process import setup_logging
from aiodisagg.errors import AiodisaggError, ConfigError


@click.command("times")
@click.option("--model", type=click.Path(path_type=Path), help="A Qwen3-VL(-MoE) folder; a synthetic one if left out.")
@click.option("--size", type=click.Choice(["tiny", "115m"]), default="115m", help="Of the synthetic model.")
@click.option("--device", default="cpu", help="As torch names it.")
@click.option("--core", type=int, help="On a CPU: the one core that everything runs on; the first if left out.")
@click.option("--quick", is_flag=True, help="A tiny model, few runs: shows that it works.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True, help="Where to write them.")
def bench_times_command(
    model: Path | None, size: str, device: str, core: int | None, quick: bool, json_file: Path
) -> None:  # fmt: skip
    """Measure what tower and engine take on one core (or GPU); the file is what ``simulate --times`` reads."""
    setup_logging(0, "bench")
    mine = os.sched_getaffinity(0)
    try:
        if device == "cpu":
            chosen = min(mine) if core is None else core
            if chosen not in mine:
                raise ConfigError("core", f"{chosen} is none of {sorted(mine)}")
            os.sched_setaffinity(0, {chosen})
        with tempfile.TemporaryDirectory(prefix="aiodisagg-bench-") as folder:
            _measure(model, Path(folder), "tiny" if quick else size, device, quick, json_file)
    except AiodisaggError as error:
        raise click.ClickException(str(error)) from error
    finally:
        os.sched_setaffinity(0, mine)


def _measure(model: Path | None, folder: Path, size: str, device: str, quick: bool, json_file: Path) -> None:
    import msgspec
    import torch

    from aiodisagg.bench.times import TimesOptions, measure_times
    from aiodisagg.models.synthetic import build_synthetic
    from aiodisagg.simulate.times import Costs, ServiceTimes

    threads = torch.get_num_threads()
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        if model is None:
            model = build_synthetic(folder / size, size)
        options = TimesOptions(model=model, device=device, row_dtype="float32" if device == "cpu" else "bfloat16")
        found = measure_times(options.quick() if quick else options, lambda text: click.echo(text, err=True))
        times = msgspec.convert(msgspec.to_builtins(found), ServiceTimes)
        Costs(times)  # checks them
    finally:
        torch.set_num_threads(threads)
    json_file.write_bytes(msgspec.json.format(msgspec.json.encode(times), indent=1) + b"\n")
    click.echo(f"{times.source}\n{json_file}: tower {_row(times.tower)}; prefill {_row(times.prefill)}; "
               f"decode {_row(times.decode)}")  # fmt: skip


def _row(points: tuple[tuple[float, float], ...]) -> str:
    return ", ".join(f"{size:g}: {ms:.1f}" for size, ms in points) + " ms"
