"""Planning: the search itself against clusters whose answers are made up, and what a run is judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from aiodisagg.bench.distributions import exactly
from aiodisagg.bench.mixes import named_mix
from aiodisagg.bench.workload import Gamma, Mix, WorkloadRequest, generate
from aiodisagg.errors import ConfigError
from aiodisagg.simulate import plan as planning
from aiodisagg.simulate.cluster import Cluster, System
from aiodisagg.simulate.plan import Answer, Plan, PlanGoal, plan
from aiodisagg.simulate.record import Report, meets, steady
from aiodisagg.simulate.runs import LEAST_S, Offered, longest_s, run, work
from aiodisagg.simulate.systems import flexible, replicas, split_overlap
from aiodisagg.simulate.times import ServiceTimes, read_times

TIMES = read_times("h200-vllm")
TEXT = named_mix("text")
Attained = Callable[[System, int], float]
"""Of a cluster and a seed."""


def made_up(
    monkeypatch: pytest.MonkeyPatch, attained: Attained, *, busy: float = 0.5, judged: int = 10_000
) -> list[tuple[System, int]]:
    """Clusters that attain what the test says; returns what will have been run."""
    template = run(replicas(1), TIMES, generate(TEXT, Gamma(1.0), 3))
    ran: list[tuple[System, int]] = []

    def fake(system: System, times: ServiceTimes, workload: Sequence[WorkloadRequest], **options: Any) -> Report:
        ran.append((system, options["seed"]))
        use = tuple(msgspec.structs.replace(one, busy=busy) for one in template.use)
        return msgspec.structs.replace(template, attained=attained(system, options["seed"]), use=use, judged=judged)

    monkeypatch.setattr(planning, "run", fake)
    return ran


def answers(rate: float = 10.0, *, seeds: int = 3, share: float = 0.9) -> dict[str, Answer]:
    found = plan(TIMES, Offered(TEXT, 10), PlanGoal(rate, share=share, seeds=seeds))
    return {answer.kind: answer for answer in found.answers}


@pytest.mark.parametrize("least", [1, 2, 3, 7, 30, 38])
def test_the_least_size_is_found_wherever_the_search_begins(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, lambda system, seed: 0.95 if system.devices >= least else 0.5)
    for rate in (0.1, 10.0, 60.0):
        found = answers(rate)["replicas"]
        assert found.chosen is not None and found.chosen.devices == least
        assert found.sure and (found.below is None if least == 1 else found.below.devices == least - 1)


def test_large_sizes_are_told_apart_to_a_part_of_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = made_up(monkeypatch, lambda system, seed: 0.95 if system.devices >= 333 else 0.5)
    found = answers()["replicas"]
    assert found.chosen is not None and 333 <= found.chosen.devices < 350
    assert found.below is not None and 316 < found.below.devices < 333
    assert len({system for system, _ in ran if system.replicas}) < 20


@pytest.mark.parametrize(("encode", "language"), [(1, 1), (2, 4), (6, 6), (12, 60), (30, 6)])
def test_a_split_gets_the_encode_peers_that_it_needs(
    encode: int, language: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the share of the work says; it is nothing for text."""

    def attained(system: System, seed: int) -> float:
        if not system.encode:
            return 1.0 if system.devices >= 5 else 0.0
        return min(1.0, system.encode / encode) * min(1.0, system.language / language)

    ran = made_up(monkeypatch, attained)
    found = plan(TIMES, Offered(TEXT, 10), PlanGoal(100.0, share=0.999))
    for answer in found.answers:
        if answer.kind in ("split-waits", "split-overlap"):
            least = encode + language
            assert answer.chosen is not None and least <= answer.chosen.devices <= least * 1.05
            assert answer.chosen.encode >= encode and answer.chosen.language >= language
    assert len(ran) < 250


def test_where_the_encode_peers_are_far_too_few_nothing_leads_uphill(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sizes that failed for want of language peers did best with one encode peer, and there it stayed for ever."""
    offered, rate = Offered(named_mix("images-1-8"), 10), 100.0
    busy = rate * work(TIMES, offered.at(rate, 0)).tower_s
    assert busy > 3

    def attained(system: System, seed: int) -> float:
        if not system.encode:
            return min(1.0, system.devices / 6)
        if system.encode > 1.2 * busy:
            return min(1.0, system.language / 50)
        return 0.05 + 0.01 / system.encode

    ran = made_up(monkeypatch, attained)
    for answer in plan(TIMES, offered, PlanGoal(rate)).answers:
        assert answer.chosen is not None, answer.kind
        assert answer.chosen.devices == 6 or 45 <= answer.chosen.devices < 65, answer.kind
    assert max(system.devices for system, _ in ran) < 150


def test_other_seeds_judge_than_those_that_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed of the search finds five enough; all others want seven."""
    ran = made_up(monkeypatch, lambda system, seed: 0.95 if system.devices >= (5 if seed == 0 else 7) else 0.5)
    found = answers()["replicas"]
    assert found.chosen is not None and found.chosen.devices == 7
    assert found.chosen.attained.seeds == 3 and found.sure
    assert {seed for system, seed in ran if system == replicas(7)} >= {1, 2, 3}
    made_up(monkeypatch, lambda system, seed: 0.95 if system.devices >= (9 if seed == 0 else 7) else 0.5)
    found = answers()["replicas"]
    assert found.chosen is not None and found.chosen.devices == 7


def test_where_seeds_differ_more_are_heard_and_then_it_is_not_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    def attained(system: System, seed: int) -> float:
        return 0.95 + 0.04 * (-1) ** seed if system.devices >= 5 else 0.3

    made_up(monkeypatch, attained)
    found = answers(seeds=2)["replicas"]
    assert found.chosen is not None and found.chosen.devices == 5 and found.chosen.attained.seeds == 4
    assert not found.sure and "reaches below the goal" in found.why
    made_up(monkeypatch, lambda system, seed: 0.95 if system.devices >= 5 else 0.3)
    found = answers(seeds=1)["replicas"]
    assert found.sure and found.chosen is not None and found.chosen.attained.seeds == 2, "one alone says nothing"


@pytest.mark.parametrize(("judged", "share", "sure"), [(2, 0.9, False), (2000, 0.999, True), (2000, 0.9999, False)])
def test_that_all_seeds_agree_says_no_more_than_their_requests_do(
    judged: int, share: float, sure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal seeds had an interval of nothing: 100 % of three times two requests was sure to be above any goal."""
    made_up(monkeypatch, lambda system, seed: 1.0, judged=judged)
    found = answers(share=share)["replicas"]
    assert found.chosen is not None and found.chosen.devices == 1 and found.sure is sure
    assert sure or "reaches below the goal" in found.why


def test_where_more_devices_are_no_help_none_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """They went up to 4,096."""
    ran = made_up(monkeypatch, lambda system, seed: 0.2, busy=0.05)
    found = answers(1.0)
    assert all(answer.chosen is None and "5% busy, are not enough: 20.0%" in answer.why for answer in found.values())
    assert max(system.devices for system, _ in ran) < 10


def test_what_nobody_meets_who_is_alone_is_not_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits went up to two thousand devices, one encode peer of which was always busy."""
    ran = made_up(monkeypatch, lambda system, seed: 0.0)
    found = plan(TIMES, Offered(named_mix("servegen"), 50), PlanGoal(20.0, slo=1.0))
    assert not ran
    for answer in found.answers:
        assert answer.chosen is None and not answer.sure and "alone" in answer.why and answer.tried == ()
    made_up(monkeypatch, lambda system, seed: 0.95 if system.devices >= 5 else 0.5)
    met = plan(TIMES, Offered(named_mix("servegen"), 50), PlanGoal(20.0, slo=1.2))
    assert [answer.chosen.devices for answer in met.answers if answer.chosen] == [5] * 4


def test_a_prompt_that_fits_nowhere_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = made_up(monkeypatch, lambda system, seed: 0.0)
    with pytest.raises(ConfigError, match=r"cpu-115m: 100% .* 19200 \+ 1024 tokens, kv_tokens is 16384"):
        plan(read_times("cpu-115m"), Offered(named_mix("documents"), 50), PlanGoal(0.01))
    assert not ran
    small = msgspec.structs.replace(TIMES, kv_tokens=4096)
    mostly = Mix(exactly(0), ((32, 32),), exactly(100), exactly(10))
    assert Cluster(replicas(1), small).misfits(generate(mostly, Gamma(1.0), 20)) == []


# -- runs that are long enough -----------------------------------------------------------------------------------------


def test_a_run_lasts_until_the_load_has_built_up() -> None:
    offered = Offered(TEXT, 100)
    assert offered.lasting(0.5, 3.0).requests == 100, "three minutes"
    assert offered.lasting(40.0, 3.0).requests == 40 * LEAST_S
    assert offered.lasting(40.0, 30.0).requests == 40 * 120
    answers_s = longest_s(TIMES, offered.at(1.0, 0), 5.0)
    assert answers_s == pytest.approx(5 * 128 * TIMES.decode[0][1] / 1e3, rel=0.1)


def test_what_was_planned_holds_when_the_load_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred requests had all come before the first answers were over; 33 devices they took, of which 11 do."""
    monkeypatch.setattr(planning, "KINDS", {"replicas": ""})
    slow = msgspec.structs.replace(TIMES, decode=tuple((many, 4 * ms) for many, ms in TIMES.decode))
    mix, rate = Mix(exactly(0), ((32, 32),), exactly(200), exactly(300)), 8.0
    found: Plan = plan(slow, Offered(mix, 100), PlanGoal(rate, seeds=2))
    assert found.requests / rate > 4 * 25
    chosen = found.answers[0].chosen
    assert chosen is not None and chosen.devices < 15
    later, less = (
        run(replicas(devices), slow, generate(mix, Gamma(rate), 1000, 77)).attained
        for devices in (chosen.devices, chosen.devices - 2)
    )
    assert later > 0.85 and less < 0.9


def test_only_the_middle_of_a_run_is_judged() -> None:
    workload = generate(TEXT, Gamma(5.0), 200, 3)
    middle = steady(workload, 4.0)
    assert 0 < middle.start < middle.stop < 200
    assert workload[middle.start].arrival_s >= workload[0].arrival_s + 4.0 > workload[middle.start - 1].arrival_s
    assert workload[middle.stop - 1].arrival_s <= workload[-1].arrival_s - 4.0 < workload[middle.stop].arrival_s
    cluster = Cluster(flexible(1), TIMES)
    cluster.run(workload)
    own = cluster.requests[middle.start : middle.stop]
    said = run(flexible(1), TIMES, workload, settle_s=4.0, slo=2.0)
    assert said.judged == said.e2e.count == len(own)
    assert said.attained == sum(meets(request, 2.0) for request in own) / len(own)
    assert steady(workload, 1e3) == range(200), "of a run that is too short, all"


def test_a_hopeless_run_is_not_run_to_its_end() -> None:
    spent = work(TIMES, generate(TEXT, Gamma(1.0), 100)).total_s
    workload = generate(TEXT, Gamma(8 / spent), 600)
    whole, cut = (run(replicas(1), TIMES, workload, settle_s=0.5, goal=goal) for goal in (0.0, 0.9))
    assert whole.attained < 0.9 and cut.attained < 0.9
    assert cut.events < 0.7 * whole.events
    fine = generate(TEXT, Gamma(0.3 / spent), 200)
    whole, same = (run(replicas(1), TIMES, fine, settle_s=0.5, goal=goal) for goal in (0.0, 0.9))
    assert whole == same and whole.attained >= 0.9


def test_who_waits_for_ever_is_late_too() -> None:
    """Behind a tower with too much to do only text ended; so a split that served nothing else seemed to do well."""
    mix = named_mix("mixed")
    tower_s = work(TIMES, generate(mix, Gamma(1.0), 100)).tower_s
    workload = generate(mix, Gamma(6 / tower_s), 900)
    system = split_overlap(9, 1)
    whole, cut = (run(system, TIMES, workload, settle_s=0.5, goal=goal) for goal in (0.0, 0.9))
    assert cut.attained < whole.attained < 0.7
    assert cut.events < 0.6 * whole.events
