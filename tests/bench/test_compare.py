"""Shapes of a system and the comparison of them, against servers that follow a script."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_openai import FakeServer, answer_of, serving

from aiodisagg.bench import compare
from aiodisagg.bench.compare import CompareOptions, bench_compare, small_mixes, steady_rate
from aiodisagg.bench.serve_metrics import Outcome
from aiodisagg.bench.shapes import SHAPES, Part, Setting, started
from aiodisagg.demo.cluster import ProcessEnded
from aiodisagg.errors import ConfigError

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

SETTING = Setting(model="m", places=(4, 7), encode_options=("--source-mib", "9"), language_options=("--kv-mib", "8"))


# -- shapes -------------------------------------------------------------------------------------------------------


def test_replicas_are_two_processes_on_one_core_that_know_only_each_other() -> None:
    parts = SHAPES["dp2"]
    assert [(part.name, part.place, part.peers) for part in parts] == [
        ("encode-0", 0, ()),
        ("language-0", 0, ("encode-0",)),
        ("encode-1", 1, ()),
        ("language-1", 1, ("encode-1",)),
    ]
    for part in parts:
        _, prefix = SETTING.command(part)
        assert prefix == ("taskset", "-c", "4" if part.place == 0 else "7")


def test_a_split_has_a_core_for_each_half_and_may_wait() -> None:
    for name, waits in (("1+1", False), ("1+1-waits", True)):
        encode, language = SHAPES[name]
        assert (encode.command, encode.place, language.command, language.place) == ("encode", 0, "language", 1)
        assert ("--no-overlap" in SETTING.command(language)[0]) == waits
        assert "--no-overlap" not in SETTING.command(encode)[0]


def test_flexible_peers_meet_and_replicas_do_not() -> None:
    both = [(part.command, part.place, part.meets) for part in SHAPES["2both"]]
    assert both == [("both", 0, True), ("both", 1, True)]
    others = [part for name, parts in SHAPES.items() if name != "2both" for part in parts]
    assert not any(part.meets for part in others)


def test_options_go_to_those_that_know_them() -> None:
    encode, language = (" ".join(SETTING.command(part)[0]) for part in SHAPES["1+1"])
    assert encode.startswith("encode --name encode --model m ") and "--source-mib 9" in encode
    assert "--kv-mib" not in encode and "--port" not in encode
    assert language.startswith("language --name language ") and "--kv-mib 8" in language and "--port 0" in language
    assert "--source-mib" not in language
    both = " ".join(SETTING.command(SHAPES["2both"][1])[0])
    assert "--source-mib 9" in both and "--kv-mib 8" in both and "--port 0" in both


def test_on_gpus_a_place_is_a_device() -> None:
    setting = Setting(model="m", on="gpus", places=(0, 1))
    arguments, prefix = setting.command(SHAPES["1+1"][1])
    assert prefix == () and arguments[-2:] == ["--device", "cuda:1"]
    with pytest.raises(ConfigError, match="places"):
        Setting(model="m", places=(0,)).command(Part("x", "encode", 1))


async def test_what_cannot_be_started_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of single"):
        async with started("3+4", SETTING):
            pass
    with pytest.raises(ProcessEnded, match="no such folder"):
        async with started("1+1", Setting(model=str(tmp_path / "none"), places=(0, 0))):
            pass


# -- comparing ----------------------------------------------------------------------------------------------------


def outcome(sent_s: float, ended_s: float, error: str = "") -> Outcome:
    return Outcome(0, "text", sent_s, sent_s, ended_s, (ended_s,), 1, 1, "", error)


def test_capacity_is_the_rate_of_a_loop_that_is_full() -> None:
    """Two at a time, each 1 s: two a second, although the last one ran alone and long."""
    full = [outcome(0.0, 1.0), outcome(0.0, 1.5), outcome(1.0, 2.0), outcome(1.5, 2.5), outcome(2.0, 3.0)]
    assert steady_rate([*full, outcome(3.0, 90.0)]) == pytest.approx(5 / 3)
    assert steady_rate([outcome(0.0, 4.0)]) == 0.25
    failed = outcome(2.5, 2.7, "HTTP 429")
    assert steady_rate([*full, failed, outcome(3.0, 90.0)]) == pytest.approx(5 / 3), "errors are no capacity"
    with pytest.raises(ConfigError, match="HTTP 503"):
        steady_rate([outcome(0.0, 1.0, "HTTP 503")])


def test_requests_that_end_in_waves_are_no_more_than_they_are() -> None:
    """Sixteen that come together and end within a tenth of a second, after four, three times: four a second."""
    waves = [outcome(4.0 * wave, 4.0 * (wave + 1) - 0.1 + 0.00625 * i) for wave in range(3) for i in range(16)]
    assert steady_rate([*waves, outcome(12.0, 16.0)]) == pytest.approx(4.0, rel=0.01)
    once = [outcome(0.0, 3.9 + 0.00625 * i) for i in range(16)]
    assert steady_rate([*once, *(outcome(4.0, 7.9) for _ in range(8))]) == pytest.approx(4.0, rel=0.01)


async def test_all_shapes_get_the_same_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[str] = []
    texts: dict[str, list[str]] = {}

    @asynccontextmanager
    async def fake(shape: str, setting: Setting) -> AsyncIterator[tuple[str, ...]]:
        assert setting.model == "m"
        shapes.append(shape)

        def script(body: dict[str, Any]) -> Any:
            texts.setdefault(shape, []).append(body["messages"][0]["content"][-1]["text"])
            return answer_of([0.0] * body["max_tokens"])

        async with serving(FakeServer(script)) as one, serving(FakeServer(script)) as two:
            yield one.url, two.url

    monkeypatch.setattr(compare, "started", fake)
    said: list[str] = []
    options = CompareOptions(
        setting=SETTING, shapes=("dp2", "1+1"), mixes=("servegen",), loads=(0.5, 0.8), seeds=(0, 1), requests=6,
        warmup=1, probes=1, capacity={"servegen": 500.0},
    )  # fmt: skip
    report = await bench_compare(options, lambda what, done, total: said.append(what))
    assert shapes == ["dp2", "dp2", "1+1", "dp2", "1+1"], "the replicas first, then by seed"
    once = len(texts["1+1"]) // 2
    last = sorted(texts["1+1"][-once:])
    assert last == sorted(texts["dp2"][-once:]) != sorted(texts["1+1"][:once]), "of one seed; others get others"
    assert report.capacity == {"servegen": 500.0}
    assert [(cell.shape, cell.load, cell.rate_per_s) for cell in report.cells] == [
        ("dp2", 0.5, 250.0), ("dp2", 0.8, 400.0), ("1+1", 0.5, 250.0), ("1+1", 0.8, 400.0),
    ]  # fmt: skip
    cell = report.cell("1+1", "servegen", 0.8)
    assert [run.seed for run in cell.runs] == [0, 1] and (cell.all.requests, cell.all.completed) == (12, 12)
    assert cell.all.seconds == pytest.approx(sum(run.all.seconds for run in cell.runs))
    assert len(cell.ttft_ms_of_seeds) == 2 and len(cell.all.goodput) == 2
    assert any(what.startswith("seed 1, 1+1, servegen, 400/s") for what in said)


async def test_capacity_is_measured_if_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def fake(shape: str, setting: Setting) -> AsyncIterator[tuple[str, ...]]:
        async with serving(FakeServer(lambda body: answer_of([0.0]))) as one:
            yield (one.url,)

    monkeypatch.setattr(compare, "started", fake)
    options = CompareOptions(
        setting=SETTING, shapes=("dp2",), mixes=("servegen",), loads=(0.5,), seeds=(3,), requests=5, warmup=0, probes=0,
        concurrency=2,
    )  # fmt: skip
    report = await bench_compare(options)
    (cell,) = report.cells
    assert report.capacity["servegen"] > 0 and cell.rate_per_s == 0.5 * report.capacity["servegen"]


def test_mixes_fit_the_machine() -> None:
    options = CompareOptions(setting=SETTING)
    assert options.mix("images-1-8") == small_mixes()["images-1-8"]
    assert CompareOptions(setting=SETTING, small=False).mix("images-1-8").sizes == ((1280, 720),)
    with pytest.raises(ConfigError, match="mixes"):
        options.mix("documents")
