"""Invariants of the schedule under random traffic."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiodisagg.engine.schedule import Scheduler, Segment, Step
from aiodisagg.scheduler.order import Order


class Traffic:
    """Drives a scheduler as the step thread does, and checks after every step what must hold.

    Requests of one family begin with the same ``alike`` tokens. The pool is a token for each slot; tokens of the
    common part are named by the family, others by the request.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.s = scheduler
        self.now = 0.0
        self.dues: dict[str, float] = {}
        self.tokens = self.preemptions = 0
        self.left: dict[str, int] = {}  # tokens still wanted
        self.prompts: dict[str, int] = {}
        self.fronts: dict[str, int] = {}  # tokens whose rows have come
        self.alike: dict[str, tuple[int, int]] = {}
        self.keys: dict[str, list[bytes]] = {}
        self.seen: dict[str, int] = {}  # arrival order
        self.computed: dict[str, int] = {}
        self.reused: dict[str, int] = {}
        self.reach: dict[str, int] = {}
        self.known: dict[str, int] = {}
        self.pool: dict[tuple[int, int], str] = {}

    def token(self, name: str, at: int) -> str:
        family, alike = self.alike[name]
        return f"{family}:{at}" if at < alike else f"{name}:{at}"

    def know(self, name: str, tokens: int) -> None:
        keys = self.keys[name]
        while (len(keys) + 1) * self.s.page_size <= tokens:
            keys.append(self.token(name, (len(keys) + 1) * self.s.page_size - 1).encode())
        self.known[name] = tokens

    def add(
        self, prompt: int, tokens: int, front: int, family: int, alike: int, waits: float, priority: int
    ) -> None:  # fmt: skip
        name = f"r{len(self.seen)}"
        self.seen[name] = len(self.seen)
        self.left[name], self.prompts[name], self.fronts[name] = tokens, prompt, min(front, prompt)
        self.computed[name] = self.reused[name] = 0
        self.reach[name] = self.fronts[name]
        self.alike[name], self.keys[name] = (family, min(alike, prompt)), []
        self.know(name, prompt)
        self.dues[name] = self.now + waits
        self.s.add(
            name, prompt, tokens, self.fronts[name], self.keys[name], due=self.dues[name], priority=priority
        )  # fmt: skip

    def arrive(self, name: str, front: int) -> None:
        self.fronts[name] = max(self.fronts[name], min(front, self.prompts[name]))
        self.tell(name)

    def tell(self, name: str) -> None:
        """Rows in reused pages are not needed; what is behind them is text in half of the requests."""
        front, reused = self.fronts[name], self.reused[name]
        if front < reused:
            front = self.prompts[name] if self.seen[name] % 2 else reused
        self.reach[name] = front
        self.s.set_front(name, front)

    def end(self, name: str, *, spoilt: bool = False) -> None:
        """``spoilt``: its pages hold nonsense now, and who comes next must not find them."""
        pages, size = self.s.pages_of(name), self.s.page_size
        others = {page for other in self.left if other != name for page in self.s.pages_of(other)}
        self.s.remove(name, spoilt=spoilt)
        del self.left[name]
        if spoilt:
            self.pool.update({(page, at): "nonsense" for page in {*pages} - others for at in range(size)})

    def let_in(self, names: Sequence[str]) -> None:
        for name in names:
            self.computed[name] = self.reused[name] = self.s.reused(name)
            assert self.reused[name] < self.known[name], "nothing is left to get logits from"
            self.tell(name)

    def step(self, *, whole: bool = False, newcomer: tuple[int, ...] = ()) -> Step:
        """``newcomer``: who comes while the step is computed."""
        self.now += 1.0
        step = self.s.plan_step(self.now, whole=whole)
        self.preemptions += len(step.preempted)
        self.check_order(step)
        for name in step.preempted:
            self.computed[name] = self.reused[name] = 0
            self.tell(name)
        self.let_in(step.admitted)
        assert not whole or all(self.reach[x.request_id] >= self.prompts[x.request_id] for x in step.segments)
        if newcomer and newcomer[0] + newcomer[1] <= self.s.largest():
            self.add(*newcomer)
            self.let_in(self.s.admit(self.now))
        tokens, budget = sum(x.tokens for x in step.segments), self.s.token_budget
        assert tokens <= budget or (step.segments[-1].samples and tokens <= budget + budget // 8)
        assert len({x.request_id for x in step.segments}) == len(step.segments)
        for x in step.segments:
            self.compute(x)
        self.check()
        for x in step.segments:
            self.computed[x.request_id] = x.stop
            if x.samples:
                self.left[x.request_id] -= 1
                self.tokens += 1
                self.dues[x.request_id] = -1.0  # who has a token goes by arrival
                self.know(x.request_id, self.known[x.request_id] + 1)
            self.s.advance(x, sampled=x.samples)
            if x.samples and not self.left[x.request_id]:
                self.end(x.request_id)
        return step

    def check_order(self, step: Step) -> None:
        """Nobody who is due is passed by who came later, or is not: not for pages, not for tokens, not as a victim."""
        went = [(x.request_id, name) for x in step.segments for name in self.s.running if self.ready(name)]
        went = [(a, b) for a, b in went if not self.decodes[a] and b not in {x.request_id for x in step.segments}]
        stayed = [name for name in self.s.waiting if name not in step.preempted]
        went += [(a, b) for a in step.admitted for b in stayed]
        went += [(a, b) for a in self.s.running for b in step.preempted if a not in step.admitted]
        for first, second in went:
            if self.dues[second] <= self.now:
                assert self.dues[first] <= self.now and self.seen[first] < self.seen[second], (first, second)

    def ready(self, name: str) -> bool:
        """It could have been given tokens: all of its rows are here."""
        return self.reach[name] >= self.prompts[name] and not self.decodes[name]

    @property
    def decodes(self) -> dict[str, bool]:
        return {
            name: self.known[name] > self.prompts[name] and self.known[name] - self.computed[name] == 1
            for name in self.left
        }

    def compute(self, x: Segment) -> None:
        name, pages, size = x.request_id, self.s.pages_of(x.request_id), self.s.page_size
        assert x.start == self.computed[name] < x.stop <= len(pages) * size
        assert min(x.stop, self.prompts[name]) <= self.reach[name], "rows that are not here were used"
        for at in range(x.start):
            found = self.pool[pages[at // size], at % size]
            assert found == self.token(name, at), f"{name} reads {found} at {at}"
        others = {page for other in self.left if other != name for page in self.s.pages_of(other)}
        for at in range(x.start, x.stop):
            assert pages[at // size] not in others, "a page has two writers, or a reader of what is not final"
            self.pool[pages[at // size], at % size] = self.token(name, at)

    def check(self) -> None:
        owned = {page for name in self.left for page in self.s.pages_of(name)}
        assert len(owned) + self.s.pages.free == self.s.pages.count
        assert self.preemptions <= self.tokens, "a preemption is paid for with a token"
        assert all(self.s.pages_of(name) for name in self.s.running)
        assert not any(self.s.pages_of(name) for name in self.s.waiting)


alike = (st.integers(0, 1), st.integers(0, 40))  # (family, tokens that all of the family begin with)
place = (st.sampled_from([-1, 5, 40, 10**9]), st.integers(-1, 1))  # (until it is due, class)
event = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 12), st.integers(0, 40), *alike, *place),
    st.tuples(
        st.just("add"),
        st.integers(1, 16),
        st.integers(4, 30),
        st.sampled_from([0, 40]),
        st.just(0),
        st.just(16),
        *place,
    ),
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.just("front"), st.integers(0, 20), st.integers(0, 40)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("spoil"), st.integers(0, 20)),
    st.tuples(st.just("whole"), st.integers(1, 3)),
    st.tuples(st.just("meanwhile"), st.integers(1, 30), st.integers(1, 12), st.sampled_from([0, 40]), *alike, *place),
)


@settings(max_examples=300, deadline=None)
@given(
    events=st.lists(event, max_size=60),
    num_pages=st.integers(2, 14),
    page_size=st.integers(1, 8),
    budget=st.integers(1, 24),
    max_running=st.integers(1, 6),
    coalesce=st.integers(0, 8),
    overlap=st.booleans(),
    order=st.sampled_from(Order),
)
def test_everybody_finishes_and_reads_only_what_it_would_have_computed(
    events: list[tuple[object, ...]], num_pages: int, page_size: int, budget: int, max_running: int, coalesce: int,
    overlap: bool, order: Order,
) -> None:  # fmt: skip
    s = Scheduler(
        num_pages=num_pages, page_size=page_size, token_budget=budget, max_running=max_running, overlap=overlap,
        coalesce_tokens=coalesce, order=order,
    )  # fmt: skip
    traffic = Traffic(s)
    for kind, *args in events:
        names = sorted(traffic.left)
        numbers = [int(str(a)) for a in args]
        if kind == "add" and numbers[0] + numbers[1] <= s.largest():
            traffic.add(*numbers)
        elif kind == "step":
            for _ in range(numbers[0]):
                traffic.step()
        elif kind == "front" and names:
            traffic.arrive(names[numbers[0] % len(names)], numbers[1])
        elif kind in ("cancel", "spoil") and names:
            traffic.end(names[numbers[0] % len(names)], spoilt=kind == "spoil")
        elif kind == "whole":
            for _ in range(numbers[0]):
                traffic.step(whole=True)
        elif kind == "meanwhile":
            traffic.step(newcomer=tuple(numbers))
        traffic.check()
    for name in traffic.left:
        traffic.arrive(name, traffic.prompts[name])
    work = sum(traffic.prompts[n] + traffic.left[n] for n in traffic.left)
    for _ in range(2 * work * (len(traffic.left) + 1) + 2):
        if not traffic.left:
            break
        traffic.step()
    assert not traffic.left, f"{traffic.left} never finished: {s!r}"
    assert s.pages.free == num_pages and not s.running and not s.waiting


@pytest.mark.parametrize("order", Order)
def test_preemptions_in_a_small_pool_keep_the_order_and_end(order: Order) -> None:
    """Eight long answers that cannot be held together, text and images, due sooner or later."""
    traffic = Traffic(Scheduler(num_pages=14, page_size=2, token_budget=16, max_running=8, order=order))
    for n in range(8):
        traffic.add(1 + n % 4, 20, 40, n, 0, (5.0, 60.0, 1e9)[n % 3], n % 2)
    for _ in range(1000):
        if traffic.left:
            traffic.step()
    assert not traffic.left and traffic.tokens == 8 * 20
    assert 0 < traffic.preemptions <= traffic.tokens // 2
