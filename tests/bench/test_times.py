"""``bench times``: its file is what the simulator reads, and its fits find what they are made of."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner

from aiodisagg.bench.times import fit
from aiodisagg.cli import main
from aiodisagg.data import digits_model
from aiodisagg.simulate.times import Costs, read_times


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_what_it_writes_is_what_a_simulation_reads_and_says_where_it_is_from(tmp_path: Path) -> None:
    file, before = tmp_path / "times.json", (os.sched_getaffinity(0), torch.get_num_threads())
    found = CliRunner().invoke(
        main, ["bench", "times", "--quick", "--model", str(digits_model()), "--json", str(file)]
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before
    times = read_times(str(file))
    assert times.source.startswith("aiodisagg bench times: digits, 1 thread of ") and "float32" in times.source
    assert times.prompt_tokens > 0 and times.image_tokens == 2, "the template, and a picture's begin and end"
    costs = Costs(times)
    assert 0 < costs.tower_s([16]) <= costs.tower_s([16, 16, 16, 16])
    assert costs.prefill_s(16) > 0 and costs.decode_s(2, 0.0) >= costs.decode_s(1, 0.0) > 0
    run = CliRunner().invoke(main, ["simulate", "--small", "--requests", "10", "--rate", "2", "--times", str(file)])
    assert run.exit_code == 0, run.output


def test_a_core_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["bench", "times", "--core", "4096", "--json", str(tmp_path / "a.json")])
    assert found.exit_code == 1 and "core" in found.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--beside", "4096"], "beside: 4096 is none of"),
        (["--core", "{mine}", "--beside", "{mine}"], "beside: core {mine} is the one that is measured"),
        (["--device", "cuda:0", "--beside", "{mine}"], "beside: is for CPUs"),
    ],
)
def test_only_another_core_of_ours_can_be_busy_beside(tmp_path: Path, options: list[str], said: str) -> None:
    mine = str(min(os.sched_getaffinity(0)))
    asked = [option.format(mine=mine) for option in options]
    found = CliRunner().invoke(main, ["bench", "times", *asked, "--json", str(tmp_path / "a.json")])
    assert found.exit_code == 1 and said.format(mine=mine) in found.output, found.output


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a second core")
def test_another_core_does_the_same_meanwhile_and_no_longer(tmp_path: Path) -> None:
    file, other = tmp_path / "times.json", max(os.sched_getaffinity(0))
    command = ["bench", "times", "--quick", "--model", str(digits_model()), "--beside", str(other), "--json", str(file)]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 0, found.output
    assert "1 more core doing the same" in read_times(str(file)).source
    assert not [child.cmdline() for child in psutil.Process().children() if "--again" in child.cmdline()]


def test_a_fit_finds_the_coefficients_and_none_is_below_zero() -> None:
    terms = [(1.0, float(x), x * x / 1e3) for x in (16, 64, 100, 256, 400)]
    costs, off = fit(terms, [4.0 + 0.5 * x + 0.2 * q for _, x, q in terms])
    assert costs == pytest.approx((4.0, 0.5, 0.2), rel=1e-3) and off < 1e-3
    costs, off = fit(terms, [max(0.5 * x - 5.0, 1.0) for _, x, _ in terms])
    assert min(costs) >= 0 and off > 0.01
