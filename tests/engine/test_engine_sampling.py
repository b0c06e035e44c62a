"""Sampling: what is chosen, how often, and that it can be repeated."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from aiodisagg.engine.sampling import Sampler, sample_batch
from aiodisagg.engine.types import SamplingParams

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]))


def counts(params: SamplingParams, n: int = 3000) -> dict[int, float]:
    sampler = Sampler(params)
    found = Counter(sampler.sample(LOGITS) for _ in range(n))
    return {token: found[token] / n for token in sorted(found)}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 1.0}, {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.3, 4: 0.15}),
        ({"temperature": 1.0, "top_k": 2}, {1: 4 / 7, 3: 3 / 7}),
        ({"temperature": 1.0, "top_p": 0.69}, {1: 4 / 7, 3: 3 / 7}),
        ({"temperature": 1.0, "top_p": 0.71}, {1: 0.4 / 0.85, 3: 0.3 / 0.85, 4: 0.15 / 0.85}),
        ({"temperature": 1.0, "top_p": 1e-6}, {1: 1.0}),
        ({"temperature": 0.5, "top_k": 2}, {1: 16 / 25, 3: 9 / 25}),
        ({"temperature": 1e-6}, {1: 1.0}),
        ({"temperature": 5e-324}, {1: 1.0}),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, {1: 4 / 7, 3: 3 / 7}),  # top_p of what top_k left
        ({"temperature": 0.0}, {1: 1.0}),
    ],
)
def test_tokens_come_as_often_as_they_should(params: dict[str, float], expected: dict[int, float]) -> None:
    got = counts(SamplingParams(seed=5, **params))  # type: ignore[arg-type]
    assert got.keys() == expected.keys()
    assert all(abs(got[t] - p) < 0.035 for t, p in expected.items()), got


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    flat = torch.zeros(1 << 16)
    seeded = [[Sampler(SamplingParams(temperature=1.0, seed=s)).sample(flat) for _ in range(2)] for s in (0, 1, -1)]
    assert all(a == b for a, b in seeded)
    assert len({a for a, _ in seeded}) == 3
    free = {Sampler(SamplingParams(temperature=1.0)).sample(flat) for _ in range(4)}
    assert len(free) > 1


def test_a_batch_gives_each_what_it_gets_alone() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature=0.0 if i % 2 else 1.3, seed=i) for i in range(5)]
    alone = [Sampler(p).sample(row) for p, row in zip(params, logits, strict=True)]
    assert sample_batch(logits, [Sampler(p) for p in params]) == alone


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_give_no_token(bad: float) -> None:
    logits = torch.zeros(3, 8)
    logits[1, 3] = bad
    logits[:, 5] = 1.0
    samplers = [Sampler(SamplingParams()), Sampler(SamplingParams(temperature=1.0)), Sampler(SamplingParams())]
    assert sample_batch(logits, samplers) == [5, None, 5]
