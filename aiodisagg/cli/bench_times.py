"""``aiodisagg bench times``: service times of this machine, for the simulator."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from aiodisagg.cli.measuring import say, write_json
from aiodisagg.cli.process import NEW_FILE
from aiodisagg.errors import AiodisaggError, ConfigError


@click.command("times")
@click.option("--model", type=click.Path(path_type=Path), help="A Qwen3-VL(-MoE) folder; a synthetic one if left out.")
@click.option("--size", type=click.Choice(["tiny", "115m"]), default="115m", help="Of the synthetic model.")
@click.option("--device", default="cpu", help="As torch names it.")
@click.option("--core", type=int, help="On a CPU: the one core that everything runs on; the first if left out.")
@click.option(
    "--beside", type=int, multiple=True, help="On a CPU: a core that does the same meanwhile, as in a busy system."
)
@click.option("--quick", is_flag=True, help="A tiny model, few runs: shows that it works.")
@click.option("--json", "json_file", type=NEW_FILE, required=True, help="Where to write them.")
@click.option("--again", is_flag=True, hidden=True, help="What --beside starts: measures until its parent ends.")
def bench_times_command(
    model: Path | None, size: str, device: str, core: int | None, beside: tuple[int, ...], quick: bool, json_file: Path,
    again: bool,
) -> None:  # fmt: skip
    """Measure what tower and engine take on one core (or GPU); the file is what ``simulate --times`` reads."""
    mine = os.sched_getaffinity(0)
    try:
        if device == "cpu":
            chosen = min(mine - set(beside), default=min(mine)) if core is None else core
            for name, one in [("core", chosen), *(("beside", one) for one in beside)]:
                if one not in mine and not again:  # its parent has moved to a core, and asked before that
                    raise ConfigError(name, f"{one} is none of {sorted(mine)}")
            if chosen in beside:
                raise ConfigError("beside", f"core {chosen} is the one that is measured")
            os.sched_setaffinity(0, {chosen})
        elif beside:
            raise ConfigError("beside", "is for CPUs")
        with tempfile.TemporaryDirectory(prefix="aiodisagg-bench-") as folder:
            _measure(model, Path(folder), "tiny" if quick else size, device, beside, quick, json_file, again)
    finally:
        os.sched_setaffinity(0, mine)


def _measure(
    model: Path | None, folder: Path, size: str, device: str, beside: tuple[int, ...], quick: bool, json_file: Path,
    again: bool,
) -> None:  # fmt: skip
    import torch

    from aiodisagg.bench.times import TimesOptions, measure_times
    from aiodisagg.models.synthetic import build_synthetic
    from aiodisagg.simulate.times import Costs

    threads = torch.get_num_threads()
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        if model is None:
            model = build_synthetic(folder / size, size)
        row_dtype = "float32" if device == "cpu" else "bfloat16"
        options = TimesOptions(model=model, device=device, row_dtype=row_dtype, busy=len(beside))
        if again:
            parent = os.getppid()
            measure_times(options.quick())
            click.echo("warm")
            while os.getppid() == parent:
                measure_times(options)
            return
        with _busy(beside, model):
            times = measure_times(options.quick() if quick else options, say)
        Costs(times)  # checks them
    finally:
        torch.set_num_threads(threads)
    write_json(json_file, times)
    click.echo(f"{times.source}\n{json_file}: tower {_row(times.tower)}; prefill {_row(times.prefill)}; "
               f"decode {_row(times.decode)}")  # fmt: skip


@contextlib.contextmanager
def _busy(cores: tuple[int, ...], model: Path) -> Iterator[None]:
    """Processes on other cores that measure the same, over and over, from when they are warm."""
    again = ("times", "--again", "--model", str(model), "--json", os.devnull)
    command = [sys.executable, "-m", "aiodisagg", "bench", *again]
    with contextlib.ExitStack() as stack:
        children = []
        for core in cores:
            child = stack.enter_context(subprocess.Popen([*command, "--core", str(core)], stdout=subprocess.PIPE))
            stack.callback(child.kill)
            children.append(child)
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()  # nothing from one that ended
        yield
        if any(child.poll() is not None for child in children):
            raise AiodisaggError("a process on another core has ended: it did not keep that core busy")


def _row(points: tuple[tuple[float, float], ...]) -> str:
    return ", ".join(f"{size:g}: {ms:.1f}" for size, ms in points) + " ms"
