"""What ``bench serve`` found, as tables; outcomes as lines of JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from aiodisagg.bench.serve import Run, ServeReport
from aiodisagg.bench.serve_metrics import Outcome, Spread, Summary
from aiodisagg.bench.view import milliseconds, table

_PARTS = ("mean", "p50", "p90", "p99")


def _spread(spread: Spread | None, parts: Sequence[str] = _PARTS) -> list[str]:
    return [milliseconds(None if spread is None else getattr(spread, part)) for part in parts]


def serve_tables(report: ServeReport) -> Group:
    """Rates, latencies, groups, and counters if any were asked for."""
    tables = [_rates(report), _latencies(report), _groups(report)]
    if any(run.counters for run in report.runs):
        tables.append(_counters(report))
    return Group(*tables, *map(Text, _notes(report)))  # not markup: servers say anything


def _notes(report: ServeReport) -> list[str]:
    """What the tables leave out."""
    examples = {kind: said for run in reversed(report.runs) for kind, said in run.all.examples.items()}
    found = [f"{kind}, for example: {said}" for kind, said in sorted(examples.items())]
    if not report.unloaded:
        found.append("No goodput: no request was answered alone, so there is nothing to compare with (--probes).")
    if any(run.all.completed and not run.all.prompt_tokens for run in report.runs):
        found.append("The server counts no tokens: a word is taken for one in a prompt, and a piece in an answer.")
    blind = [name for name, alone in report.unloaded.items() if not alone.tpot_ms and _streams(report, name)]
    if blind:
        found.append(f"Goodput of {', '.join(blind)} is by TTFT only: no answer alone had a second token.")
    unknown = sorted({name for run in report.runs for name in run.groups} - set(report.unloaded))
    if unknown and report.unloaded:
        found.append(f"No goodput of {', '.join(unknown)}: no such request was answered alone.")
    return found


def _streams(report: ServeReport, group: str) -> bool:
    return any(group in run.groups and run.groups[group].tpot_ms is not None for run in report.runs)


def _rates(report: ServeReport) -> Table:
    multiples = [f"goodput {good.multiple:g}x" for good in report.runs[0].all.goodput]
    columns = ("load", "seed", "requests", "errors", "requests/s", "output tokens/s", *multiples, "client")
    rows = [
        (
            run.load, str(run.seed), str(run.all.requests), _errors(run.all), f"{run.all.requests_per_s:.2f}",
            f"{run.all.output_tokens_per_s:.1f}",
            *(f"{one.requests_per_s:.2f}/s, {100 * one.share:.0f} %" for one in run.all.goodput), _client(run),
        )
        for run in report.runs
    ]  # fmt: skip
    return table(f"{report.model}, {report.workload}, {len(report.urls)} replicas", columns, rows)


def _errors(summary: Summary) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in summary.errors.items()) or "0"


def _client(run: Run) -> str:
    client = run.client
    return f"{100 * client.cpu_share:.0f} % of a core, late {milliseconds(client.late_max_ms)} ms"


def _latencies(report: ServeReport) -> Table:
    names = ("TTFT", "ITL", "TPOT", "E2E")
    columns = [f"{name if part == 'mean' else ''}\n{part}" for name in names for part in _PARTS]
    rows = []
    for run in report.runs:
        one = run.all
        cells = [*_spread(one.ttft_ms), *_spread(one.itl_ms), *_spread(one.tpot_ms), *_spread(one.e2e_ms)]
        rows.append((run.load, f"{one.completed} of {one.requests}", *cells))
    title = "Milliseconds, of what was answered: errors and timeouts are in none"
    return table(title, ("load", "answered", *columns), rows)


def _groups(report: ServeReport) -> Table:
    rows = []
    for name in sorted({name for run in report.runs for name in run.groups}):
        alone = report.unloaded.get(name)
        said = f"{milliseconds(alone.ttft_ms)} + {milliseconds(alone.tpot_ms or None)}" if alone is not None else "-"
        for run in report.runs:
            if name in run.groups:
                one, parts = run.groups[name], ("mean", "p99")
                cells = [*_spread(one.ttft_ms, parts), *_spread(one.tpot_ms, parts)]
                rows.append((name, said, run.load, str(one.requests), *cells))
    columns = ("group", "alone", "load", "requests", "TTFT mean", "p99", "TPOT mean", "p99")
    return table("Groups of requests: TTFT and TPOT in milliseconds", columns, rows)


def _counters(report: ServeReport) -> Table:
    names = sorted({name for run in report.runs for name in run.counters})
    rows = [(name, *(f"{run.counters.get(name, 0.0):,.10g}" for run in report.runs)) for name in names]
    return table("What the servers counted", ("counter", *(run.load for run in report.runs)), rows, left=1)


class OutcomeLine(msgspec.Struct, frozen=True):
    """One request of a file of outcomes."""

    load: str
    seed: int
    outcome: Outcome


def append_outcomes(file: Path, run: Run, outcomes: Sequence[Outcome]) -> None:
    """Adds a run's requests, a line each."""
    with file.open("ab") as out:
        for outcome in outcomes:
            out.write(msgspec.json.encode(OutcomeLine(run.load, run.seed, outcome)) + b"\n")
