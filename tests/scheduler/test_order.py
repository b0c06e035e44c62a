"""The order of those that wait: as a table, and what holds for whoever comes in whatever order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiodisagg.scheduler.order import Claim, Order, Queue

TEXT_S, IMAGE_S = 0.01, 0.5


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Claim(2, math.inf, 0, TEXT_S), Claim(1, math.inf, 0, IMAGE_S)),  # short before long
        (Claim(1, math.inf, 0, 1.1), Claim(2, math.inf, 0, 1.0)),  # what is nearly equal by arrival
        (Claim(2, math.inf, -1, IMAGE_S), Claim(1, math.inf, 0, TEXT_S)),  # but the better class before all
        (Claim(2, 5.0, 9, IMAGE_S), Claim(1, math.inf, -9, TEXT_S)),  # and who is due before any class
        (Claim(1, 5.0, 9, IMAGE_S), Claim(2, 4.0, -9, TEXT_S)),  # of those in order of arrival
        (Claim(1, math.inf, 0, 0.0), Claim(2, math.inf, 0, 1e-9)),  # nothing to do is shortest
    ],
)
def test_short_first(first: Claim, second: Claim) -> None:
    assert Order.SHORT_FIRST.rank(first, 5.0) < Order.SHORT_FIRST.rank(second, 5.0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Claim(1, math.inf, 0, IMAGE_S), Claim(2, math.inf, 0, TEXT_S)),
        (Claim(2, math.inf, -1, IMAGE_S), Claim(1, math.inf, 0, TEXT_S)),
        (Claim(2, 5.0, 9, IMAGE_S), Claim(1, 5.1, -9, TEXT_S)),
    ],
)
def test_first_come(first: Claim, second: Claim) -> None:
    assert Order.FIRST_COME.rank(first, 5.0) < Order.FIRST_COME.rank(second, 5.0)


@dataclass(eq=False)
class Wanted:
    """A request in front of one server. ``has_images``: it needs fifty times as long."""

    claim: Claim
    came: float
    has_images: bool
    began: float | None = None
    passed_by: list[Wanted] = field(default_factory=list)


def serve(order: Order, asked: list[tuple[float, bool, int]], bound_s: float) -> list[Wanted]:
    """``asked``: (seconds after the one before, has images, class); everybody is served, one at a time."""
    coming, at = [], 0.0
    for n, (gap_s, has_images, priority) in enumerate(asked):
        at += gap_s
        claim = Claim(n, at + bound_s, priority, IMAGE_S if has_images else TEXT_S)
        coming.append(Wanted(claim, at, has_images))
    queue: Queue[Wanted] = Queue(order)
    now, left, done = 0.0, list(coming), []
    while left or len(queue):
        while left and (left[0].came <= now or not len(queue)):
            now = max(now, left[0].came)
            queue.add(left[0], left.pop(0).claim)
        one = queue.first(now)
        assert one is not None
        # What the queue finds without looking at all is what is first among all.
        assert one is min(queue, key=lambda each: order.rank(each.claim, now))
        queue.remove(one)
        one.began = now
        for other in queue:
            other.passed_by.append(one)
        done.append(one)
        now += one.claim.service
    assert sorted(one.claim.arrived for one in done) == list(range(len(asked)))
    assert queue.first(now) is None and queue.next_due == math.inf
    return done


requests = st.lists(st.tuples(st.floats(0.0, 0.4), st.booleans(), st.integers(-1, 1)), max_size=60)
orders = st.sampled_from(Order)
bounds = st.sampled_from([0.0, 0.3, 2.0, 1e6])


@settings(max_examples=200, deadline=None)
@given(orders, requests, bounds)
def test_nobody_who_is_due_is_passed_by_who_came_later_and_is_not(
    order: Order, asked: list[tuple[float, bool, int]], bound_s: float
) -> None:
    for one in serve(order, asked, bound_s):
        for other in one.passed_by:
            assert other.began is not None
            if other.began >= one.claim.due:
                assert other.claim.due <= other.began and other.claim.arrived < one.claim.arrived


@settings(max_examples=200, deadline=None)
@given(requests)
def test_text_passes_images_while_nothing_is_due(asked: list[tuple[float, bool, int]]) -> None:
    """Of one class, no text waits for a request with images that begins after it came."""
    alike = [(gap_s, has_images, 0) for gap_s, has_images, _ in asked]
    for one in serve(Order.SHORT_FIRST, alike, 1e6):
        assert one.has_images or not any(other.has_images for other in one.passed_by)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("bound_s", [0.5, 3.0])
def test_endless_text_delays_an_image_by_its_bound_and_one_service_at_most(order: Order, bound_s: float) -> None:
    """There is always a text of a better class in line, as texts come a little faster than they are served."""
    asked = [(0.99 * TEXT_S, n == 200, 0 if n == 200 else -1) for n in range(1000)]
    (image,) = [one for one in serve(order, asked, bound_s) if one.has_images]
    assert image.began is not None
    assert bound_s <= image.began - image.came <= bound_s + TEXT_S
