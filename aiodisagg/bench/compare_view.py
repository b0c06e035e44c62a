"""What ``bench system`` found, as a table and as a plot."""

from __future__ import annotations

from math import nan
from pathlib import Path

from rich.table import Table

from aiodisagg.bench.compare import Cell, CompareReport
from aiodisagg.bench.serve_metrics import Spread
from aiodisagg.bench.view import drawn, milliseconds, table


def compare_table(report: CompareReport) -> Table:
    """A line for each shape under each mix and load; times beside those of the first shape."""
    capacity = ", ".join(f"{mix} {rate:.2f} requests/s" for mix, rate in report.capacity.items())
    columns = ("mix", "load", "shape", "TTFT mean", "", "seeds", "TTFT p99", "", "ITL p99", "", "requests/s")
    good = (f"good {good.multiple:g}x" for good in report.cells[0].all.goodput)
    found = table(f"{report.model} on {report.places}; load 1.0 is {capacity}", (*columns, *good, "errors"))
    for mix in dict.fromkeys(cell.mix for cell in report.cells):
        for load in dict.fromkeys(cell.load for cell in report.cells if cell.mix == mix):
            first = report.cell(report.shapes[0], mix, load)
            for shape in report.shapes:
                found.add_row(*_row(report.cell(shape, mix, load), first), end_section=shape == report.shapes[-1])
    return found


def _row(cell: Cell, first: Cell) -> list[str]:
    one, base = cell.all, first.all
    seeds = [milliseconds(value) for value in sorted(cell.ttft_ms_of_seeds)]
    return [
        cell.mix,
        f"{cell.load:g}",
        cell.shape,
        *_beside(one.ttft_ms, base.ttft_ms, "mean"),
        f"{seeds[0]}-{seeds[-1]}" if seeds else "-",
        *_beside(one.ttft_ms, base.ttft_ms, "p99"),
        *_beside(one.itl_ms, base.itl_ms, "p99"),
        f"{one.requests_per_s:.2f}",
        *(f"{100 * good.share:.0f} %" for good in one.goodput),
        str(one.requests - one.completed),
    ]


def _beside(spread: Spread | None, base: Spread | None, part: str) -> tuple[str, str]:
    if spread is None:
        return "-", "-"
    value = float(getattr(spread, part))
    return milliseconds(value), "-" if base is None else f"x{value / getattr(base, part):.2f}"


_TIMES = (("ttft_ms", "mean", "TTFT mean"), ("ttft_ms", "p99", "TTFT p99"), ("itl_ms", "p99", "ITL p99"))


def best_table(report: CompareReport) -> Table:
    """The last shape against the best of the others in each cell: times and requests a second as ratios."""
    last, others = report.shapes[-1], report.shapes[:-1]
    rows = []
    for own in (cell for cell in report.cells if cell.shape == last):
        rivals = [report.cell(shape, own.mix, own.load) for shape in others]
        ratios = []
        for name, part, _ in _TIMES:
            mine = _value(own, name, part)
            best = min((value for one in rivals if (value := _value(one, name, part)) is not None), default=None)
            ratios.append("-" if mine is None or best is None else f"x{mine / best:.2f}")
        most = max((one.all.requests_per_s for one in rivals), default=0.0)
        ratios.append(f"x{own.all.requests_per_s / most:.2f}" if most else "-")
        rows.append((own.mix, f"{own.load:g}", *ratios))
    columns = ("mix", "load", *(title for *_, title in _TIMES), "requests/s")
    return table(f"{last} against the best of {', '.join(others)}", columns, rows)


def _value(cell: Cell, name: str, part: str) -> float | None:
    spread: Spread | None = getattr(cell.all, name)
    return None if spread is None else float(getattr(spread, part))


def plot_compare(report: CompareReport, file: Path) -> None:
    """Writes a PNG: for each mix the mean and p99 TTFT and the p99 ITL of every shape over the load."""
    mixes = list(dict.fromkeys(cell.mix for cell in report.cells))
    across = len(_TIMES)
    with drawn(file, len(mixes), across, figsize=(12, 3.8 * len(mixes)), squeeze=False) as (figure, axes):
        for mix, line in zip(mixes, axes, strict=True):
            for (name, part, title), axis in zip(_TIMES, line, strict=True):
                for shape in report.shapes:
                    cells = [cell for cell in report.cells if (cell.shape, cell.mix) == (shape, mix)]
                    values = [nan if (one := _value(cell, name, part)) is None else one for cell in cells]
                    axis.plot([cell.load for cell in cells], values, "o-", label=shape)
                axis.set(title=f"{mix}: {title}, ms", xlabel=f"load, of {report.shapes[0]}'s capacity", ylim=(0, None))
                axis.legend()
        figure.suptitle(f"{report.model} on {report.places}")
