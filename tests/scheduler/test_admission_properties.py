"""What holds for every run: one fate for each, the aging bound, fair shares, the same again."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiodisagg.scheduler.admission import Charged
from aiodisagg.scheduler.prices import Work
from aiodisagg.scheduler.shares import DEBT_S, Tenant
from tests.scheduler.lines import Asked, Front, Run

EPSILON = 1e-6
TENANTS = [Tenant("a"), Tenant("b", 2.0), Tenant("c", 0.5)]
seconds = st.floats(0.0, 3.0, allow_subnormal=False)
works = st.one_of(
    st.builds(Work, st.integers(1, 4_000)),
    st.builds(lambda pictures: Work(100 + 1_000 * pictures, 100_000 * pictures), st.integers(1, 8)),
)
requests = st.builds(
    Asked,
    at=seconds,
    work=works,
    tenant=st.sampled_from(TENANTS),
    priority=st.integers(-1, 1),
    within=st.one_of(st.just(1e9), st.floats(0.0, 5.0)),
    leaves_after=st.one_of(st.none(), seconds),
)
settings_of_queue = st.fixed_dictionaries(
    {
        "max_queue": st.integers(1, 20),
        "max_ttft_s": st.sampled_from([0.5, 5.0, 1e9]),
        "max_wait_s": st.sampled_from([0.1, 1.0, 10.0]),
        "window_s": st.sampled_from([0.01, 1.0]),
        "min_in_flight": st.integers(1, 4),
        "max_running": st.integers(1, 6),
        "known": st.booleans(),
    }
)


def run(asked: list[Asked], config: dict[str, float], slowness: float = 1.0, decodes_s: float = 0.0) -> Run:
    return Run(Front.of(**config), asked, slowness=slowness, decodes_s=decodes_s)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(st.lists(requests, max_size=40), settings_of_queue, st.sampled_from([0.01, 1.0, 30.0]), seconds)
def test_everybody_has_exactly_one_fate_and_nothing_remains(
    asked: list[Asked], config: dict[str, float], slowness: float, decodes_s: float
) -> None:
    made = run(asked, config, slowness, decodes_s)
    for name, seen in made.seen.items():
        assert len(seen.fates) == 1, (name, seen)
        assert seen.released_at is None or seen.fates == ["ended"]
    queue = made.front.queue
    assert not list(queue.waiting) and not queue.running and not queue._shares._flows
    assert queue.next_timer() is None
    for lane in queue.lanes:
        assert len(lane) == 0 and lane.in_flight_s(1e9) == 0.0 and not lane.somebody_waits


@settings(max_examples=150, deadline=None)
@given(st.lists(requests, max_size=40), settings_of_queue, st.sampled_from([1.0, 30.0]))
def test_at_any_speed_nobody_is_passed_by_who_came_after_its_aging_bound(
    asked: list[Asked], config: dict[str, float], slowness: float
) -> None:
    made = run(asked, config, slowness)
    for passed, passer, now in made.overtaken:
        assert passer.arrived < passed.release_by, (passed, passer, now)
        assert passed.release_by <= passed.arrived + config["max_wait_s"]


@settings(max_examples=200, deadline=None)
@given(st.lists(requests, max_size=40), st.sampled_from([0.5, 2.0, 10.0]))
def test_at_the_predicted_speed_passing_delays_nobody_beyond_the_aging_bound(
    asked: list[Asked], max_wait_s: float
) -> None:
    """Eight pictures and single ones of one tenant, in three classes: each is released by its bound, or by the start
    that was predicted for it when it came, if that was later already."""
    for one in asked:
        one.tenant, one.only_in_line = TENANTS[0], True
    config = {"max_wait_s": max_wait_s, "known": True, "min_in_flight": 1, "window_s": 0.1}
    made = run(asked, config)
    for seen in made.seen.values():
        if seen.entry is None or seen.released_at is None:
            continue
        entry = seen.entry
        assert entry.predicted_s is not None
        predicted_start = entry.arrived + entry.predicted_s - made.front.price(entry.work)
        assert seen.released_at <= max(entry.release_by, predicted_start) + EPSILON, entry


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 8)), min_size=6, max_size=60), st.integers(1, 4))
def test_shares_differ_by_at_most_a_largest_request_of_each(asked: list[tuple[int, int]], min_in_flight: int) -> None:
    """While two tenants wait, their services over their weights grow alike, whatever they ask for."""
    front = Front.of(min_in_flight=min_in_flight)
    pictures = [Work(1_000 * size, 4_000 * size) for _, size in asked]
    largest: dict[int, float] = defaultdict(float)
    for n, ((tenant, _), work) in enumerate(zip(asked, pictures, strict=True)):
        front.arrive(str(n), work, TENANTS[tenant])
        largest[tenant] = max(largest[tenant], front.price(work) / TENANTS[tenant].weight)
    front.said.clear()
    had: dict[str, float] = defaultdict(float)
    history = [(dict(had), {entry.flow.name for entry in front.queue.waiting})]
    running = list(front.queue._running)
    for name in running:
        before = len(front.said)
        running += front.token(name)
        for _, decision in front.said[before:]:
            if isinstance(decision, Charged):
                weight = next(tenant.weight for tenant in TENANTS if tenant.name == decision.tenant)
                had[decision.tenant] += decision.cost_s / weight
        history.append((dict(had), {entry.flow.name for entry in front.queue.waiting}))
    for i, one in enumerate(TENANTS):
        for j, other in enumerate(TENANTS[:i]):
            both = [had for had, waiting in history if {one.name, other.name} <= waiting]
            gaps = [had.get(one.name, 0.0) - had.get(other.name, 0.0) for had in both]
            assert max(gaps, default=0.0) - min(gaps, default=0.0) <= largest[i] + largest[j] + EPSILON


@pytest.mark.parametrize("scale", [1, 400])
@settings(max_examples=150, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(1, 3)), min_size=4, max_size=30),
    min_in_flight=st.integers(1, 4),
    data=st.data(),
)
def test_in_no_lane_is_one_served_that_is_ahead_of_another(
    scale: int, asked: list[tuple[int, bool, int]], min_in_flight: int, data: st.DataObject
) -> None:
    """All begin to wait at once. Whatever they get of two lanes, and in whatever order: who is served in a lane has not
    had more, over its weight and of both lanes, than anybody else who waits there; so nobody gets further ahead than
    by one request. Beyond all debts, that holds for what it has had of this lane."""
    front = Front.of(min_in_flight=min_in_flight)
    for n in range(min_in_flight):  # both lanes are full when they come
        front.arrive(f"text {n}", Work(100), Tenant("z"))
        front.arrive(f"media {n}", Work(100, 100), Tenant("z"))
    for n, (tenant, has_media, size) in enumerate(asked):
        front.arrive(str(n), Work(1_000 * size * scale, 4_000 * size * scale * has_media), TENANTS[tenant])
    had: dict[str, float] = defaultdict(float)
    of_lane: dict[tuple[str, bool], float] = defaultdict(float)
    running = list(front.queue._running)
    while running:
        name = running.pop(data.draw(st.integers(0, len(running) - 1)))
        waiting = {entry.request_id: entry for entry in front.queue.waiting}
        for released in front.token(name):
            entry = waiting.pop(released)
            flow, lane = entry.flow, entry.has_media
            for other in {one.flow for one in waiting.values() if one.has_media is lane} - {flow}:
                assert of_lane[flow.name, lane] <= had[other.name] + EPSILON
                assert had[flow.name] <= had[other.name] + EPSILON or had[flow.name] > DEBT_S
            had[flow.name] += front.price(entry.work) / flow.weight
            of_lane[flow.name, lane] += front.price(entry.work) / flow.weight
            running.append(released)


@settings(max_examples=50, deadline=None)
@given(st.lists(requests, max_size=30), settings_of_queue)
def test_equal_events_give_equal_decisions(asked: list[Asked], config: dict[str, float]) -> None:
    assert run(asked, config).front.said == run(asked, config).front.said
