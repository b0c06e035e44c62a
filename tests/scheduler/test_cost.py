"""Costs: what the priors say, what is learned from observations, and what is not."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiodisagg.scheduler.cost import PeerCosts, Rates, ServiceTimes, Size, StageModel, Timing

RATES = Rates(
    prepare_s=0.5, prepare_patch_s=0.25, tower_s=2.0, tower_patch_s=1.0, tower_square_s=0.125,
    transfer_s=0.5, transfer_byte_s=0.01,
)  # fmt: skip
GRIDS = [(1, 8, 8), (1, 16, 16), (1, 32, 32), (4, 16, 24), (1, 60, 60)]


def slow(size: Size) -> float:
    """A tower unlike the priors in every coefficient."""
    return 0.02 + 5e-5 * size.patches + 3e-8 * size.squares


def learned(grids: list[tuple[int, int, int]], rounds: int, scale: float = 1.0) -> PeerCosts:
    costs = PeerCosts()
    for grid in itertools.islice(itertools.cycle(grids), rounds):
        costs.encoded([Size.of(grid)], scale * slow(Size.of(grid)))
    return costs


def error(costs: PeerCosts, grid: tuple[int, int, int], scale: float = 1.0) -> float:
    size = Size.of(grid)
    return abs(costs.predict(size).tower_s / (scale * slow(size)) - 1)


def test_a_size_counts_patches_and_the_squares_of_frame_pairs() -> None:
    assert Size.of((3, 4, 6), 77) == Size(72, 3 * 24**2, 77)


def test_priors_give_exact_times() -> None:
    found = PeerCosts(RATES).predict(Size(patches=4, squares=16, size_bytes=100))
    assert (found.prepare_s, found.tower_s, found.transfer_s) == (1.5, 8.0, 1.5)
    assert found.total_s == 11.0


def test_all_sizes_are_learned_from_all_sizes() -> None:
    costs = learned(GRIDS, 60)
    assert max(error(costs, grid) for grid in GRIDS) < 0.05
    assert costs.tower.error < 0.05


def test_one_size_teaches_how_fast_the_machine_is_at_others() -> None:
    before = PeerCosts().predict(Size.of((1, 32, 32))).tower_s
    costs = PeerCosts()
    for _ in range(20):
        costs.encoded([Size.of((1, 16, 16))], 10 * PeerCosts().predict(Size.of((1, 16, 16))).tower_s)
    assert costs.predict(Size.of((1, 32, 32))).tower_s == pytest.approx(10 * before, rel=0.05)


def test_a_batch_is_one_observation_of_all_its_items() -> None:
    one, batch = PeerCosts(RATES), PeerCosts(RATES)
    one.encoded([Size(12, 80)], 100.0)
    batch.encoded([Size(4, 16), Size(8, 64)], 100.0)
    assert one.tower.coefficients == batch.tower.coefficients


def test_one_outlier_moves_little_and_a_lasting_change_moves_all() -> None:
    costs = learned(GRIDS, 60)
    before = costs.predict(Size.of((1, 32, 32))).tower_s
    costs.encoded([Size.of((1, 32, 32))], 1000.0)
    assert costs.predict(Size.of((1, 32, 32))).tower_s == pytest.approx(before, rel=0.1)
    for grid in itertools.islice(itertools.cycle(GRIDS), 40):
        costs.encoded([Size.of(grid)], 10 * slow(Size.of(grid)))
    assert max(error(costs, grid, 10.0) for grid in GRIDS) < 0.15


def test_a_self_test_of_two_sizes_is_believed() -> None:
    measured = tuple(Timing.of(grid, slow(Size.of(grid))) for grid in GRIDS[1:3])
    costs = PeerCosts()
    costs.believe(ServiceTimes(tower=measured, prepare=(Timing.of(GRIDS[0], 0.5),), prepare_threads=3))
    assert max(error(costs, grid) for grid in GRIDS[1:3]) < 0.05
    assert error(PeerCosts(), GRIDS[3]) > 0.9 and error(costs, GRIDS[3]) < 0.25, "between what was measured"
    assert costs.predict(Size.of(GRIDS[0])).prepare_s == pytest.approx(0.5, rel=0.05)
    assert costs.prepare_threads == 3
    assert costs.tower.observed == 0, "a test of nothing"


def test_the_error_is_that_of_predictions_before_they_were_learned_from() -> None:
    costs = PeerCosts(RATES)
    assert costs.encoded([Size(4, 16)], 16.0) == 0.5
    assert costs.tower.error == 0.5
    assert costs.finished(2.0, 1.0) == 0.5 and costs.finish_error == 0.5
    assert costs.transferred(100, 1.5) == 0.0 and costs.transfer.error == 0.0


def test_priors_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="above zero"):
        StageModel((1.0, 0.0))


observations = st.lists(
    st.tuples(st.integers(0, 10**5), st.integers(1, 16), st.floats(0, 1e5)), min_size=1, max_size=25
)


@settings(max_examples=40)
@given(observations, st.integers(0, 10**5), st.integers(1, 10**5))
def test_whatever_is_observed_costs_stay_finite_positive_and_monotone(
    seen: list[tuple[int, int, float]], patches: int, more: int
) -> None:
    costs = PeerCosts()
    for count, pairs, seconds in seen:
        size = Size(count * pairs, pairs * count**2, 16 * count)
        costs.encoded([size], seconds)
        costs.prepared(size, seconds)
        costs.transferred(size.size_bytes, seconds)
    small = costs.predict(Size(patches, patches**2, patches))
    large = costs.predict(Size(patches + more, (patches + more) ** 2, patches + more))
    for stage in ("prepare_s", "tower_s", "transfer_s"):
        assert 0.0 <= getattr(small, stage) <= getattr(large, stage) < math.inf
    assert 0.0 <= costs.tower.error <= 1.0


@settings(max_examples=20)
@given(observations)
def test_equal_observations_give_equal_models(seen: list[tuple[int, int, float]]) -> None:
    models = [PeerCosts(), PeerCosts()]
    for costs in models:
        for count, pairs, seconds in seen:
            costs.encoded([Size(count, pairs * count**2)], seconds)
    assert models[0].tower.coefficients == models[1].tower.coefficients
