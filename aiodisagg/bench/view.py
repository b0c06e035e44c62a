"""How numbers are shown: tables for a terminal and for documents, and plots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table


def size(value: float | None) -> str:
    """Bytes for people."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def milliseconds(value: float | None) -> str:
    """As many digits as are worth reading."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def table(title: str, columns: Iterable[str], rows: Iterable[Sequence[str]] = (), *, left: int = 0) -> Table:
    """For a terminal; flush right but for the ``left`` first columns."""
    found = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        found.add_column(column, justify="right" if number >= left else "left")
    for row in rows:
        found.add_row(*row)
    return found


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """For a document."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@contextmanager
def drawn(file: Path, rows: int = 1, columns: int = 1, **how: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes as of ``pyplot.subplots``, written as a PNG. Needs matplotlib (the extra ``bench``)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, layout="constrained", **how)
    yield figure, axes
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
