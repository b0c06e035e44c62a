"""Which pieces the tower takes next: order, budget, cuts between frame pairs, cancelling."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiodisagg.encode.queue import Piece, TowerQueue
from aiodisagg.scheduler.order import Claim


def names(batch: list[Piece]) -> list[tuple[str, int, int]]:
    return [(piece.digest, piece.start, piece.stop) for piece in batch]


def test_what_was_asked_for_first_goes_first_whenever_it_was_prepared() -> None:
    queue = TowerQueue(budget=10)
    for digest, order in (("c", 3), ("a", 1), ("b", 2)):
        queue.add(digest, Claim(order), 1, 10)
    assert [queue.take(0.0)[0].digest for _ in range(3)] == ["a", "b", "c"]
    assert not queue and queue.take(0.0) == []


def test_a_batch_is_filled_from_the_front_and_never_with_what_does_not_fit() -> None:
    queue = TowerQueue(budget=10)
    for order, (digest, patches) in enumerate((("a", 4), ("b", 4), ("large", 5), ("small", 1))):
        queue.add(digest, Claim(order), 1, patches)
    assert names(queue.take(0.0)) == [("a", 0, 1), ("b", 0, 1)]  # "small" would fit, but must not overtake "large"
    assert names(queue.take(0.0)) == [("large", 0, 1), ("small", 0, 1)]


def test_an_image_larger_than_the_budget_goes_alone() -> None:
    queue = TowerQueue(budget=10)
    for order, (digest, patches) in enumerate((("a", 1), ("huge", 99), ("b", 1))):
        queue.add(digest, Claim(order), 1, patches)
    assert [names(queue.take(0.0)) for _ in range(3)] == [[("a", 0, 1)], [("huge", 0, 1)], [("b", 0, 1)]]


def test_a_video_is_cut_between_frame_pairs_and_fills_batches() -> None:
    queue = TowerQueue(budget=10)
    queue.add("image", Claim(0), 1, 4)
    queue.add("video", Claim(1), 5, 3)
    queue.add("next", Claim(2), 1, 3)
    taken = [names(queue.take(0.0)) for _ in range(3)]
    assert taken == [[("image", 0, 1), ("video", 0, 2)], [("video", 2, 5)], [("next", 0, 1)]]


def test_frame_pairs_larger_than_the_budget_go_one_by_one() -> None:
    queue = TowerQueue(budget=10)
    queue.add("video", Claim(0), 3, 50)
    batches = [queue.take(0.0) for _ in range(3)]
    assert [names(batch) for batch in batches] == [[("video", i, i + 1)] for i in range(3)]
    assert [batch[0].last for batch in batches] == [False, False, True]


def test_cancelling_takes_out_what_has_not_begun() -> None:
    queue = TowerQueue(budget=10)
    queue.add("video", Claim(0), 4, 5)
    queue.add("image", Claim(1), 1, 5)
    assert names(queue.take(0.0)) == [("video", 0, 2)]
    for digest in ("video", "video", "unknown"):
        queue.cancel(digest)
    assert names(queue.take(0.0)) == [("image", 0, 1)]


def test_within_a_class_the_tower_goes_by_arrival_whatever_a_request_needs() -> None:
    """The last picture of many would wait for all requests of one."""
    queue = TowerQueue(budget=10)
    queue.add("of eight", Claim(0, due=100.0, service=80), 1, 10)
    queue.add("alone", Claim(1, due=110.0, service=10), 1, 10)
    queue.add("urgent", Claim(2, due=120.0, priority=-1, service=80), 1, 10)
    assert queue.first(0.0) == "urgent"
    assert [queue.take(0.0)[0].digest for _ in range(3)] == ["urgent", "of eight", "alone"]


def test_nobody_is_overtaken_once_it_is_due() -> None:
    queue = TowerQueue(budget=10)
    queue.add("large", Claim(0, due=5.0), 1, 10)
    for order in range(1, 6):
        queue.add(f"urgent {order}", Claim(order, due=5.0 + order, priority=-1), 1, 10)
    assert [queue.take(now)[0].digest for now in (4.0, 4.9, 5.0, 5.0)] == ["urgent 1", "urgent 2", "large", "urgent 3"]


def test_what_is_to_be_alone_shares_no_batch_and_is_not_left_for_another() -> None:
    queue = TowerQueue(budget=10)
    queue.add("before", Claim(0), 1, 2)
    queue.add("suspect", Claim(1, due=10.0), 4, 3, alone=True)
    queue.add("after", Claim(2, due=10.0), 1, 2)
    assert not queue.alone(0.0) and names(queue.take(0.0)) == [("before", 0, 1)]
    assert queue.alone(0.0) and names(queue.take(0.0)) == [("suspect", 0, 3)]
    queue.add("urgent", Claim(3, due=10.0, priority=-1), 1, 2)
    assert queue.alone(0.0) and names(queue.take(0.0)) == [("suspect", 3, 4)]
    assert not queue.alone(0.0) and names(queue.take(0.0)) == [("urgent", 0, 1), ("after", 0, 1)]


def test_a_suspect_that_is_cancelled_in_the_middle_keeps_nobody_waiting() -> None:
    queue = TowerQueue(budget=10)
    queue.add("suspect", Claim(1), 4, 5, alone=True)
    queue.add("after", Claim(2), 1, 5)
    queue.take(0.0)
    queue.cancel("suspect")
    assert not queue.alone(0.0) and names(queue.take(0.0)) == [("after", 0, 1)]


def test_a_claim_counts_from_when_it_changes() -> None:
    queue = TowerQueue(budget=10)
    for order, digest in enumerate(("a", "b", "c")):
        queue.add(digest, Claim(order, due=10.0), 1, 5)
    queue.change("c", Claim(2, due=10.0, priority=-1), alone=False)
    queue.change("b", Claim(1, due=10.0), alone=True)
    queue.change("gone", Claim(9), alone=True)
    assert [names(queue.take(0.0)) for _ in range(2)] == [[("c", 0, 1), ("a", 0, 1)], [("b", 0, 1)]]


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
        queue.add(f"{order:02d}", Claim(order), *items[order])
    taken: list[tuple[str, int]] = []
    while batch := queue.take(0.0):
        patches = sum(piece.patches for piece in batch)
        assert patches <= budget or (len(batch) == 1 and batch[0].stop - batch[0].start == 1)
        for piece in batch:
            taken += [(piece.digest, frame) for frame in range(piece.start, piece.stop)]
            assert piece.last == (piece.stop == items[int(piece.digest)][0])
    assert taken == [(f"{order:02d}", frame) for order, (frames, _) in enumerate(items) for frame in range(frames)]
