"""What simulations say, as columns and rows of tables."""

from __future__ import annotations

from collections.abc import Sequence

from aiodisagg.simulate.compare import Compared
from aiodisagg.simulate.plan import Answer, Plan
from aiodisagg.simulate.record import Report, Spread
from aiodisagg.simulate.studies import Rung

Row = tuple[str, ...]


RUN_COLUMNS = (
    "system", "req/s", "TTFT mean", "p50", "p90", "p99", "text p99", "ITL p99", "TPOT mean", "within SLO", "goodput",
    "shed", "refused", "busy",
)  # fmt: skip


def run_rows(reports: Sequence[Report]) -> list[Row]:
    """Milliseconds. Refused are those that fit into no device."""
    return [
        (
            one.system, _rate(one.rate_per_s, one),
            *(_ms(one.ttft, value) for value in (one.ttft.mean, one.ttft.p50, one.ttft.p90, one.ttft.p99)),
            _ms(one.ttft_text, one.ttft_text.p99), _ms(one.itl, one.itl.p99, 1), _ms(one.tpot, one.tpot.mean, 1),
            f"{one.attained:.1%}", _rate(one.goodput_per_s, one), str(one.shed), str(one.refused),
            ", ".join(f"{use.role} {use.busy:.0%}" for use in one.use),
        )
        for one in reports
    ]  # fmt: skip


def _ms(spread: Spread, value: float, digits: int = 0) -> str:
    """Nothing has no time, rather than 0."""
    return f"{value:.{digits}f}" if spread.count else "-"


def _rate(per_s: float, one: Report) -> str:
    """All requests at once have none."""
    return f"{per_s:.1f}" if one.span_s else "-"


LADDER_COLUMNS = ("system", "goodput, req/s", "of replicas", "busy")


def ladder_rows(rungs: Sequence[Rung]) -> list[Row]:
    return [
        (
            rung.system, f"{rung.goodput_per_s:.1f}", f"{rung.of_replicas:.2f}",
            ", ".join(f"{role} {busy:.0%}" for role, busy in rung.busy.items()),
        )
        for rung in rungs
    ]  # fmt: skip


PLAN_COLUMNS = (
    "kind", "devices", "encode : language", "within SLO", "TTFT mean", "p99", "ITL p99", "busy", "sure", "why",
)  # fmt: skip


def plan_rows(plan: Plan) -> list[Row]:
    return [_plan_row(answer) for answer in plan.answers]


def _plan_row(answer: Answer) -> Row:
    found = answer.chosen
    if found is None:
        return (answer.kind, "-", "-", "-", "-", "-", "-", "-", "no", answer.why)
    split = f"{found.encode} : {found.language}" if found.encode else "-"
    return (
        answer.kind, str(found.devices), split, f"{found.attained.mean:.1%} +- {found.attained.half:.1%}",
        f"{found.ttft_mean_ms.mean:.0f} ms", f"{found.ttft_p99_ms.mean:.0f} ms", f"{found.itl_p99_ms.mean:.1f} ms",
        ", ".join(f"{role} {busy:.0%}" for role, busy in found.busy.items()), "yes" if answer.sure else "no",
        answer.why,
    )  # fmt: skip


COMPARE_COLUMNS = (
    "shape", "mix", "load", "req/s", "mean measured", "predicted", "ratio", "p99 measured", "predicted", "ratio",
)  # fmt: skip


def compare_rows(cells: Sequence[Compared]) -> list[Row]:
    """Milliseconds."""
    return [
        (
            one.shape, one.mix, f"{one.load:g}" if one.load else "-", f"{one.rate_per_s:.3g}",
            f"{one.measured.mean:.0f}", f"{one.predicted.mean:.0f}", f"{one.mean_ratio:.2f}",
            f"{one.measured.p99:.0f}", f"{one.predicted.p99:.0f}", f"{one.p99_ratio:.2f}",
        )
        for one in cells
    ]  # fmt: skip
