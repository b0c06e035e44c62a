"""A whole measurement against a server that follows a script."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fake_openai import FakeClock, FakeServer, Step, answer_of, serving

from aiodisagg.bench.chat_client import ServerError
from aiodisagg.bench.counters import grown, parse_counters, row_bytes
from aiodisagg.bench.distributions import exactly, parse_ranges
from aiodisagg.bench.serve import ServeOptions, ServeReport, bench_serve
from aiodisagg.bench.serve_metrics import Goodput, Outcome, Spread, Unloaded
from aiodisagg.bench.workload import Closed, ImageSpec, Mix, WorkloadRequest, generate
from aiodisagg.errors import ConfigError

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

MIX = Mix(parse_ranges("images", "0,1"), ((32, 32),), exactly(30), exactly(3))


def pictures(body: dict[str, Any]) -> list[str]:
    content = body["messages"][0]["content"]
    return [part["image_url"]["url"] for part in content if part["type"] == "image_url"]


def words(body: dict[str, Any]) -> int:
    return len(body["messages"][0]["content"][-1]["text"].split())


def steady(body: dict[str, Any]) -> list[Step]:
    """Half a second a picture and one for the rest, then a token each 0.125 s; a word is two tokens, a picture ten."""
    count = len(pictures(body))
    gaps = [1.0 + 0.5 * count, *[0.125] * (body["max_tokens"] - 1)]
    return answer_of(gaps, prompt=5 + 2 * words(body) + 10 * count)


async def measure(
    options: dict[str, Any], script: Any = steady, clock: FakeClock | None = None
) -> tuple[ServeReport, FakeServer, list[Outcome]]:
    clock, kept = clock or FakeClock(), []
    async with serving(FakeServer(script, clock)) as server:
        given = ServeOptions(**{"urls": (server.url,), "warmup": 1, "probes": 2, "requests": 6, **options})
        report = await bench_serve(given, keep=lambda run, outcomes: kept.extend(outcomes), clock=clock)
    return report, server, kept


async def test_a_closed_loop_of_one_measures_what_the_server_does() -> None:
    report, server, kept = await measure({"mix": MIX, "concurrencies": (1,), "slo": (1.0, 0.5)})
    assert (report.model, report.tokens_per_word) == ("fake-vl", 2.0)
    assert {body["model"] for body in server.bodies} == {"fake-vl"}
    assert {words(body) for body in server.bodies[2:]} == {15}, "30 tokens"
    assert report.unloaded == {"text": Unloaded(1000.0, 125.0, 1250.0), "1 image": Unloaded(1500.0, 125.0, 1750.0)}
    (run,) = report.runs
    with_picture = sum(bool(request.images) for request in generate(MIX, Closed(1), 6))
    assert 0 < with_picture < 6
    seconds = 6 * 1.25 + 0.5 * with_picture
    assert (run.load, run.concurrency, run.rate_per_s, run.seed) == ("1 at a time", 1, 0.0, 0)
    assert (run.all.requests, run.all.completed, run.all.errors, run.all.seconds) == (6, 6, {}, seconds)
    assert run.all.requests_per_s == pytest.approx(6 / seconds)
    assert run.all.output_tokens_per_s == pytest.approx(18 / seconds)
    assert run.all.itl_ms == run.all.tpot_ms == Spread(125.0, 125.0, 125.0, 125.0)
    assert run.groups["text"].ttft_ms == Spread(1000.0, 1000.0, 1000.0, 1000.0)
    assert run.groups["1 image"].ttft_ms == Spread(1500.0, 1500.0, 1500.0, 1500.0)
    assert run.groups["1 image"].requests == with_picture
    assert run.all.goodput == [Goodput(1.0, pytest.approx(6 / seconds), 1.0), Goodput(0.5, 0.0, 0.0)]
    assert sum(run.replicas.values()) == 6 and run.client.late_max_ms == 0.0
    assert [one.number for one in kept] == list(range(6))


async def test_how_late_the_client_was_is_told() -> None:
    class Late(FakeClock):
        async def until(self, at_s: float) -> None:
            self.value = max(self.value, at_s + 0.125)

    trace = (WorkloadRequest(1.0, (), 5, 1),)
    report, _, _ = await measure({"trace": trace, "probes": 0, "warmup": 0}, lambda body: answer_of([0.5]), Late())
    assert report.runs[0].client.late_max_ms == 125.0


async def test_every_replica_is_warmed_up() -> None:
    async with serving(FakeServer(steady)) as first, serving(FakeServer(steady)) as second:
        urls = (first.url, second.url)
        options = ServeOptions(urls=urls, mix=MIX, concurrencies=(2,), warmup=3, probes=0, requests=2)
        await bench_serve(options)
    met = 2  # requests by which a replica is met
    assert [len(one.bodies) - met for one in (first, second)] == [4, 4], "three to warm up, and one of two"


async def test_runs_differ_in_their_pictures_and_pools_are_shared() -> None:
    mix = Mix(exactly(2), ((32, 32),), exactly(5), exactly(1), pool=3, reuse=0.5)
    options = {"mix": mix, "concurrencies": (1, 2), "seeds": (0, 1), "probes": 0, "warmup": 0}
    report, server, _ = await measure(options, lambda body: answer_of([0.1]))
    assert [(run.concurrency, run.seed) for run in report.runs] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert report.unloaded == {} and report.runs[0].all.goodput == []
    sent = [pictures(body) for body in server.bodies[2:]]
    runs = [[url for urls in sent[start : start + 6] for url in urls] for start in range(0, 24, 6)]
    for run in runs:
        assert 12 > len(set(run)) >= 6, "some pictures came from the pool"
    assert sum(len(set(run)) for run in runs) == len({url for run in runs for url in run}), "none in two runs"


async def test_loads_that_look_alike_send_other_pictures_and_have_other_names() -> None:
    """The second of them was answered from caches."""
    mix = Mix(exactly(1), ((32, 32),), exactly(5), exactly(1))
    options = {"mix": mix, "rates": (1.234, 1.231, 1.234), "concurrencies": (2, 2), "probes": 0, "warmup": 0}
    report, server, _ = await measure(options, lambda body: answer_of([0.1]))
    assert [run.load for run in report.runs] == [
        "1.234/s", "1.231/s", "1.234/s (2)", "2 at a time", "2 at a time (2)"
    ]  # fmt: skip
    sent = [url for body in server.bodies[2:] for url in pictures(body)]
    assert len(sent) == len(set(sent)) == 30


async def test_another_seed_sends_other_pictures_also_alone() -> None:
    mix = Mix(exactly(1), ((32, 32),), exactly(5), exactly(1))
    sent = []
    for seed in (0, 1):
        options = {"mix": mix, "concurrencies": (1,), "seeds": (seed,)}
        _, server, _ = await measure(options, lambda body: answer_of([0.1]))
        sent.append({url for body in server.bodies for url in pictures(body)})
    assert [len(urls) for urls in sent] == [9, 9] and not sent[0] & sent[1], "one to warm up, two alone, six"


async def test_an_open_loop_and_its_errors() -> None:
    seen = 0

    def every_third_fails(body: dict[str, Any]) -> list[Step] | int:
        nonlocal seen
        seen += 1
        return 503 if seen > 2 and seen % 3 == 0 else answer_of([0.0], prompt=100)

    report, _, kept = await measure({"mix": MIX, "rates": (4.0,), "probes": 0, "warmup": 0}, every_third_fails)
    (run,) = report.runs
    assert (run.load, run.rate_per_s) == ("4/s", 4.0)
    assert run.all.errors == {"HTTP 503": 2} and run.all.completed == 4
    assert report.tokens_per_word == 1.0, "a server that counts nothing of use"
    assert [one.due_s for one in kept] == sorted(one.due_s for one in kept)


async def test_a_trace_is_replayed_at_its_own_times() -> None:
    trace = (WorkloadRequest(0.5, (), 4, 2), WorkloadRequest(2.0, (ImageSpec(7, 64, 32),), 6, 3))
    report, server, kept = await measure({"trace": trace, "workload": "t"})
    assert [one.due_s for one in kept] == [0.5, 2.0]
    assert [body["max_tokens"] for body in server.bodies[-2:]] == [2, 3]
    assert report.runs[0].load == "trace" and sorted(report.unloaded) == ["1 image", "text"]


def test_counters_of_several_peers_are_added_up() -> None:
    page = (
        "# HELP a_total Things.\n# TYPE a_total counter\n"
        'a_total{kind="x y"} 3.0\na_total{kind="z"} 1.0 1700000000\nb_total NaN\nc_created 5.0\nd 7.0\n'
    )
    before = parse_counters([page, 'a_total{kind="z"} 2'])
    assert before == {'a_total{kind="x y"}': 3.0, 'a_total{kind="z"}': 3.0}
    assert grown(before, before | {'a_total{kind="z"}': 5.5, "new_total": 1.0}) == {
        'a_total{kind="z"}': 2.5,
        "new_total": 1.0,
    }


def test_bytes_of_rows_are_counted_by_what_became_of_them() -> None:
    page = "".join(
        f'aiodisagg_{name}{{outcome="{outcome}",peer="{peer}"}} {value}\n'
        for name, outcome, peer, value in (
            ("row_bytes_total", "sent", "a", 4.0), ("row_bytes_total", "resent", "a", 1.0),
            ("row_bytes_total", "resent", "sent", 2.0), ("rows_total", "resent", "a", 9.0),
        )
    )  # fmt: skip
    assert (row_bytes(page, "sent"), row_bytes(page, "resent"), row_bytes(page, "lost")) == (4.0, 3.0, 0)


async def test_what_a_server_counts_in_each_run() -> None:
    clock = FakeClock()
    server = FakeServer(steady, clock)
    server.metrics_text = lambda: f"asked_total {len(server.bodies)}\n"
    async with serving(server):
        given = ServeOptions(
            urls=(server.url,), mix=MIX, concurrencies=(1, 1), requests=3, warmup=0, probes=0,
            metrics=(f"{server.url}/metrics",),
        )  # fmt: skip
        report = await bench_serve(given, clock=clock)
    assert [run.counters for run in report.runs] == [{"asked_total": 3.0}] * 2


async def test_a_server_that_cannot_be_used() -> None:
    with pytest.raises(ServerError, match="HTTP 400"):
        await measure({"mix": MIX, "concurrencies": (1,)}, lambda body: 400)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"mix": MIX}, "rates"),
        ({"concurrencies": (1,)}, "trace"),
        ({"mix": MIX, "trace": (WorkloadRequest(0.0, (), 1, 1),)}, "trace"),
        ({"trace": (WorkloadRequest(0.0, (), 1, 1),), "rates": (1.0,)}, "trace"),
        ({"mix": MIX, "rates": (1.0,), "seeds": (0, 1, 0)}, "seeds"),
        ({"mix": MIX, "concurrencies": (1, 0)}, "concurrency"),
        ({"mix": MIX, "rates": (math.nan,)}, "rates"),
        ({"mix": MIX, "rates": (math.inf,)}, "rates"),
        ({"mix": MIX, "rates": (1.0,), "cv": -1.0}, "cv"),
        ({"mix": MIX, "rates": (1.0,), "timeout_s": 0.0}, "timeout-s"),
    ],
)
async def test_options_that_are_none(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        ServeOptions(urls=("http://x",), **options)
    assert error.value.key == key
