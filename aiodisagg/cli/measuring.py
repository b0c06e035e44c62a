"""What the measuring commands have in common: lists as options, how far they are, tables, reports."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from aiodisagg.cli.process import NEW_FILE
from aiodisagg.errors import ConfigError

T = TypeVar("T")


def _listed(kind: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Of an option like ``1,2,4``: its value is a tuple, which may be empty, or None if it is not given."""

    def convert(context: click.Context, param: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        try:
            return None if value is None else tuple(kind(part.strip()) for part in value.split(",") if part.strip())
        except ValueError as error:
            raise ConfigError(param.opts[0].removeprefix("--"), f"{value!r} is no list of numbers") from error

    return convert


INTEGERS, NUMBERS, NAMES = _listed(int), _listed(float), _listed(str)
"""Callbacks of such options."""


def _check_plot(context: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Before anything is measured or simulated."""
    if value is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ConfigError("plot", 'needs matplotlib: the extra "bench" of aiodisagg is not installed') from error
    return value


plot_option = click.option(
    "--plot", "plot_file", type=NEW_FILE, callback=_check_plot, help="Write a PNG; needs the extra bench."
)


def measure(work: Coroutine[Any, Any, T]) -> T:
    """Runs it in a loop of its own."""
    import uvloop

    return uvloop.run(work)


def say(text: str) -> None:
    """How far it is, on stderr."""
    click.echo(text, err=True)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each thing that is said to be under way; where nobody looks, a line for each that is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, done, total: say(f"{what}: {total}") if done == total else None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=4) as bars:
        current: list[tuple[str, Any]] = []

        def tell(what: str, done: int, total: int) -> None:
            if not current or current[0][0] != what:
                for _, task in current:
                    bars.remove_task(task)
                current[:] = [(what, bars.add_task(what, total=total))]
            bars.update(current[0][1], completed=done, total=total)

        yield tell


def show(table: Any, width: int = 160) -> None:
    """``width``: where it is not a terminal's."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else width).print(table)


def write_json(file: Path | None, report: Any) -> None:
    """If it was asked for."""
    import msgspec

    if file is not None:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
