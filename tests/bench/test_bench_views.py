"""Tables, plots and files of what was measured. Without ``no_leaks``: matplotlib keeps its font files open."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from rich.console import Console, RenderableType

from aiodisagg.bench.compare import Cell, CompareReport
from aiodisagg.bench.compare_view import best_table, compare_table, plot_compare
from aiodisagg.bench.control import Controlled, ControlReport
from aiodisagg.bench.serve import Client, Run, ServeReport
from aiodisagg.bench.serve_metrics import Outcome, Spread, Unloaded, by_group, summarize
from aiodisagg.bench.serve_plot import plot_serve
from aiodisagg.bench.serve_view import append_outcomes, serve_tables
from aiodisagg.bench.tables import control_table
from aiodisagg.cli.measuring import write_json

UNLOADED = {"text": Unloaded(1000.0, 125.0, 1250.0)}
OUTCOME = Outcome(0, "text", 0.0, 0.0, 3.0, (1.5, 2.0, 3.0), 20, 3)
FAILED = Outcome(1, "1 image", 1.0, 1.0, 2.0, error="HTTP 429")


def run_of(load: str, *outcomes: Outcome) -> Run:
    groups = {name: summarize(own, UNLOADED, (2.0,)) for name, own in by_group(outcomes).items()}
    return Run(load, 0.0, 1, 0, summarize(outcomes, UNLOADED, (2.0,)), groups, {"u": 1}, Client(0.25, 1.0, 2.0, 3.0))


REPORT = ServeReport(
    ["u"], "m-vl", "two", 1.0, UNLOADED, [run_of("1 at a time", OUTCOME), run_of("2/s", OUTCOME, FAILED)]
)


def cell_of(shape: str, load: float, slower: float) -> Cell:
    outcome = replace(OUTCOME, text_s=tuple(at + slower for at in OUTCOME.text_s), ended_s=OUTCOME.ended_s + slower)
    run = run_of("x", outcome)
    assert run.all.ttft_ms is not None
    return Cell(shape, "servegen", load, 1.0, run.all, [run.all.ttft_ms.mean, 10.0], [run])


COMPARED = CompareReport(
    "m-vl", "cores 0, 1", ["dp2", "1+1"], {"servegen": 2.0}, {"servegen": UNLOADED},
    [cell_of(shape, load, slower) for shape, slower in (("dp2", 0.0), ("1+1", 1.5)) for load in (0.2, 0.5)],
)  # fmt: skip


def text_of(what: RenderableType, file: Path) -> str:
    with file.open("w") as out:
        console = Console(width=220, record=True, file=out)
        console.print(what)
    return console.export_text()


def test_tables_of_serve(tmp_path: Path) -> None:
    counted = msgspec.structs.replace(REPORT.runs[0], counters={"items_total": 1234.0})
    report = msgspec.structs.replace(REPORT, runs=[counted, REPORT.runs[1]])
    text = text_of(serve_tables(report), tmp_path / "out")
    assert "items_total" in text and "1,234" in text
    for said in (
        "m-vl, two, 1 replicas",
        "1 at a time",
        "2/s",
        "goodput 2x",
        "1 HTTP 429",
        "1500",
        "1000 + 125",
        "25 %",
    ):
        assert said in text, said


def test_errors_are_said_to_be_in_no_latency(tmp_path: Path) -> None:
    lines = text_of(serve_tables(REPORT), tmp_path / "out").splitlines()
    title = next(i for i, line in enumerate(lines) if "errors and timeouts are in none" in line)
    assert sum("1 of 2" in line for line in lines[title:]) == 1, "of the second run"


def test_tokens_that_are_pieces_are_not_shown_as_tokens(tmp_path: Path) -> None:
    assert "counts no tokens" not in text_of(serve_tables(REPORT), tmp_path / "out")
    uncounted = msgspec.structs.replace(REPORT, runs=[run_of("2/s", replace(OUTCOME, prompt_tokens=0))])
    assert "The server counts no tokens" in text_of(serve_tables(uncounted), tmp_path / "out")


def test_what_goodput_could_not_look_at_is_said(tmp_path: Path) -> None:
    def said(unloaded: dict[str, Unloaded], *outcomes: Outcome) -> str:
        groups = {name: summarize(own, unloaded, (2.0,)) for name, own in by_group(outcomes).items()}
        whole = summarize(outcomes, unloaded, (2.0,))
        run = msgspec.structs.replace(REPORT.runs[0], all=whole, groups=groups)
        report = msgspec.structs.replace(REPORT, unloaded=unloaded, runs=[run])
        return text_of(serve_tables(report), tmp_path / "out")

    assert "oodput of" not in said(UNLOADED, OUTCOME) and "No goodput" not in said(UNLOADED, OUTCOME)
    nothing = said({}, OUTCOME)
    assert "No goodput: no request was answered alone" in nothing and "goodput 2x" not in nothing
    one_token = {"text": Unloaded(1000.0, 0.0, 1250.0)}
    assert "Goodput of text is by TTFT only" in said(one_token, OUTCOME)
    assert "by TTFT only" not in said(one_token, replace(OUTCOME, output_tokens=1)), "there is nothing to limit"
    assert "No goodput of 1 image: no such request was answered alone" in said(UNLOADED, OUTCOME, FAILED)


def test_tables_of_system(tmp_path: Path) -> None:
    text = text_of(compare_table(COMPARED), tmp_path / "out")
    for said in ("load 1.0 is servegen 2.00 requests/s", "1+1", "3000", "x2.00", "10.0-3000", "good 2x"):
        assert said in text, said


def test_the_last_shape_against_the_best_of_the_others(tmp_path: Path) -> None:
    """dp2: first token after 1.5 s; 1+1 after 3 s; the last after 2 s; gaps and rates are in proportion."""
    third = replace_shapes([*COMPARED.cells, cell_of("2both", 0.2, 0.5), cell_of("2both", 0.5, 0.0)])
    lines = [line.split() for line in text_of(best_table(third), tmp_path / "out").splitlines() if "servegen" in line]
    assert [[cell for cell in line if cell != "│"] for line in lines] == [
        ["servegen", "0.2", "x1.33", "x1.33", "x1.00", "x0.86"],
        ["servegen", "0.5", "x1.00", "x1.00", "x1.00", "x1.00"],
    ]


def replace_shapes(cells: list[Cell]) -> CompareReport:
    return msgspec.structs.replace(COMPARED, cells=cells, shapes=list(dict.fromkeys(cell.shape for cell in cells)))


def test_table_of_control(tmp_path: Path) -> None:
    spread, steady = Spread(1.0, 2.0, 3.0, 4.25), Spread(1.0, 2.0, 3.0, 3.75)
    report = ControlReport("ipc", 9, 64, 4, [Controlled(8, 2500.0, spread, steady, 1250.0, spread, 150.0, 250.0)])
    text = text_of(control_table(report), tmp_path / "out")
    for said in ("over ipc, 64 at a time", "2,500", "3.75 ms", "4.25 ms", "1,250/s", "150 us", "250 us"):
        assert said in text, said


def test_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", REPORT)
    assert msgspec.json.decode((tmp_path / "a.json").read_bytes(), type=ServeReport) == REPORT
    for run in REPORT.runs:
        append_outcomes(tmp_path / "a.jsonl", run, [OUTCOME, FAILED])
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["load"] for line in lines] == ["1 at a time", "1 at a time", "2/s", "2/s"]
    assert lines[0]["outcome"]["text_s"] == [1.5, 2.0, 3.0] and lines[1]["outcome"]["error"] == "HTTP 429"


@pytest.mark.timeout(120)
def test_plots(tmp_path: Path) -> None:
    """Also where nothing was answered, or no answer had two pieces."""
    nothing = msgspec.structs.replace(REPORT, runs=[*REPORT.runs, run_of("9/s", FAILED)])
    plot_serve(nothing, tmp_path / "a.png")
    plot_compare(COMPARED, tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
