"""``aiodisagg simulate``, ``plan`` and ``bench simulate``, as a user calls them; small."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from aiodisagg.bench.mixes import named_mix
from aiodisagg.bench.workload import Gamma, generate, write_trace
from aiodisagg.cli import main
from aiodisagg.simulate.cluster import System
from aiodisagg.simulate.compare import SHAPES, compare, read_measured
from aiodisagg.simulate.plan import Plan, PlanGoal, plan
from aiodisagg.simulate.record import Report
from aiodisagg.simulate.runs import Offered, first_tokens, run
from aiodisagg.simulate.times import read_times

TIMES = read_times("h200-vllm")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_simulate_prints_a_row_for_each_system_and_rate_and_writes_them(tmp_path: Path) -> None:
    json_file, plot_file = tmp_path / "runs.json", tmp_path / "runs.png"
    found = call(
        "simulate", "--requests", "40", "--rate", "4", "--rate", "8", "--system", "replicas", "--system", "flexible",
        "--json", str(json_file), "--plot", str(plot_file),
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    reports = msgspec.json.decode(json_file.read_bytes(), type=list[Report])
    assert [one.system for one in reports] == ["replicas", "replicas", "flexible", "flexible"]
    assert all(one.ok == 40 and one.ttft.p99 >= one.ttft.mean > 0 for one in reports)
    assert found.output.count("replicas") >= 2 and "TTFT mean" in found.output
    assert plot_file.read_bytes().startswith(b"\x89PNG")


def test_a_trace_file_is_run_as_it_is_and_times_may_be_a_file(tmp_path: Path) -> None:
    trace, times, out = tmp_path / "trace.jsonl", tmp_path / "times.json", tmp_path / "out.json"
    workload = generate(named_mix("reuse"), Gamma(5.0), 30, 4)
    write_trace(trace, workload)
    slow = msgspec.structs.replace(TIMES, name="slow", tower=((8160, 400.0),))
    times.write_bytes(msgspec.json.encode(slow))
    asked = ("simulate", "--system", "flexible", "--trace", str(trace), "--json", str(out))
    found = call(*asked, "--times", str(times))
    assert found.exit_code == 0, found.output
    from_file = msgspec.json.decode(out.read_bytes(), type=list[Report])[0]
    assert from_file == run(System("flexible", both=2, priorities=True, turns=False), slow, workload)
    assert call(*asked).exit_code == 0
    assert msgspec.json.decode(out.read_bytes(), type=list[Report])[0].ttft.mean < from_file.ttft.mean


def test_a_trace_of_one_request_has_no_rate(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    write_trace(trace, generate(named_mix("text"), Gamma(5.0), 1, 4))
    found = call("simulate", "--system", "replicas", "--trace", str(trace), "--json", str(out))
    assert found.exit_code == 0, found.output
    (report,) = msgspec.json.decode(out.read_bytes(), type=list[Report])
    assert (report.ok, report.rate_per_s, report.goodput_per_s) == (1, 0.0, 0.0)


def reports_of(tmp_path: Path, *arguments: str) -> tuple[list[Report], str]:
    out = tmp_path / "out.json"
    found = call("simulate", *arguments, "--json", str(out))
    assert found.exit_code == 0, found.output
    return msgspec.json.decode(out.read_bytes(), type=list[Report]), found.output


def test_nobody_is_shed_where_nobody_is_late(tmp_path: Path) -> None:
    """What streams decode was counted as ahead of the first token of whoever came: half of them were sent away."""
    asked = ("--devices", "1", "--system", "replicas", "--workload", "text", "--requests", "200")
    (open_door,), _ = reports_of(tmp_path, *asked, "--rate", "10")
    (shedding,), _ = reports_of(tmp_path, *asked, "--rate", "10", "--shed", "5")
    assert open_door.attained == 1.0 and (shedding.ok, shedding.shed) == (200, 0)
    (crowded,), _ = reports_of(tmp_path, *asked, "--rate", "400", "--cv", "4", "--shed", "2")
    assert crowded.shed > 20 and crowded.ok + crowded.shed == 200


def test_what_fits_into_no_device_is_refused_and_has_no_times(tmp_path: Path) -> None:
    (found,), said = reports_of(
        tmp_path, "--workload", "documents", "--times", "cpu-115m", "--devices", "1", "--rate", "0.01",
        "--requests", "5",
    )  # fmt: skip
    assert (found.ok, found.refused) == (0, 5)
    (row,) = [line for line in said.splitlines() if line.startswith("│ replicas")]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert "refused" in said and cells[2:9] == ["-"] * 7 and cells[12] == "5"


def test_a_plan_for_prompts_that_fit_into_no_device_ends_at_once() -> None:
    found = call("plan", "--workload", "documents", "--times", "cpu-115m", "--load", "0.01")
    assert found.exit_code == 1 and "19200 + 1024 tokens, kv_tokens is 16384" in found.output


def test_a_run_that_is_over_before_a_load_builds_up_is_said_to_be_a_burst(tmp_path: Path) -> None:
    asked = ("--system", "replicas", "--system", "flexible", "--workload", "text", "--requests", "60")
    reports, said = reports_of(tmp_path, *asked, "--rate", "40", "--rate", "0.5")
    answers_s = min(one.e2e.p99 for one in reports[::2]) / 1e3
    (warning,) = [line for line in said.splitlines() if "burst" in line]
    assert f"60 come within {reports[0].span_s:.1f} s, and long answers take {answers_s:.1f} s" in warning
    assert f"--requests {math.ceil(60 * reports[0].rate_per_s)} " in warning, "a minute of them"
    overload = ("--devices", "1", "--system", "replicas", "--workload", "text", "--requests", "200", "--rate", "2")
    (late,), said = reports_of(tmp_path, *overload, "--times", "cpu-115m")
    assert 3 * late.e2e.p99 > 1e3 * late.span_s and "burst" not in said, "so long by the overload"
    trace = tmp_path / "trace.jsonl"
    write_trace(trace, generate(named_mix("text"), Gamma(40.0), 60))
    assert "burst" not in reports_of(tmp_path, "--system", "replicas", "--trace", str(trace))[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("simulate", "--times", "nothing"), "is no file and none of the profiles"),
        (("simulate", "--system", "ring"), "is none of replicas"),
        (("simulate", "--system", "static", "--encode", "2"), "is no split"),
        (("simulate", "--slo", "fast"), "no multiple"),
        (("simulate", "--workload", "poems"), "'poems' is none of"),
        (("plan", "--load", "0"), "load: must be above 0, not 0"),
        (("plan", "--load", "1", "--share", "1"), "share: must be between 0 and 1, not 1"),
        (("simulate", "--trace", "x.jsonl", "--rate", "4"), "trace: has its own requests: --rate cannot be given"),
        (("simulate", "--trace", "x.jsonl", "--workload", "text"), "--workload cannot be given"),
        (("simulate", "--trace", "x.jsonl", "--requests", "9"), "--requests cannot be given"),
        (("simulate", "--compare", "x.json", "--plot", "x.png"), "--plot cannot be given"),
        (("simulate", "--compare", "x.json", "--system", "flexible"), "--system cannot be given"),
        (("simulate", "--requests", "100", "--compare", "x.json"), "--requests cannot be given"),
        (("bench", "simulate", "--study", "luck"), "is none of two-devices"),
    ],
)
def test_what_makes_no_sense_is_said(arguments: tuple[str, ...], message: str) -> None:
    found = call(*arguments)
    assert found.exit_code == 1 and message in found.output


@pytest.mark.parametrize(
    "command",
    [
        ("simulate", "--rate", "1"),
        ("plan", "--load", "1"),
        ("bench", "serve", "--url", "http://127.0.0.1:9"),
        ("bench", "system", "--model", "/nowhere"),
        ("bench", "resume", "--quick"),
        ("bench", "transport", "--quick"),
    ],
)
def test_who_cannot_draw_is_told_so_before_anything_runs(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out.json"
    found = call(*command, "--plot", str(tmp_path / "x.png"), "--json", str(out))
    assert found.exit_code == 1 and 'the extra "bench" of aiodisagg' in found.output
    assert not out.exists()


def test_compare_prints_how_far_predictions_are_from_measurements(tmp_path: Path) -> None:
    """A file with the fields of a measured report, made of simulations of the same shapes, one twice as slow."""
    offered = Offered(named_mix("images-1-8"), 30)
    cells = []
    for shape, system, factor in (
        ("dp2", SHAPES["dp2"], 1.0),
        ("2both", SHAPES["2both"], 2.0),
        ("unknown", SHAPES["1+1"], 1.0),
    ):
        firsts = [first for seed in (0, 1) for first in first_tokens(system, TIMES, offered.at(3.0, seed), seed)]
        mean, p99 = 1e3 * factor * statistics.fmean(firsts), 1e3 * factor * float(np.percentile(firsts, 99))
        seen = {"requests": 60, "ttft_ms": {"count": 60, "mean": mean, "p50": mean, "p99": p99}}
        runs = [{"seed": seed, "all": seen} for seed in (0, 1)]
        cells.append(
            {"shape": shape, "mix": "images-1-8", "load": 0.5, "rate_per_s": 3.0, "all": seen, "runs": runs}
        )  # fmt: skip
    file, out = tmp_path / "measured.json", tmp_path / "compared.json"
    file.write_text(json.dumps({"model": "m", "cells": cells}), encoding="utf-8")
    found = compare(read_measured(file), TIMES, {"images-1-8": offered.mix})
    assert [one.shape for one in found] == ["dp2", "2both"]
    assert (found[0].mean_error, found[0].p99_error) == (pytest.approx(0.0), pytest.approx(0.0))
    assert found[1].mean_error == pytest.approx(-0.5)
    printed = call("simulate", "--compare", str(file), "--json", str(out))
    assert printed.exit_code == 0, printed.output
    assert "0.50" in printed.output and "1.00" in printed.output
    assert printed.output.splitlines()[-1] == "within 15 %: 1 of 2 (mean), 1 of 2 (p99)"
    assert len(json.loads(out.read_text(encoding="utf-8"))) == 2
    file.write_text("{}", encoding="utf-8")
    assert call("simulate", "--compare", str(file)).exit_code == 1


def test_plan_finds_the_least_devices_that_do_and_says_how_sure_it_is(tmp_path: Path) -> None:
    json_file, plot_file = tmp_path / "plan.json", tmp_path / "plan.png"
    found = call(
        "plan", "--load", "4", "--requests", "60", "--seeds", "1", "--workload", "images-1-8", "--slo", "5x",
        "--json", str(json_file), "--plot", str(plot_file),
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    made = msgspec.json.decode(json_file.read_bytes(), type=Plan)
    assert [answer.kind for answer in made.answers] == ["replicas", "split-waits", "split-overlap", "flexible"]
    for answer in made.answers:
        assert answer.chosen is not None
        assert {one.devices: one for one in answer.tried}[answer.chosen.devices] == answer.chosen
        assert answer.chosen.attained.mean >= 0.9 > (answer.below.attained.mean if answer.below is not None else 0.0)
        assert answer.chosen.attained.seeds == 2 and answer.why
        assert answer.chosen.encode + answer.chosen.language in (0, answer.chosen.devices)
    assert plot_file.read_bytes().startswith(b"\x89PNG")


def test_a_plan_is_sure_only_if_the_next_smaller_one_surely_fails() -> None:
    offered = Offered(named_mix("text"), 150)
    sure = plan(TIMES, offered, PlanGoal(3.0, slo=5.0, share=0.5, seeds=2))
    one = next(answer for answer in sure.answers if answer.kind == "replicas")
    assert one.chosen is not None and one.chosen.devices == 1
    assert one.sure and "nothing smaller" in one.why
    split = next(answer for answer in sure.answers if answer.kind == "split-overlap")
    assert split.chosen is not None and split.chosen.devices == 2


def test_bench_simulate_fills_the_marked_tables_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "simulate.md"
    file.write_text("before\n<!-- two-devices -->\nold\n<!-- /two-devices -->\nafter\n", encoding="utf-8")
    asked = ("bench", "simulate", "--quick", "--study", "two-devices", "--out", str(file))
    assert call(*asked).exit_code == 0
    first = file.read_text(encoding="utf-8")
    assert first.startswith("before\n<!-- two-devices -->\n") and first.endswith("<!-- /two-devices -->\nafter\n")
    assert "old" not in first and first.count("ServeGen-like") == 3
    assert call(*asked).exit_code == 0
    assert file.read_text(encoding="utf-8") == first
    missing = call("bench", "simulate", "--quick", "--study", "text", "--out", str(file))
    assert missing.exit_code == 1 and "no marks for text" in missing.output
