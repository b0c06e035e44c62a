"""Many decode steps at once are the same steps, and a shared device does all its work."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from aiodisagg.bench.distributions import Ranges
from aiodisagg.bench.mixes import named_mix
from aiodisagg.bench.workload import Gamma, ImageSpec, Mix, WorkloadRequest, generate
from aiodisagg.engine.pace import Pace, StepShape
from aiodisagg.engine.schedule import Scheduler, Segment
from aiodisagg.simulate.clock import Clock
from aiodisagg.simulate.cluster import Cluster, System
from aiodisagg.simulate.device import Device
from aiodisagg.simulate.engine import Engine, TokenGaps
from aiodisagg.simulate.leap import LeapingScheduler
from aiodisagg.simulate.request import Item, SimRequest
from aiodisagg.simulate.systems import flexible, replicas
from aiodisagg.simulate.times import Costs, read_times


class Twin:
    """A scheduler step by step, and one that leaps, in front of the same requests."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        size = {"num_pages": 40, "page_size": 4, "token_budget": 64, "max_running": 6}
        self.plain, self.leaping = Scheduler(**size), LeapingScheduler(**size)
        self.left: dict[str, int] = {}
        self.leapt = 0

    def add(self, name: str, prompt: int, output: int) -> None:
        for scheduler in (self.plain, self.leaping):
            scheduler.add(name, prompt, output, prompt)
        self.left[name] = output

    def go(self) -> None:
        """Until some request ends: both must have done the same."""
        step = self.leaping.plan_step(0.0)
        segments, steps = list(step.segments), 1
        if all(s.samples and s.tokens == 1 and self.left[s.request_id] < self.outputs[s.request_id] for s in segments):
            steps = self.leaping.most_steps(segments, min(self.left[s.request_id] for s in segments))
            segments = self.leaping.leap(segments, steps)
            self.leapt += steps > 1
        for _ in range(steps):
            plain = self.plain.plan_step(0.0)
            for segment in plain.segments:
                self._advance(self.plain, segment, self.left[segment.request_id])
        assert plain.segments == tuple(segments)
        for segment in segments:
            more = self.left[segment.request_id] - (steps if segment.samples else 0)
            self._advance(self.leaping, segment, more + 1 if segment.samples else more)
            self.left[segment.request_id] = more
        for name in [name for name, more in self.left.items() if not more]:
            del self.left[name]
            self.plain.remove(name)
            self.leaping.remove(name)
        assert (self.plain.running, self.plain.waiting) == (self.leaping.running, self.leaping.waiting)
        assert self.plain.pages.free == self.leaping.pages.free

    @staticmethod
    def _advance(scheduler: Scheduler, segment: Segment, left: int) -> None:
        scheduler.advance(segment, sampled=segment.samples)

    def run(self) -> None:
        self.outputs = {}
        for i in range(12):
            prompt, output = self.random.randint(1, 40), self.random.randint(1, 60)
            self.outputs[str(i)] = output
            self.add(str(i), prompt, output)
            for _ in range(self.random.randint(0, 4)):
                if self.left:
                    self.go()
        while self.left:
            self.go()


def test_a_leap_decides_what_its_steps_would_have() -> None:
    leapt = 0
    for seed in range(40):
        twin = Twin(seed)
        twin.run()
        leapt += twin.leapt
        assert twin.leaping.pages.free == 40
    assert leapt > 200


UNBOUND = msgspec.structs.replace(flexible(2), inter_token_ms=0.0)


@pytest.mark.parametrize("system", [replicas(2), UNBOUND], ids=lambda system: system.name)
def test_a_cluster_that_leaps_has_the_same_times(system: object) -> None:
    """Arrivals cut leaps at the end of the step at work. With a context term a step in a leap lasts as the mean one,
    and other times may teach that another peer is a little nearer.

    Without an inter-token budget: the pace of an engine is taught by a leap once, not by each of its steps.
    """
    mix = Mix(Ranges(((0, 2, 1.0),)), ((1280, 720),), Ranges(((20, 400, 1.0),)), Ranges(((1, 80, 1.0),)))
    workload = generate(mix, Gamma(12.0), 120, 3)
    for context, same in ((0.0, 1e-9), (0.029, 1e-2)):
        times = msgspec.structs.replace(read_times("h200-modelled"), decode_context_us=context)
        ends = []
        for leaps in (True, False):
            cluster = Cluster(system, times, leaps=leaps)  # type: ignore[arg-type]  # pytest's ids want an object
            cluster.run(workload)
            ends.append([(r.first_s, r.end_s) for r in cluster.requests])
        for leapt, stepped in zip(*ends, strict=True):
            assert leapt == pytest.approx(stepped, abs=same)


def test_two_lanes_share_a_device_and_nothing_is_lost() -> None:
    clock = Clock()
    device = Device(clock, tower_share=0.25, shared_speed=1.0)
    ended: dict[str, float] = {}
    device.engine.start(3.0, lambda: ended.__setitem__("engine", clock.now))
    clock.at(1.0, lambda: device.tower.start(0.5, lambda: ended.__setitem__("tower", clock.now)))
    clock.run()
    # From 1.0 on the tower gets a quarter: its 0.5 take 2.0; the engine has then done 1.0 + 1.5 of its 3.0.
    assert ended == {"tower": pytest.approx(3.0), "engine": pytest.approx(3.5)}
    assert device.busy_s == pytest.approx(3.5)
    assert device.tower.busy_s == pytest.approx(2.0)


def test_with_priorities_who_goes_first_follows_from_the_step() -> None:
    """A step with prompts holds the tower up and not itself; one that only decodes is held up, and is said to be."""
    for prompts, engine_s, tower_s in ((True, 1.0 / 0.95, 1.5), (False, 1.5, 0.5 / 0.95)):
        clock = Clock()
        device = Device(clock, tower_share=0.5, shared_speed=1.0, priorities=True)
        ended: dict[str, float] = {}
        device.prompts = prompts
        device.engine.start(1.0, lambda: ended.__setitem__("engine", clock.now))  # noqa: B023 - ends in this turn
        device.tower.start(0.5, lambda: ended.__setitem__("tower", clock.now))  # noqa: B023
        clock.run()
        assert ended == {"engine": pytest.approx(engine_s), "tower": pytest.approx(tower_s)}
        both = min(engine_s, tower_s)
        assert (device.batch_waited_s, device.step_waited_s) == pytest.approx((both, 0) if prompts else (0, both))
        assert device.busy_s == pytest.approx(1.5), "nothing is lost"


@pytest.mark.parametrize("third_s", [0.039, 5.0])
def test_rows_that_do_not_come_are_not_waited_for(third_s: float) -> None:
    """Two pictures came 13 ms apart, and a step is dear: it waits for the third, but not when that is late."""
    clock, pace = Clock(), Pace(0.05)
    for tokens in (300, 900, 1500, 2100) * 4:
        pace.observe(StepShape(prefill=tokens), 0.04 + 16e-6 * tokens)
    ended: list[SimRequest] = []
    engine = Engine(
        Device(clock, tower_share=0.5, shared_speed=1.0), Costs(read_times("h200")), TokenGaps(), inline=False,
        ended=ended.append, first=lambda one: None, pace=pace, coalesce_tokens=64,
    )  # fmt: skip
    images = tuple(ImageSpec(n, 1280, 720) for n in range(3))
    request = SimRequest(0, WorkloadRequest(0.0, images, 50, 1), 3 * 880 + 50, 1.0, 0.1)
    request.items = [Item(request, n, n, 880) for n in range(3)]

    def arrives(item: Item) -> None:
        item.arrived = item.rows
        engine.arrived(request)

    engine.add(request)
    for item, at in zip(request.items, (0.013, 0.026, third_s), strict=True):
        clock.at(at, arrives, item)
    clock.run()
    assert ended == [request]
    assert (third_s <= request.served_s) if third_s < 1 else (0.03 < request.served_s < 0.3)


def test_a_prompt_alone_costs_as_many_steps_as_the_engine_makes_of_it() -> None:
    """Its end is no step of its own."""
    times = msgspec.structs.replace(read_times("h200-modelled"), token_budget=1000, prefill_base_ms=50.0)
    costs = Costs(times)
    steps = [costs.prefill_s(n + 1) - costs.prefill_s(n) > 0.01 for n in (1000, 1124, 1125, 2000, 2124, 2125)]
    assert steps == [False, False, True, False, False, True]


def test_priorities_make_first_tokens_sooner_than_equal_parts() -> None:
    workload = generate(named_mix("images-1-8"), Gamma(5.0), 60, 5)
    system = System("equal", both=2, turns=False)
    means = []
    for one in (system, msgspec.structs.replace(system, priorities=True)):
        cluster = Cluster(one, read_times("h200"))
        cluster.run(workload)
        means.append(sum(r.first_s - r.source.arrival_s for r in cluster.requests) / len(cluster.requests))
    assert means[1] < 0.9 * means[0]
