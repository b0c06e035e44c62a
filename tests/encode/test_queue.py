"""Which pieces the tower takes next: order, budget, cuts between frame pairs, cancelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiodisagg.encode import queue as queue_module
from aiodisagg.encode.queue import Piece, TowerQueue
from aiodisagg.scheduler.order import Claim


def names(batch: list[Piece]) -> list[tuple[str, int, int]]:
    return [(piece.digest, piece.start, piece.stop) for piece in batch]


def test_what_was_asked_for_first_goes_first_whenever_it_was_prepared() -> None:
    queue = TowerQueue(budget=10)
    for digest, order in (("c", 3), ("a", 1), ("b", 2)):
        queue.add(digest, Claim(order), 1, 10, digest)
    assert [queue.take(0.0)[0].digest for _ in range(3)] == ["a", "b", "c"]
    assert not queue and queue.take(0.0) == []


def test_a_batch_is_filled_from_the_front_and_never_with_what_does_not_fit() -> None:
    queue = TowerQueue(budget=10)
    for order, (digest, patches) in enumerate((("a", 4), ("b", 4), ("large", 5), ("small", 1))):
        queue.add(digest, Claim(order), 1, patches, digest)
    assert names(queue.take(0.0)) == [("a", 0, 1), ("b", 0, 1)]  # "small" would fit, but must not overtake "large"
    assert names(queue.take(0.0)) == [("large", 0, 1), ("small", 0, 1)]


def test_an_image_larger_than_the_budget_goes_alone() -> None:
    queue = TowerQueue(budget=10)
    for order, (digest, patches) in enumerate((("a", 1), ("huge", 99), ("b", 1))):
        queue.add(digest, Claim(order), 1, patches, digest)
    assert [names(queue.take(0.0)) for _ in range(3)] == [[("a", 0, 1)], [("huge", 0, 1)], [("b", 0, 1)]]


def test_a_video_is_cut_between_frame_pairs_and_fills_batches() -> None:
    queue = TowerQueue(budget=10)
    queue.add("image", Claim(0), 1, 4, "image")
    queue.add("video", Claim(1), 5, 3, "video")
    queue.add("next", Claim(2), 1, 3, "next")
    taken = [names(queue.take(0.0)) for _ in range(3)]
    assert taken == [[("image", 0, 1), ("video", 0, 2)], [("video", 2, 5)], [("next", 0, 1)]]


def test_frame_pairs_larger_than_the_budget_go_one_by_one() -> None:
    queue = TowerQueue(budget=10)
    queue.add("video", Claim(0), 3, 50, "video")
    batches = [queue.take(0.0) for _ in range(3)]
    assert [names(batch) for batch in batches] == [[("video", i, i + 1)] for i in range(3)]
    assert [batch[0].last for batch in batches] == [False, False, True]


def test_cancelling_takes_out_what_has_not_begun() -> None:
    queue = TowerQueue(budget=10)
    queue.add("video", Claim(0), 4, 5, "video")
    queue.add("image", Claim(1), 1, 5, "image")
    assert names(queue.take(0.0)) == [("video", 0, 2)]
    for digest in ("video", "video", "unknown"):
        queue.cancel(digest)
    assert names(queue.take(0.0)) == [("image", 0, 1)]


def test_one_picture_does_not_wait_for_the_many_of_a_prompt_that_was_not_begun() -> None:
    queue = TowerQueue(budget=10)
    for order in range(8):
        queue.add(f"of eight, {order}", Claim(order, due=100.0, service=80), 1, 10, "eight")
    queue.add("alone", Claim(8, due=110.0, service=10), 1, 10, "one")
    assert queue.first(0.0) == "alone"
    assert [queue.take(0.0)[0].digest for _ in range(3)] == ["alone", "of eight, 0", "of eight, 1"]


def test_a_request_that_was_begun_goes_on() -> None:
    """Its last picture waited for all requests of one picture, however many."""
    queue = TowerQueue(budget=10)
    for order in range(2):
        queue.add(f"of three, {order}", Claim(order, due=100.0, service=30), 1, 10, "three")
    assert queue.take(0.0)[0].digest == "of three, 0"
    queue.add("alone", Claim(2, due=110.0, service=10), 1, 10, "one")
    queue.add("of three, 2", Claim(3, due=100.0, service=30), 1, 10, "three")  # prepared late
    assert [queue.take(0.0)[0].digest for _ in range(3)] == ["of three, 1", "of three, 2", "alone"]


def test_of_requests_that_were_begun_a_bounded_number_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "BEGUN", 2)
    queue = TowerQueue(budget=10)
    for request in ("a", "b", "c"):
        queue.add(request, Claim(ord(request), due=100.0, service=80), 1, 10, request)
        queue.take(0.0)
    queue.add("a again", Claim(1000, due=100.0, service=80), 1, 10, "a")
    queue.add("new", Claim(1001, due=100.0, service=10), 1, 10, "new")
    queue.add("c again", Claim(1002, due=100.0, service=80), 1, 10, "c")
    assert [queue.take(0.0)[0].digest for _ in range(3)] == ["c again", "new", "a again"]


def test_nobody_is_overtaken_once_it_is_due() -> None:
    queue = TowerQueue(budget=10)
    queue.add("large", Claim(0, due=5.0, service=80), 1, 10, "large")
    for order in range(1, 6):
        queue.add(f"small {order}", Claim(order, due=5.0 + order, service=10), 1, 10, f"small {order}")
    assert [queue.take(now)[0].digest for now in (4.0, 4.9, 5.0, 5.0)] == ["small 1", "small 2", "large", "small 3"]


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 20)), min_size=1, max_size=12),
    st.integers(1, 24),
    st.randoms(use_true_random=False),
)
def test_every_frame_pair_is_taken_once_in_order_and_within_the_budget(
    items: list[tuple[int, int]], budget: int, draw: object
) -> None:
    queue = TowerQueue(budget)
    orders = list(range(len(items)))
    draw.shuffle(orders)  # type: ignore[attr-defined]
    for order in orders:
        queue.add(f"{order:02d}", Claim(order), *items[order], f"{order:02d}")
    taken: list[tuple[str, int]] = []
    while batch := queue.take(0.0):
        patches = sum(piece.patches for piece in batch)
        assert patches <= budget or (len(batch) == 1 and batch[0].stop - batch[0].start == 1)
        for piece in batch:
            taken += [(piece.digest, frame) for frame in range(piece.start, piece.stop)]
            assert piece.last == (piece.stop == items[int(piece.digest)][0])
    assert taken == [(f"{order:02d}", frame) for order, (frames, _) in enumerate(items) for frame in range(frames)]
