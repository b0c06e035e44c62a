"""What ``bench overload`` shows, for fewer requests: goodput holds beyond capacity, text does not wait for images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from aiodisagg.bench.overload import OverloadReport, bench_overload, workload
from aiodisagg.cli import main


@pytest.fixture(scope="module")
def report() -> OverloadReport:
    return bench_overload([0.85, 1.0, 1.5], 400, seed=1, max_wait_s=1.0)


def test_goodput_holds_with_the_line_and_falls_without(report: OverloadReport) -> None:
    assert report.kept("line") >= 0.95
    assert report.kept("engine") < 0.7 and report.kept("fcfs") < 0.7


def test_images_are_not_sacrificed_for_text(report: OverloadReport) -> None:
    line = report.of("line")
    assert line[-1].goodput_images >= 0.85 * max(one.goodput_images for one in line)


def test_text_beside_images_takes_less_than_half_the_time(report: OverloadReport) -> None:
    for line, fcfs in zip(report.of("line"), report.of("fcfs"), strict=True):
        assert line.text_p99_s <= 0.5 * fcfs.text_p99_s, line.load
    assert report.of("line")[0].image_longest_wait_s <= report.max_wait_s


def test_everybody_is_served_or_shed(report: OverloadReport) -> None:
    for one in report.measured:
        assert one.served + sum(one.shed.values()) == one.requests
        assert one.policy == "line" or not one.shed


def test_equal_seeds_give_equal_numbers_and_others_do_not() -> None:
    first, again, other = (bench_overload([1.5], 60, seed) for seed in (1, 1, 2))
    assert first.measured[0].goodput == again.measured[0].goodput != other.measured[0].goodput
    assert workload(10, 1.0, 1)[-1].arrived == pytest.approx(10 * workload(10, 10.0, 1)[-1].arrived)


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = CliRunner().invoke(
        main, ["bench", "overload", "--loads", "0.5,1.5", "--requests", "60", "--json", str(file)]
    )
    assert done.exit_code == 0, done.output
    assert "line: beyond capacity" in done.output
    assert [one["policy"] for one in json.loads(file.read_bytes())["measured"]] == ["line", "engine", "fcfs"] * 2
