"""Plots of ``bench resume`` and ``bench transport``."""

from __future__ import annotations

from pathlib import Path

from aiodisagg.bench.resume import INTERRUPTED, ResumeReport
from aiodisagg.bench.transport import CONCURRENT, TransportReport
from aiodisagg.bench.view import drawn


def plot_resume(report: ResumeReport, file: Path) -> None:
    """Writes a PNG: transfer times with interruptions beside undisturbed ones, and times over sizes."""
    many = report.resumed[: 3 * len(INTERRUPTED)]
    sizes = report.resumed[3 * len(INTERRUPTED) :]
    with drawn(file, 1, 2, figsize=(11, 4.2)) as (figure, (left, right)):
        names = sorted({one.rows for one in many})
        cuts = sorted({one.interruptions for one in many})
        for place, n in enumerate((0, *cuts)):
            values = [
                next(one for one in many if one.rows == rows and one.interruptions == (n or cuts[0])) for rows in names
            ]
            times = [one.seconds if n else one.undisturbed_s for one in values]
            at = [i + 0.2 * (place - 1.5) for i in range(len(names))]
            left.bar(at, times, width=0.19, label=f"{n} cuts" if n else "undisturbed", color=f"C{place}")
        left.set_xticks(range(len(names)), [f"{rows:,}" for rows in names])
        left.set(xlabel=f"rows of {report.row_bytes // 1024} KiB", ylabel="seconds", title="Interrupted transfers")
        left.legend()
        x = [one.rows for one in sizes]
        right.plot(x, [one.undisturbed_s for one in sizes], "o-", label="undisturbed")
        right.plot(x, [one.seconds for one in sizes], "s--", label="one cut")
        right.plot(x, [one.bare_copy_s for one in sizes], ":", label="bare copy, one thread")
        right.set(xscale="log", yscale="log", xlabel="rows", ylabel="seconds", title="Transfer time by size")
        right.set_xticks(x, [f"{rows / 1024:g}K" if rows >= 1024 else str(rows) for rows in x])
        right.minorticks_off()
        right.legend()
        figure.suptitle(f"{report.transport}, medians of {report.repeats}")


def plot_transport(report: TransportReport, file: Path) -> None:
    """Writes a PNG: rates of every path and its limit over sizes, one and eight transfers at once."""
    with drawn(file, 1, len(CONCURRENT), figsize=(12, 4.6), sharey=True) as (figure, panels):
        for panel, concurrent in zip(panels, CONCURRENT, strict=True):
            for number, name in enumerate(dict.fromkeys(one.path for one in report.moved)):
                ones = [one for one in report.moved if (one.path, one.concurrent) == (name, concurrent)]
                x = [one.size_bytes / 2**20 for one in ones]
                panel.plot(x, [one.gib_s for one in ones], "o-", color=f"C{number}", label=name)
                panel.plot(x, [one.limit_gib_s for one in ones], ":", color=f"C{number}", label=ones[0].limit)
            panel.set(xscale="log", yscale="log", xlabel="MiB", ylabel="GiB/s", title=f"{concurrent} at once")
            panel.grid(alpha=0.3)
        panels[-1].legend(fontsize=8)
        figure.suptitle(report.machine, fontsize=9)
