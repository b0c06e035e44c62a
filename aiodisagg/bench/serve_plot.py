"""Plots of ``bench serve``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aiodisagg.bench.serve import Run, ServeReport
from aiodisagg.bench.serve_metrics import Spread, Summary
from aiodisagg.bench.view import drawn

Of = Callable[[Summary], "Spread | None"]


def plot_serve(report: ServeReport, file: Path) -> None:
    """Writes a PNG: time to first token, gaps between tokens, whole answers and throughput over the load.

    Seeds of a load are drawn as points, their means as lines.
    """
    loads = list(dict.fromkeys(run.load for run in report.runs))
    spreads: tuple[tuple[str, Of], ...] = (
        ("time to first token, ms", lambda one: one.ttft_ms),
        ("gaps between pieces of text, ms", lambda one: one.itl_ms),
        ("whole answers, ms", lambda one: one.e2e_ms),
    )
    with drawn(file, 2, 2, figsize=(11, 7.5)) as (figure, axes):
        for axis, (title, of) in zip(axes.flat, spreads, strict=False):
            for number, part in enumerate(("mean", "p50", "p90", "p99")):
                _line(axis, report.runs, loads, part, f"C{number}", partial(_part, of, part))
            axis.set_title(title)
        last = axes.flat[3]
        _line(last, report.runs, loads, "completed", "C0", lambda run: run.all.requests_per_s)
        for number, good in enumerate(report.runs[0].all.goodput):
            name = f"within {good.multiple:g}x of unloaded"
            _line(last, report.runs, loads, name, f"C{number + 1}", partial(_good, number))
        last.set_title("requests per second")
        for axis in axes.flat:
            axis.set_xticks(range(len(loads)), loads, rotation=20 if len(loads) > 5 else 0)
            axis.set(xlim=(-0.3, len(loads) - 0.7), ylim=(0, None))
            axis.legend()
        figure.suptitle(f"{report.model}, {report.workload}, {len(report.urls)} replicas")


def _part(of: Of, part: str, run: Run) -> float:
    spread = of(run.all)
    return float("nan") if spread is None else float(getattr(spread, part))


def _good(number: int, run: Run) -> float:
    return run.all.goodput[number].requests_per_s


def _line(
    axis: Any, runs: Sequence[Run], loads: Sequence[str], name: str, colour: str, value: Callable[[Run], float]
) -> None:  # fmt: skip
    found = [[value(run) for run in runs if run.load == load] for load in loads]
    axis.plot(range(len(loads)), [sum(values) / len(values) for values in found], "-", color=colour, label=name)
    points = [(place, one) for place, values in enumerate(found) for one in values]
    axis.plot(*zip(*points, strict=True), ".", color=colour)
