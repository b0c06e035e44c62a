"""``aiodisagg bench times``: service times of this machine, for the simulator."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aiodisagg.cli.process import setup_logging
from aiodisagg.errors import AiodisaggError, ConfigError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from aiodisagg.bench.times import TimesOptions


@click.command("times")
@click.option("--model", type=click.Path(path_type=Path), help="A Qwen3-VL(-MoE) folder; a synthetic one if left out.")
@click.option("--size", type=click.Choice(["tiny", "115m"]), default="115m", help="Of the synthetic model.")
@click.option("--device", default="cpu", help="As torch names it.")
@click.option("--core", type=int, help="On a CPU: the one core that everything runs on; the first if left out.")
@click.option(
    "--beside", type=int, multiple=True, help="On a CPU: a core that does the same meanwhile, as in a busy system."
)
@click.option("--quick", is_flag=True, help="A tiny model, few runs: shows that it works.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True, help="Where to write them.")
def bench_times_command(
    model: Path | None, size: str, device: str, core: int | None, beside: tuple[int, ...], quick: bool, json_file: Path
) -> None:  # fmt: skip
    """Measure what tower and engine take on one core (or GPU); the file is what ``simulate --times`` reads."""
    setup_logging(0, "bench")
    mine = os.sched_getaffinity(0)
    try:
        if device == "cpu":
            chosen = min(mine - set(beside), default=min(mine)) if core is None else core
            for name, one in [("core", chosen), *(("beside", one) for one in beside)]:
                if one not in mine:
                    raise ConfigError(name, f"{one} is none of {sorted(mine)}")
            if chosen in beside:
                raise ConfigError("beside", f"core {chosen} is the one that is measured")
            os.sched_setaffinity(0, {chosen})
        elif beside:
            raise ConfigError("beside", "is for CPUs")
        with tempfile.TemporaryDirectory(prefix="aiodisagg-bench-") as folder:
            _measure(model, Path(folder), "tiny" if quick else size, device, beside, quick, json_file)
    except AiodisaggError as error:
        raise click.ClickException(str(error)) from error
    finally:
        os.sched_setaffinity(0, mine)


def _measure(
    model: Path | None, folder: Path, size: str, device: str, beside: tuple[int, ...], quick: bool, json_file: Path
) -> None:
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
        options = TimesOptions(
            model=model, device=device, row_dtype="float32" if device == "cpu" else "bfloat16", busy=len(beside)
        )
        options = options.quick() if quick else options
        with _busy(beside, options):
            found = measure_times(options, lambda text: click.echo(text, err=True))
        times = msgspec.convert(msgspec.to_builtins(found), ServiceTimes)
        Costs(times)  # checks them
    finally:
        torch.set_num_threads(threads)
    json_file.write_bytes(msgspec.json.format(msgspec.json.encode(times), indent=1) + b"\n")
    click.echo(f"{times.source}\n{json_file}: tower {_row(times.tower)}; prefill {_row(times.prefill)}; "
               f"decode {_row(times.decode)}")  # fmt: skip


@contextlib.contextmanager
def _busy(cores: tuple[int, ...], options: TimesOptions) -> Iterator[None]:
    """Processes on other cores that measure the same, over and over; begun when each of them has measured something."""
    context = multiprocessing.get_context("spawn")
    children = []
    try:
        for core in cores:
            ours, theirs = context.Pipe(duplex=False)
            children.append(context.Process(target=_again, args=(core, options, os.getpid(), theirs), daemon=True))
            children[-1].start()
            theirs.close()
            with ours, contextlib.suppress(EOFError):  # of one that ended at once
                ours.recv_bytes()
        yield
        if not all(child.is_alive() for child in children):
            raise AiodisaggError("a process on another core has ended: it did not keep that core busy")
    finally:
        for child in children:
            child.kill()
            child.join()


def _again(core: int, options: TimesOptions, parent: int, started: Connection) -> None:
    import torch

    from aiodisagg.bench.times import measure_times

    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    while os.getppid() == parent:
        measure_times(options, lambda _: _tell(started))


def _tell(started: Connection) -> None:
    if not started.closed:
        started.send_bytes(b"measured")
        started.close()


def _row(points: tuple[tuple[float, float], ...]) -> str:
    return ", ".join(f"{size:g}: {ms:.1f}" for size, ms in points) + " ms"
