"""What batches of a tower teach of its costs, however many items they have and however they leave."""

from __future__ import annotations

import random

import pytest

from aiodisagg.scheduler.book import TOGETHER_S, PeerBook
from aiodisagg.scheduler.cost import PeerCosts, Rates, Size
from aiodisagg.scheduler.placement import PeerView, Wanted, place

SLOW = 4.0
"""The tower of these tests takes so many times what the priors say."""


def tower_s(*sizes: Size) -> float:
    rates = Rates()
    patches, squares = sum(size.patches for size in sizes), sum(size.squares for size in sizes)
    return SLOW * (rates.tower_s + rates.tower_patch_s * patches + rates.tower_square_s * squares)


class Tower:
    """One batch after another; its items are told of ``apart_s`` after each other."""

    def __init__(self, apart_s: float) -> None:
        self.book: PeerBook[str] = PeerBook(PeerCosts())
        self.apart_s, self.now, self.items = apart_s, 0.0, 0

    def work(self, *sizes: Size, seconds: float = 0.0) -> None:
        book, seconds = self.book, seconds or tower_s(*sizes)
        keys = [f"item {self.items + i}" for i in range(len(sizes))]
        self.items += len(keys)
        for key, size in zip(keys, sizes, strict=True):
            placed = place(Wanted(key, size), [PeerView("p", book.costs, book.backlog(self.now))])
            assert placed is not None
            book.asked(key, key, size, placed, self.now)
            book.entered(key, "encoding", 1e-3, self.now)
        self.now += seconds
        for key in keys:
            book.entered(key, "encoded", seconds, self.now)
            book.ready(key, self.now)
            book.left(key)
            self.now += self.apart_s


@pytest.mark.parametrize("apart_s", [0.0, 20e-6])
@pytest.mark.parametrize("count", [33, 64, 300])
def test_a_large_batch_is_one_observation(count: int, apart_s: float) -> None:
    """The 33rd item had all of the batch's time booked on the 32 before it, and what was behind took no time at all."""
    rng, tower = random.Random(1), Tower(apart_s)
    sizes = [Size.of((1, side, side)) for side in (16, 24, 32)]
    for _ in range(30):
        tower.work(*rng.choices(sizes, k=count))
    model = tower.book.costs.tower
    assert model.observed == 29, "perhaps more of the last batch are to leave"
    assert model.error < 0.05
    for batch in ([sizes[0]] * count, [sizes[2]] * count):
        patches, squares = sum(size.patches for size in batch), sum(size.squares for size in batch)
        assert model.predict((1.0, patches, squares)) == pytest.approx(tower_s(*batch), rel=0.1)


@pytest.mark.parametrize("apart_s", [0.0, 20e-6])
def test_batches_of_all_sizes_teach_what_one_item_takes(apart_s: float) -> None:
    rng, tower = random.Random(2), Tower(apart_s)
    sizes = [Size.of((1, side, side)) for side in (16, 24, 32, 48)]
    for _ in range(60):
        tower.work(*rng.choices(sizes, k=rng.choice([1, 8, 64, 100])))
    assert tower.book.costs.tower.error < 0.05
    for size in sizes:
        assert tower.book.costs.predict(size).tower_s == pytest.approx(tower_s(size), rel=0.1)


def test_small_batches_that_follow_each_other_closely_are_several() -> None:
    """Each of them leaves so shortly after the one before that by time alone they were one batch without an end."""
    tower, size = Tower(0.0), Size.of((1, 4, 4))
    seconds = TOGETHER_S / 2
    for _ in range(200):
        tower.work(size, size, seconds=seconds)
    assert tower.book.costs.tower.observed == 199
    assert tower.book.costs.tower.predict((1.0, 2 * size.patches, 2 * size.squares)) == pytest.approx(seconds, rel=0.1)
