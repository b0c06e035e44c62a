"""The schedule as tables, and its invariants under random traffic."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiodisagg.engine.schedule import Scheduler, Segment, Step


def make(*, num_pages: int = 8, page_size: int = 4, token_budget: int = 16, max_running: int = 8) -> Scheduler:
    return Scheduler(num_pages=num_pages, page_size=page_size, token_budget=token_budget, max_running=max_running)


def ranges(step: Step) -> list[tuple[str, int, int]]:
    return [(s.request_id, s.start, s.stop) for s in step.segments]


def run(scheduler: Scheduler) -> Step:
    """One step, everything computed, every sampled token wanted."""
    step = scheduler.plan_step()
    for segment in step.segments:
        scheduler.advance(segment, sampled=segment.samples)
    return step


def test_decodes_go_first_and_the_prompt_is_cut_to_the_budget() -> None:
    s = make()
    s.add("a", 4, 4, front=4)
    assert ranges(run(s)) == [("a", 0, 4)]
    s.add("b", 20, 4, front=20)
    assert ranges(run(s)) == [("a", 4, 5), ("b", 0, 15)]
    second = run(s)
    assert second.segments == (Segment("a", 5, 6, True), Segment("b", 15, 20, True))


def test_prefill_stops_at_the_first_missing_row_and_goes_on_when_it_comes() -> None:
    s = make()
    s.add("a", 12, 1, front=5)
    assert ranges(run(s)) == [("a", 0, 5)]
    assert ranges(run(s)) == []
    s.set_front("a", 9)
    s.set_front("a", 7)  # an older report changes nothing
    step = run(s)
    assert step.segments == (Segment("a", 5, 9, False),)
    s.set_front("a", 12)
    assert run(s).segments == (Segment("a", 9, 12, True),)


def test_pages_are_reserved_before_any_row_is_there() -> None:
    s = make()
    s.add("a", 17, 1, front=0)
    step = s.plan_step()
    assert step.admitted == ("a",) and step.segments == ()
    assert len(s.pages_of("a")) == 5 and s.pages.free == 3


def test_admission_is_in_order_and_leaves_a_page_for_who_runs() -> None:
    s = make(num_pages=8)
    s.add("a", 16, 8, front=16)
    s.add("b", 16, 1, front=16)  # 4 pages are free, but then none for a's next token
    s.add("c", 4, 1, front=4)  # would fit, but b was first
    assert s.plan_step().admitted == ("a",)
    assert s.waiting == ("b", "c")
    s.remove("a")
    assert s.plan_step().admitted == ("b", "c")


def test_the_newest_gives_its_pages_to_the_oldest_and_comes_back_with_all_it_had() -> None:
    s = make(num_pages=4)
    s.add("old", 4, 8, front=4)
    s.add("new", 4, 8, front=4)
    run(s)
    for _ in range(4):
        step = run(s)  # both take their second page, 4 of 4 pages used
    assert s.pages.free == 0 and step.preempted == ()
    step = run(s)
    assert step.preempted == ("new",) and ranges(step) == [("old", 8, 9)]
    assert s.running == ("old",) and s.waiting == ("new",)
    assert run(s).admitted == ()
    s.remove("old")
    step = run(s)
    assert step.admitted == ("new",) and step.segments == (Segment("new", 0, 9, True),)


def test_the_only_one_that_needs_a_page_can_be_its_own_victim() -> None:
    s = make(num_pages=4, token_budget=8)
    s.add("slow", 8, 1, front=0)  # holds two pages and waits for rows
    s.add("new", 4, 8, front=4)
    for _ in range(5):
        run(s)
    step = run(s)
    assert step.preempted == ("new",) and s.running == ("slow",)
    s.set_front("slow", 8)
    assert ranges(run(s)) == [("slow", 0, 8)]


def test_victims_wait_in_their_old_order_before_newcomers() -> None:
    s = make(num_pages=6, page_size=2)
    for name in ("a", "b", "c"):
        s.add(name, 1, 10, front=1)
    s.add("new", 8, 1, front=8)
    while s.running != ("a", "b"):
        run(s)
    assert s.waiting == ("c", "new")
    while s.running != ("a",):
        run(s)
    assert s.waiting == ("b", "c", "new")


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([40, 4], [("r0", 0, 12), ("r1", 0, 4)]),  # a short prompt passes, the long one keeps the rest
        ([40, 20], [("r0", 0, 8), ("r1", 0, 8)]),  # but half belongs to the oldest
        ([40, 4, 4, 4], [("r0", 0, 8), ("r1", 0, 4), ("r2", 0, 4)]),
        ([20, 40], [("r0", 0, 16)]),  # who is oldest and needs least gets all
    ],
)
def test_the_budget_is_shared(prompts: list[int], expected: list[tuple[str, int, int]]) -> None:
    s = make(num_pages=64, token_budget=16)
    for i, prompt in enumerate(prompts):
        s.add(f"r{i}", prompt, 1, front=prompt)
    assert ranges(s.plan_step()) == expected


def test_a_stream_of_short_prompts_does_not_starve_a_long_one() -> None:
    s = make(num_pages=64, token_budget=8, max_running=16)
    s.add("long", 64, 1, front=64)
    steps = 0
    while s.running == () or s.running[0] == "long":
        s.add(f"short{steps}", 8, 1, front=8)
        for segment in run(s).segments:
            if segment.samples:
                s.remove(segment.request_id)
        steps += 1
    assert steps <= 64 // 4 + 1


def test_what_can_never_fit_is_refused_and_the_largest_fits() -> None:
    s = make(num_pages=2, page_size=4)
    with pytest.raises(ValueError, match="9 are the most"):
        s.add("a", 8, 2, front=8)
    s.add("a", 8, 1, front=8)
    with pytest.raises(ValueError, match="known"):
        s.add("a", 1, 1, front=1)
    assert run(s).segments == (Segment("a", 0, 8, True),)


def test_removing_what_is_gone_is_no_error() -> None:
    s = make()
    s.add("a", 4, 1, front=4)
    s.remove("a")
    s.remove("a")
    assert s.pages.free == 8 and s.plan_step() == Step((), (), ())


class Traffic:
    """Drives a scheduler and checks after every step what must hold."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.s = scheduler
        self.left: dict[str, int] = {}  # tokens still wanted
        self.prompts: dict[str, int] = {}
        self.seen: dict[str, int] = {}  # arrival order
        self.computed: dict[str, int] = {}

    def add(self, prompt: int, tokens: int, front: int) -> None:
        name = f"r{len(self.seen)}"
        self.seen[name] = len(self.seen)
        self.left[name], self.prompts[name], self.computed[name] = tokens, prompt, 0
        self.s.add(name, prompt, tokens, min(front, prompt))

    def end(self, name: str) -> None:
        self.s.remove(name)
        del self.left[name]

    def step(self) -> Step:
        step = self.s.plan_step()
        for name in step.preempted:
            self.computed[name] = 0
        assert sum(x.tokens for x in step.segments) <= self.s.token_budget
        assert len({x.request_id for x in step.segments}) == len(step.segments)
        for x in step.segments:
            assert x.start == self.computed[x.request_id] < x.stop
            assert x.stop <= len(self.s.pages_of(x.request_id)) * self.s.page_size
        self.check()
        for x in step.segments:
            self.computed[x.request_id] = x.stop
            if x.samples:
                self.left[x.request_id] -= 1
            if x.samples and not self.left[x.request_id]:
                self.end(x.request_id)
            else:
                self.s.advance(x, sampled=x.samples)
        return step

    def check(self) -> None:
        owned = [page for name in self.left for page in self.s.pages_of(name)]
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert len(owned) + self.s.pages.free == self.s.pages.count
        orders = [self.seen[name] for name in (*self.s.running, *self.s.waiting)]
        assert orders == sorted(orders), "every running request is older than every waiting one"
        assert all(self.s.pages_of(name) for name in self.s.running)
        assert not any(self.s.pages_of(name) for name in self.s.waiting)


event = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 12), st.integers(0, 40)),
    st.tuples(st.just("add"), st.integers(1, 4), st.integers(4, 30), st.just(40)),  # long answers: preemptions
    st.tuples(st.just("step")),
    st.tuples(st.just("step")),
    st.tuples(st.just("front"), st.integers(0, 20), st.integers(0, 40)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
)


@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(event, max_size=60),
    num_pages=st.integers(2, 14),
    page_size=st.integers(1, 8),
    budget=st.integers(1, 24),
    max_running=st.integers(1, 6),
)
def test_no_page_is_owned_twice_and_everybody_finishes(
    events: list[tuple[object, ...]], num_pages: int, page_size: int, budget: int, max_running: int
) -> None:
    s = Scheduler(num_pages=num_pages, page_size=page_size, token_budget=budget, max_running=max_running)
    traffic = Traffic(s)
    for kind, *args in events:
        names = sorted(traffic.left)
        numbers = [int(str(a)) for a in args]
        if kind == "add" and numbers[0] + numbers[1] <= s.largest():
            traffic.add(*numbers)
        elif kind == "step":
            traffic.step()
        elif kind == "front" and names:
            name = names[numbers[0] % len(names)]
            s.set_front(name, min(numbers[1], traffic.prompts[name]))
        elif kind == "cancel" and names:
            traffic.end(names[numbers[0] % len(names)])
        traffic.check()
    for name in traffic.left:
        s.set_front(name, traffic.prompts[name])
    work = sum(traffic.prompts[n] + traffic.left[n] for n in traffic.left)
    for _ in range(2 * work * (len(traffic.left) + 1) + 2):
        if not traffic.left:
            break
        traffic.step()
    assert not traffic.left, f"{traffic.left} never finished: {s!r}"
    assert s.pages.free == num_pages and not s.running and not s.waiting
