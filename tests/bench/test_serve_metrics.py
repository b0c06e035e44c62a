"""The numbers of a load test, by hand."""

from __future__ import annotations

import dataclasses
import math
from random import Random

import numpy as np
import pytest

from aiodisagg.bench.exchange import latency
from aiodisagg.bench.faults import _at as faults_at
from aiodisagg.bench.overload import at
from aiodisagg.bench.serve_metrics import (
    Goodput,
    Outcome,
    Spread,
    Unloaded,
    by_group,
    group_of,
    percentile,
    summarize,
)
from aiodisagg.bench.workload import ImageSpec, WorkloadRequest

FOUR = Outcome(0, "text", due_s=1.0, sent_s=1.25, ended_s=4.0, text_s=(2.0, 2.5, 3.5, 3.75), output_tokens=5)
ONE = Outcome(1, "1 image", due_s=2.0, sent_s=2.0, ended_s=6.0, text_s=(6.0,), prompt_tokens=30, output_tokens=1)
LOST = Outcome(2, "1 image", due_s=3.0, sent_s=3.0, ended_s=11.0, text_s=(4.0,), error="HTTP 429")


def test_times_of_one_request() -> None:
    assert FOUR.ttft_s == 1.0, "from when it was due, not from when it was sent"
    assert FOUR.e2e_s == 3.0
    assert FOUR.tpot_s == (3.0 - 1.0) / (5 - 1), "tokens as the server counts them, not pieces of text"
    assert FOUR.gaps_s == [0.5, 1.0, 0.25]
    assert ONE.tpot_s is None and ONE.gaps_s == []
    silent = dataclasses.replace(ONE, text_s=())
    assert silent.ttft_s == silent.e2e_s == 4.0


def test_percentiles_are_those_of_numpy() -> None:
    assert percentile([10.0, 20.0, 30.0, 40.0], 50) == 25.0
    assert percentile([10.0, 20.0], 99) == pytest.approx(19.9)
    assert [percentile([7.0], p) for p in (0, 50, 100)] == [7.0, 7.0, 7.0]
    draw = Random(0)
    for length in (2, 3, 17, 100):
        values = sorted(draw.random() for _ in range(length))
        for p in (0, 1, 50, 90, 99, 100):
            assert percentile(values, p) == pytest.approx(float(np.percentile(values, p)))


def test_other_benches_have_the_same_percentiles() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert at(values, 99) == pytest.approx(float(np.percentile(values, 99)))
    assert math.isnan(at([], 50))
    assert faults_at(sorted(values), 99) == pytest.approx(float(np.percentile(values, 99)))
    assert faults_at([], 50) == 0.0
    few = latency("hand-off", 0, [1e-6 * n for n in range(50, 0, -1)])
    assert few.p50_us == pytest.approx(25.5) and few.p99_us == pytest.approx(49.51), "never above the longest"


def test_a_spread_is_in_milliseconds() -> None:
    assert Spread.of([0.003, 0.001]) == Spread(mean=2.0, p50=2.0, p90=pytest.approx(2.8), p99=pytest.approx(2.98))
    assert Spread.of([]) is None


def test_a_summary() -> None:
    found = summarize([FOUR, ONE, LOST])
    assert (found.requests, found.completed, found.errors) == (3, 2, {"HTTP 429": 1})
    assert found.seconds == 10.0, "from the first that was due to the last that ended, errors included"
    assert (found.requests_per_s, found.output_tokens_per_s) == (0.2, pytest.approx(0.6))
    assert (found.prompt_tokens, found.output_tokens) == (15.0, 3.0)
    assert found.ttft_ms is not None and found.ttft_ms.mean == 2500.0, "errors have no latency"
    assert found.itl_ms is not None and found.itl_ms.p50 == 500.0
    assert found.tpot_ms is not None and found.tpot_ms.mean == 500.0
    assert found.e2e_ms is not None and found.e2e_ms.mean == 3500.0
    assert found.goodput == []


def test_nothing_was_answered() -> None:
    found = summarize([LOST])
    assert (found.completed, found.requests_per_s, found.ttft_ms, found.errors) == (0, 0.0, None, {"HTTP 429": 1})
    assert summarize([]).requests == 0


def test_goodput_counts_requests_within_a_multiple_of_their_group_s_unloaded_latency() -> None:
    unloaded = {"text": Unloaded(ttft_ms=500.0, tpot_ms=100.0, e2e_ms=0), "1 image": Unloaded(3000.0, 0.0, 0)}
    found = summarize([FOUR, ONE, LOST], unloaded, (1.0, 2.0, 5.0))
    # FOUR: TTFT 1000 of 500, TPOT 500 of 100. ONE: TTFT 4000 of 3000. LOST never counts.
    assert found.goodput == [
        Goodput(1.0, 0.0, 0.0),
        Goodput(2.0, 0.1, pytest.approx(1 / 3)),
        Goodput(5.0, 0.2, pytest.approx(2 / 3)),
    ]
    assert summarize([ONE], {"text": unloaded["text"]}, (99.0,)).goodput == [Goodput(99.0, 0.0, 0.0)]
    assert summarize([FOUR], {}, (99.0,)).goodput == [], "nothing to compare with is no goodput of 0"


def test_unloaded_latencies_are_medians_of_what_was_answered() -> None:
    probes = [dataclasses.replace(FOUR, due_s=FOUR.due_s - later) for later in (0.0, 1.0, 9.0)]
    assert Unloaded.of([*probes, LOST]) == Unloaded(ttft_ms=2000.0, tpot_ms=500.0, e2e_ms=4000.0)
    assert Unloaded.of([ONE]) == Unloaded(4000.0, 0.0, 4000.0)
    assert Unloaded.of([LOST]) is None


@pytest.mark.parametrize(
    ("images", "group"),
    [
        (0, "text"),
        (1, "1 image"),
        (2, "2-3 images"),
        (3, "2-3 images"),
        (4, "4-8 images"),
        (8, "4-8 images"),
        (9, "9+ images"),
    ],
)
def test_groups(images: int, group: str) -> None:
    assert group_of(WorkloadRequest(0.0, (ImageSpec(0, 32, 32),) * images, 1, 1)) == group
    assert group_of(WorkloadRequest(0.0, (ImageSpec(0, 32, 32),) * images, 1, 1, "a")) == f"a: {group}"


def test_outcomes_by_group() -> None:
    assert by_group([FOUR, ONE, LOST]) == {"1 image": [ONE, LOST], "text": [FOUR]}
