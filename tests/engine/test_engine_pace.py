"""Prefill beside running streams, in virtual time: steps cost what a formula says, and nobody told the scheduler."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from aiodisagg.engine.pace import NO_READS, Pace, Reads, StepShape
from aiodisagg.engine.schedule import Scheduler, Segment

BUDGET_S = 0.05


@dataclass(frozen=True)
class Machine:
    """Seconds: of a step, of each decode, of 1000 keys that decodes read, of a prompt token, of a million pairs; and
    what reading experts takes."""

    step: float = 0.008
    decode: float = 0.0003
    keys: float = 0.0001
    token: float = 0.00004
    pairs: float = 0.001
    reads: Reads = NO_READS

    def seconds(self, shape: StepShape) -> float:
        return (
            self.step
            + self.reads.seconds(shape.decodes + shape.prefill)
            + self.decode * shape.decodes
            + self.keys * shape.context / 1e3
            + self.token * shape.prefill
            + self.pairs * shape.attention / 1e6
        )


GPU = Machine()
SLOW = Machine(step=0.02, decode=0.006, keys=0.002, token=0.0005, pairs=0.2)  # decodes alone take more than the budget
LONG = Machine(pairs=0.01)  # attention is most of a long prompt
EXPERTS = Machine(step=0.003, reads=Reads(0.018, 1 / 16))  # a decode reads few, a prompt all of them


@dataclass
class Run:
    """A scheduler, a clock that steps move, and what each request saw."""

    machine: Machine
    pace: Pace | None
    noise: Callable[[], float] = lambda: 1.0
    now: float = 0.0
    left: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, list[float]] = field(default_factory=dict)
    steps: list[tuple[StepShape, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.s = Scheduler(num_pages=10_000, page_size=16, token_budget=2048, max_running=256, pace=self.pace)

    def add(self, name: str, prompt: int, tokens: int) -> None:
        self.left[name], self.tokens[name] = tokens, []
        self.s.add(name, prompt, tokens, front=prompt)

    def step(self) -> None:
        step = self.s.plan_step(0.0)
        shape = StepShape.of(step.segments)
        took = self.machine.seconds(shape) * self.noise()
        self.now += took
        self.steps.append((shape, took))
        if self.pace is not None:
            self.pace.observe(shape, took)
        for segment in step.segments:
            self.take(segment)

    def take(self, segment: Segment) -> None:
        name = segment.request_id
        self.s.advance(segment, sampled=segment.samples)
        if segment.samples:
            self.tokens[name].append(self.now)
            self.left[name] -= 1
            if not self.left[name]:
                self.s.remove(name)
                del self.left[name]

    def until(self, done: Callable[[], object]) -> None:
        while not done():
            self.step()

    def worst_wait(self) -> float:
        """The longest anybody waited between two tokens."""
        return max(b - a for times in self.tokens.values() for a, b in itertools.pairwise(times))


def burst(run: Run) -> None:
    """Eight streams run; then 24 prompts of 500 to 6,000 tokens come at once."""
    for i in range(8):
        run.add(f"stream{i}", 100 + 10 * i, 100_000)
    run.until(lambda: all(len(run.tokens[f"stream{i}"]) > 20 for i in range(8)))
    for i in range(24):
        run.add(f"long{i}", 500 + 240 * i, 8)
    run.until(lambda: all(name.startswith("stream") for name in run.left))


def bound(run: Run, shape: StepShape) -> float:
    """What the budget promises for a step with these decodes."""
    return max(BUDGET_S, 1.5 * before(run.machine, shape))


def before(machine: Machine, shape: StepShape) -> float:
    """What such a step takes before its first prompt token: its decodes, and nearly all experts."""
    reads = machine.reads.all_s - machine.reads.seconds(shape.decodes)
    return machine.seconds(StepShape(decodes=shape.decodes, context=shape.context)) + reads


@pytest.mark.parametrize("machine", [GPU, SLOW, LONG, EXPERTS], ids=["gpu", "slow", "long", "experts"])
def test_a_burst_of_prompts_does_not_stop_running_streams(machine: Machine) -> None:
    run, unbounded = Run(machine, Pace(BUDGET_S, machine.reads)), Run(machine, None)
    burst(run)
    burst(unbounded)
    beside = [(shape, took) for shape, took in run.steps if shape.decodes and shape.prefill]
    assert all(took <= 1.1 * bound(run, shape) for shape, took in beside)
    assert run.worst_wait() <= 1.1 * max(bound(run, shape) for shape, _ in run.steps)
    assert unbounded.worst_wait() > 1.2 * run.worst_wait(), "nothing had to be bounded"
    # The room is used: prompts get a third of the time at least, and half of it where the budget leaves that.
    assert run.now < (3.5 if machine is SLOW else 2.5) * unbounded.now


def test_a_noisy_machine_that_now_and_then_stops() -> None:
    draw = random.Random(5)
    run = Run(GPU, Pace(BUDGET_S), noise=lambda: 12.0 if draw.random() < 0.06 else draw.uniform(0.8, 1.25))
    burst(run)
    beside = [(shape, took) for shape, took in run.steps if shape.decodes and shape.prefill]
    calm = sorted(took for shape, took in beside if took < 3 * GPU.seconds(shape))
    assert len(calm) < len(beside) - 5
    assert calm[len(calm) // 2] < 1.1 * BUDGET_S and calm[-1] < 3 * BUDGET_S
    chunks = sorted(shape.prefill for shape, _ in beside)
    assert chunks[len(chunks) // 2] > 400, "stops made it careful for long"


def test_a_machine_that_becomes_slower_is_noticed_within_a_few_steps() -> None:
    run = Run(GPU, Pace(BUDGET_S))
    burst(run)
    run.machine = Machine(*(4 * cost for cost in (GPU.step, GPU.decode, GPU.keys, GPU.token, GPU.pairs)))
    before = len(run.steps)
    for i in range(6):
        run.add(f"more{i}", 4000, 8)
    run.until(lambda: not any(name.startswith("more") for name in run.left))
    late = [(shape, took) for shape, took in run.steps[before + 30 :] if shape.decodes and shape.prefill]
    assert late and all(took <= 1.2 * bound(run, shape) for shape, took in late)


def test_without_streams_a_step_is_as_large_as_it_may_be() -> None:
    run = Run(GPU, Pace(BUDGET_S))
    run.add("long", 6000, 1)
    run.until(lambda: not run.left)
    assert [shape.prefill for shape, _ in run.steps] == [2048, 2048, 1904]


def test_what_was_never_measured_is_approached_in_doubling_steps() -> None:
    pace = Pace(BUDGET_S)
    decodes, asked = StepShape(decodes=4, context=400), []
    for _ in range(7):
        asked.append(pace.prefill_beside(decodes, 0, 2048))
        shape = StepShape(4, 400, asked[-1], 0.5 * asked[-1] ** 2)
        pace.observe(shape, GPU.seconds(shape))
    assert asked[:4] == [64, 128, 256, 512]
    assert GPU.seconds(StepShape(4, 400, asked[-1], 0.5 * asked[-1] ** 2)) == pytest.approx(BUDGET_S, rel=0.1)


def test_prefill_always_goes_on_and_gets_a_third_of_the_time_when_the_budget_is_too_small() -> None:
    pace = Pace(0.001)
    for tokens in (64, 128, 32, 256, 1, 512):
        for decodes in (1, 4, 16):
            shape = StepShape(decodes, 100 * decodes, tokens, 0.5 * tokens**2)
            pace.observe(shape, SLOW.seconds(shape))
            pace.observe(StepShape(decodes, 100 * decodes), SLOW.seconds(StepShape(decodes, 100 * decodes)))
    streams = StepShape(decodes=10, context=1000)
    tokens = pace.prefill_beside(streams, 0, 2048)
    assert SLOW.token * tokens == pytest.approx(SLOW.seconds(streams) / 2, rel=0.2)
    assert Pace(1e-9).prefill_beside(StepShape(decodes=1), 0, 1) == 1


def test_steps_that_read_all_experts_are_not_made_small_for_a_budget_they_cannot_keep() -> None:
    run = Run(EXPERTS, Pace(0.025, EXPERTS.reads))
    burst(run)
    beside = [(shape, took) for shape, took in run.steps if shape.decodes and shape.prefill]
    assert all(took <= 1.1 * max(0.025, 1.5 * before(EXPERTS, shape)) for shape, took in beside)
    chunks = sorted(shape.prefill for shape, _ in beside)
    assert EXPERTS.token * chunks[len(chunks) // 2] > 0.3 * EXPERTS.reads.all_s, "reading took nearly all of the time"


def test_decodes_that_read_some_experts_already_leave_room_for_as_much_more_of_a_prompt() -> None:
    """Reading is paid for once: 40 decodes that take 32 ms leave 18 of 50, not 18 less all experts."""
    machine, pace, draw = EXPERTS, Pace(BUDGET_S, EXPERTS.reads), random.Random(3)
    for _ in range(100):
        decodes, tokens = draw.randint(1, 40), draw.choice([0, 0, draw.randint(2, 1500)])
        shape = StepShape(decodes, 100 * decodes, tokens, 0.5 * tokens**2)
        pace.observe(shape, machine.seconds(shape))
    for decodes in (4, 16, 40):
        streams = StepShape(decodes, 100 * decodes)
        assert pace.expect(streams) == pytest.approx(machine.seconds(streams), rel=0.05)
        tokens = pace.prefill_beside(streams, 0, 10_000)
        took = machine.seconds(StepShape(decodes, 100 * decodes, tokens, 0.5 * tokens**2))
        assert took == pytest.approx(max(BUDGET_S, 1.5 * before(machine, streams)), rel=0.05)


def test_expectations_are_right_where_nothing_was_measured() -> None:
    pace, draw = Pace(BUDGET_S), random.Random(1)
    for _ in range(200):
        tokens = draw.choice([0, 0, draw.randint(2, 800)])
        shape = StepShape(draw.randint(0, 32), draw.randint(0, 40_000), tokens, tokens * draw.uniform(0, 4000))
        pace.observe(shape, LONG.seconds(shape))
    for shape in (StepShape(64, 64_000), StepShape(0, 0, 2000, 2e6), StepShape(8, 8000, 1000, 8e6)):
        assert pace.expect(shape) == pytest.approx(LONG.seconds(shape), rel=0.15)


# -- few rows ----------------------------------------------------------------------------------------------------


def make(coalesce: int = 8, overlap: bool = True) -> Scheduler:
    return Scheduler(
        num_pages=64, page_size=4, token_budget=32, max_running=8, coalesce_tokens=coalesce, overlap=overlap
    )


def ranges(s: Scheduler, now: float = 0.0) -> list[tuple[str, int, int]]:
    """One step, everything computed."""
    step = s.plan_step(now)
    for segment in step.segments:
        s.advance(segment, sampled=segment.samples)
    return [(x.request_id, x.start, x.stop) for x in step.segments]


def test_a_few_rows_wait_for_more_while_others_keep_the_engine_busy() -> None:
    s = make()
    s.add("stream", 2, 9, front=2)
    ranges(s)
    s.add("image", 40, 1, front=3)
    assert ranges(s) == [("stream", 2, 3)]
    s.set_front("image", 7)
    assert ranges(s) == [("stream", 3, 4)]
    s.set_front("image", 8)  # together they are worth a chunk
    assert ranges(s) == [("stream", 4, 5), ("image", 0, 8)]
    s.set_front("image", 10)
    assert ranges(s) == [("stream", 5, 6)]
    s.remove("stream")
    assert ranges(s) == [("image", 8, 10)], "nothing else to do: two tokens are better than none"


def test_an_idle_engine_computes_every_row_at_once() -> None:
    s = make()
    s.add("a", 20, 1, front=1)
    s.add("b", 20, 1, front=2)
    assert ranges(s) == [("a", 0, 1), ("b", 0, 2)]
    for front in (3, 4, 9):
        s.set_front("a", front)
        assert ranges(s)[0][::2] == ("a", front)


def test_the_last_rows_are_never_left() -> None:
    s = make()
    s.add("stream", 2, 9, front=2)
    ranges(s)
    s.add("image", 12, 1, front=8)
    assert ranges(s)[1:] == [("image", 0, 8)]
    s.set_front("image", 11)
    assert ranges(s)[1:] == []
    s.set_front("image", 12)
    assert ranges(s)[1:] == [("image", 8, 12)]


def test_a_prefill_of_many_rows_keeps_the_engine_busy_too() -> None:
    s = make()
    s.add("large", 100, 1, front=100)
    s.add("small", 40, 1, front=3)
    assert ranges(s) == [("large", 0, 32)]
    s.remove("large")
    assert ranges(s) == [("small", 0, 3)]


def test_without_overlap_a_prefill_begins_with_the_last_row() -> None:
    s = make(overlap=False)
    s.add("a", 20, 1, front=19)
    assert ranges(s) == []
    s.set_front("a", 20)
    assert ranges(s) == [("a", 0, 20)]


def test_an_idle_engine_leaves_what_costs_less_than_a_step() -> None:
    """A large model reads its weights in every step: 400 prompt tokens of GPU take as long as reading them."""
    pace = Pace(BUDGET_S)
    for prefill in (256, 1024, 512, 2048, 64, 1500):
        shape = StepShape(prefill=prefill)
        pace.observe(shape, GPU.seconds(shape))
    s = Scheduler(num_pages=1000, page_size=16, token_budget=2048, max_running=8, pace=pace)
    s.add("images", 2000, 2, front=100)
    assert ranges(s) == [], "its next image may come while these would be computed"
    s.set_front("images", 900)
    assert ranges(s) == [("images", 0, 900)]
    s.set_front("images", 1000)
    assert ranges(s) == []
    s.add("text", 10, 2, front=10)
    assert ranges(s) == [("images", 900, 1000), ("text", 0, 10)], "somebody else's step takes it along"
    s.remove("text")
    s.set_front("images", 2000)
    assert ranges(s) == [("images", 1000, 2000)], "the last rows are never left"


def idle(stops: Sequence[int], *, prompt: int = 1000) -> Scheduler:
    """An idle engine that knows its GPU. A request has just got its pages, at 10 s; its first 10 tokens are text."""
    pace = Pace(BUDGET_S)
    for prefill in (256, 1024, 512, 2048, 64, 1500):
        shape = StepShape(prefill=prefill)
        pace.observe(shape, GPU.seconds(shape))
    s = Scheduler(num_pages=1000, page_size=16, token_budget=2048, max_running=8, pace=pace)
    s.add("images", prompt, 2, front=10, stops=stops)
    assert ranges(s, 10.0) == [] or prompt == 10
    return s


def test_an_idle_engine_begins_if_the_rest_takes_longer_than_a_step_costs() -> None:
    s = idle([510])
    s.set_front("images", 510, 10.0 + 2 * GPU.step)
    assert ranges(s, 10.0 + 2 * GPU.step) == [("images", 0, 510)], "the other half is expected at four times a step"
    s = idle([510])
    s.set_front("images", 510, 10.0 + 0.5 * GPU.step)
    assert ranges(s, 10.0 + 0.5 * GPU.step) == [], "the other half will be here in less than a step costs"
    s.set_front("images", 1000, 10.0 + GPU.step)
    assert ranges(s, 10.0 + GPU.step) == [("images", 0, 1000)]


def test_an_idle_engine_waits_for_the_last_of_many_that_is_about_to_come() -> None:
    """What lies between arrivals counts, and not how long the first one took: 2 s, then four tenths of a step each."""
    s = idle([210, 410, 610, 810])
    every = 0.4 * GPU.step
    for i, front in enumerate((210, 410, 610, 810)):
        s.set_front("images", front, 12.0 + i * every)
    assert ranges(s, 12.0 + 3 * every) == [], "the fifth is a little away"
    again_s = s.plan_step(12.0 + 3 * every).again_s
    assert again_s == pytest.approx(1.5 * every * 190 / 200)
    late = 12.0 + 3 * every + again_s
    assert ranges(s, late - 1e-6) == [] and s.plan_step(late - 1e-6).again_s == pytest.approx(1e-6)
    assert ranges(s, late) == [], "it may take as long again, which is less than a step costs"
    again_s = s.plan_step(late).again_s
    assert again_s == pytest.approx(late - 12.0 - 3 * every)
    assert ranges(s, late + 2 * again_s) == [("images", 0, 810)], "it should have been here long ago"


def test_the_step_before_the_last_takes_as_much_as_it_can_without_delaying_the_last() -> None:
    """Four small images at a distance of most of a step: two and two are sooner than one and three, or all at once."""
    s = idle([60, 110, 160], prompt=210)
    every = 0.8 * GPU.step
    s.set_front("images", 60, 10.0 + every)
    assert ranges(s, 10.0 + every) == []
    s.set_front("images", 110, 10.0 + 2 * every)
    assert ranges(s, 10.0 + 2 * every) == [("images", 0, 110)]


def with_pages() -> tuple[Scheduler, list[bytes]]:
    """An idle engine whose pages hold 320 tokens, and their keys."""
    s, keys = idle([], prompt=10), [bytes([i]) for i in range(20)]
    s.remove("images")
    s.add("first", 320, 1, front=320, keys=keys)
    ranges(s, 11.0)
    s.remove("first")
    return s, keys


def test_what_pages_held_does_not_count_as_rows_that_came() -> None:
    s, keys = with_pages()
    s.add("again", 1520, 2, front=0, keys=keys, stops=[320, 420])
    assert ranges(s, 12.0) == [] and s.reused("again") == 320
    s.set_front("again", 320)
    s.set_front("again", 420, 12.002)
    assert ranges(s, 12.002) == [("again", 320, 420)], "a hundred in 2 ms, and not 420: the rest takes 22"


def test_text_behind_what_pages_held_does_not_count_as_rows_that_came() -> None:
    """A conversation goes on: its history is in pages, then comes a question, and then a new image."""
    s, keys = with_pages()
    s.add("again", 3000, 2, front=0, keys=keys, stops=[1520, 2500])
    assert ranges(s, 12.0) == [] and s.reused("again") == 320
    s.set_front("again", 1520)
    assert ranges(s, 12.00005) == [("again", 320, 1520)], "nothing says that the image will be here at once"
