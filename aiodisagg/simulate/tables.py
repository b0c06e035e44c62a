"""What simulations say, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from aiodisagg.bench.view import markdown, table
from aiodisagg.simulate.compare import Compared
from aiodisagg.simulate.plan import Answer, Plan
from aiodisagg.simulate.record import Report, Spread
from aiodisagg.simulate.studies import Rung


def run_table(title: str, reports: Sequence[Report]) -> Table:
    """Milliseconds. Refused are those that fit into no device."""
    columns = (
        "system", "req/s", "TTFT mean", "p50", "p90", "p99", "text p99", "ITL p99", "TPOT mean", "within SLO",
        "goodput", "shed", "refused", "busy",
    )  # fmt: skip
    rows = [
        (
            one.system, _rate(one.rate_per_s, one),
            *(_ms(one.ttft, value) for value in (one.ttft.mean, one.ttft.p50, one.ttft.p90, one.ttft.p99)),
            _ms(one.ttft_text, one.ttft_text.p99), _ms(one.itl, one.itl.p99, 1), _ms(one.tpot, one.tpot.mean, 1),
            f"{one.attained:.1%}", _rate(one.goodput_per_s, one), str(one.shed), str(one.refused),
            _busy({use.role: use.busy for use in one.use}),
        )
        for one in reports
    ]  # fmt: skip
    return table(title, columns, rows, left=1)


def _ms(spread: Spread, value: float, digits: int = 0) -> str:
    """Nothing has no time, rather than 0."""
    return f"{value:.{digits}f}" if spread.count else "-"


def _rate(per_s: float, one: Report) -> str:
    """All requests at once have none."""
    return f"{per_s:.1f}" if one.span_s else "-"


def _busy(of_roles: Mapping[str, float]) -> str:
    return ", ".join(f"{role} {busy:.0%}" for role, busy in of_roles.items())


def ladder_markdown(rungs: Sequence[Rung]) -> str:
    rows = [(one.system, f"{one.goodput_per_s:.1f}", f"{one.of_replicas:.2f}", _busy(one.busy)) for one in rungs]
    return markdown(("system", "goodput, req/s", "of replicas", "busy"), rows)


def plan_table(title: str, plan: Plan) -> Table:
    columns = (
        "kind", "devices", "encode : language", "within SLO", "TTFT mean", "p99", "ITL p99", "busy", "sure", "why",
    )  # fmt: skip
    return table(title, columns, map(_plan_row, plan.answers), left=1)


def _plan_row(answer: Answer) -> tuple[str, ...]:
    found = answer.chosen
    if found is None:
        return (answer.kind, *["-"] * 7, "no", answer.why)
    split = f"{found.encode} : {found.language}" if found.encode else "-"
    return (
        answer.kind, str(found.devices), split, f"{found.attained.mean:.1%} +- {found.attained.half:.1%}",
        f"{found.ttft_mean_ms.mean:.0f} ms", f"{found.ttft_p99_ms.mean:.0f} ms", f"{found.itl_p99_ms.mean:.1f} ms",
        _busy(found.busy), "yes" if answer.sure else "no", answer.why,
    )  # fmt: skip


def compare_table(cells: Sequence[Compared]) -> Table:
    columns = (
        "shape", "mix", "load", "req/s", "mean measured", "predicted", "ratio", "p99 measured", "predicted", "ratio",
    )  # fmt: skip
    rows = [
        (
            one.shape, one.mix, f"{one.load:g}" if one.load else "-", f"{one.rate_per_s:.3g}",
            f"{one.measured.mean:.0f}", f"{one.predicted.mean:.0f}", f"{one.mean_ratio:.2f}",
            f"{one.measured.p99:.0f}", f"{one.predicted.p99:.0f}", f"{one.p99_ratio:.2f}",
        )
        for one in cells
    ]  # fmt: skip
    return table("Time to first token, milliseconds", columns, rows, left=1)
