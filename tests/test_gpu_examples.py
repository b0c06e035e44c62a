"""What the GPU examples count, and the table that is made of it; nothing here needs a GPU."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aiodisagg.engine.types import Delta
from aiodisagg.simulate.compare import read_measured

EXAMPLES = str(Path(__file__).parents[1] / "examples")


class Busy:
    """A service whose loop is busy for a second with each request, by a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *pieces: int) -> None:
        monkeypatch.syspath_prepend(EXAMPLES)
        import gpu_loops
        import gpu_serve

        self.loops, self.serve, self.now, self.pieces = gpu_loops, gpu_serve, 0.0, pieces
        self.traces = SimpleNamespace(recent=list)
        for module in (gpu_loops, gpu_serve):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    async def generate(self, messages: object, sampling: object) -> AsyncIterator[Delta]:
        for tokens in self.pieces:
            self.now += 1.0
            yield Delta("", tuple(range(tokens)))

    def metrics(self) -> str:
        return ""


@pytest.mark.anyio
async def test_gaps_are_between_pieces_and_not_between_the_tokens_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(monkeypatch, 1, 3, 1)
    answered = await busy.serve.ask(busy, "", [], 5)
    assert (answered.tokens, answered.gaps_s) == (5, [1.0, 1.0])


@pytest.mark.anyio
async def test_an_open_loop_measures_from_when_a_request_was_due(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(monkeypatch, 1)
    options = Namespace(
        tiny=True, open=["text:1000"], first_seed=0, seeds=1, loop_s=0.004, meet=None, name="a", itl_budget_ms=None
    )
    bench = SimpleNamespace(options=options, meeting=None, say=lambda line: None, save=lambda: None)
    planner = SimpleNamespace(plan=lambda messages: SimpleNamespace(tokens=1 << 20))
    monkeypatch.setattr(busy.loops, "WARMING", 1)
    monkeypatch.setattr(busy.loops, "WARMING_RATE", 1000.0)
    found: dict[str, Any] = {}
    await busy.loops.open_loops(bench, found, busy, planner)
    (loop,) = found["text"].values()
    late = sorted(loop["ttft_ms"])
    assert len(late) == 8 and all(ms > 700 * (i + 1) for i, ms in enumerate(late))  # all are due at about once


def loops(*seeds: int, slow: float = 1.0) -> str:
    made = {
        f"4.0 {seed}": {
            "rate": 4.0,
            "seed": seed,
            "seconds": 2.0,
            "tokens": [2, 3],
            "ttft_ms": [100.0 * seed * slow, 300.0 * seed * slow],
            "gaps_ms": [5.0 * slow, 5.0 * slow, 20.0 * slow],
        }
        for seed in seeds
    }
    return json.dumps({"load": {"servegen": made}})


def test_a_table_of_cells_compares_equal_seeds_and_tells_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import gpu_cells

    (tmp_path / "a.json").write_text(loops(1))
    (tmp_path / "b.json").write_text(loops(1, 9, slow=0.5))
    out = tmp_path / "cells.json"
    gpu_cells.main(out, [f"gpu-dp2={tmp_path / 'a.json'}", f"gpu-flexible={tmp_path / 'b.json'}"])
    written = capsys.readouterr().out
    assert "| 200 / 298 | 0.50 / 0.50 |" in written and "(only here 9: 900 ms, p99 1341)" in written
    gpu_cells.main(out, [])
    assert capsys.readouterr().out == written  # it follows from the file
    first, second = read_measured(out).cells
    assert first.all.ttft_ms is not None and first.all.ttft_ms.mean == 200.0
    assert [run.seed for run in second.runs] == [1, 9] and second.all.requests == 4


def test_a_file_of_cells_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import gpu_cells

    with pytest.raises(SystemExit) as caught:
        gpu_cells.main(tmp_path / "nowhere.json", ())
    assert caught.value.code == f"{tmp_path / 'nowhere.json'}: No such file or directory"
    (other := tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match="is not what was expected: Object missing required field `cells`"):
        gpu_cells.main(other, ())
