"""Sampling: what is chosen, how often, and that it can be repeated."""

from __future__ import annotations

import math
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aiodisagg.engine import sampling
from aiodisagg.engine.sampling import Sampler, sample_batch
from aiodisagg.engine.types import SamplingParams
from aiodisagg.errors import InvalidRequest

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]))


def sample(sampler: Sampler, logits: torch.Tensor) -> int:
    (token,) = sample_batch(logits[None], [sampler])
    assert token is not None
    return token


def counts(params: SamplingParams, n: int = 3000) -> dict[int | None, float]:
    found = Counter(sample_batch(LOGITS.repeat(n, 1), [Sampler(params)] * n))
    return {token: times / n for token, times in found.items()}


class Plain:
    """What sampling is, one token at a time: the reference."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.generator = torch.Generator().manual_seed(params.seed or 0)

    def sample(self, logits: torch.Tensor) -> int:
        params = self.params
        if not params.temperature:
            return int(logits.argmax())
        draw = torch.rand((), generator=self.generator, dtype=torch.float64).item()
        scaled = logits.double()
        scaled = (scaled - scaled.max()) / params.temperature
        ids = list(range(len(scaled)))
        top_k = params.top_k if 0 < params.top_k < len(ids) else 0
        if top_k or params.top_p < 1.0:
            order = scaled.tolist()
            ids.sort(key=lambda i: (-order[i], i))
            ids = ids[: top_k or None]
        sums = torch.softmax(scaled[ids], 0).cumsum(0).tolist()
        if params.top_p < 1.0:
            sums = sums[: 1 + next((i for i, part in enumerate(sums) if part >= params.top_p), len(sums) - 1)]
        return ids[next(i for i, part in enumerate(sums) if part >= max(draw * sums[-1], 5e-324) or part == sums[-1])]


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
    seeded = [[sample(Sampler(SamplingParams(temperature=1.0, seed=s)), flat) for _ in range(2)] for s in (0, 1, -1)]
    assert all(a == b for a, b in seeded)
    assert len({a for a, _ in seeded}) == 3
    free = {sample(Sampler(SamplingParams(temperature=1.0)), flat) for _ in range(4)}
    assert len(free) > 1


@pytest.mark.parametrize("ranked", [4, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_of_a_batch_is_sampled_as_the_reference_says(
    monkeypatch: pytest.MonkeyPatch, ranked: int, dtype: torch.dtype
) -> None:
    """Whatever is beside it, and whichever of equally likely tokens topk finds first. Of 4 that are ranked, few are
    enough."""
    topk = torch.Tensor.topk

    def last_ones(logits: torch.Tensor, count: int) -> Any:
        values, ids = topk(logits.flip(-1), count)
        return SimpleNamespace(values=values, indices=logits.shape[1] - 1 - ids)

    monkeypatch.setattr(sampling, "RANKED", ranked)
    monkeypatch.setattr(sampling, "CACHED", 600)  # some rows together, others not
    choose = random.Random(1)
    for trial in range(60):
        monkeypatch.setattr(torch.Tensor, "topk", choose.choice([topk, last_ones]))
        vocabulary, rows = choose.choice([1, 2, 7, 60, 300]), choose.randint(1, 5)
        generator = torch.Generator().manual_seed(trial)
        logits = (torch.randn(rows, vocabulary, generator=generator) * choose.choice([0.1, 1, 5])).to(dtype)
        logits = choose.choice([logits, logits.round()])
        params = [
            SamplingParams(
                temperature=choose.choice([0.0, 1e-300, 0.3, 1.0, 2.0]),
                top_p=choose.choice([1.0, 0.1, 0.5, 0.9, 0.999]),
                top_k=choose.choice([0, 1, 3, 5, 40, 1000]),
                seed=choose.randint(1, 1000),
            )
            for _ in range(rows)
        ]
        samplers, plain = [Sampler(one) for one in params], [Plain(one) for one in params]
        for _ in range(3):
            expected = [one.sample(row) for one, row in zip(plain, logits, strict=True)]
            assert sample_batch(logits, samplers) == expected, params


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_a_batch_is_read_back_once(monkeypatch: pytest.MonkeyPatch, cut: dict[str, float]) -> None:
    """To read from a device is to wait for it."""
    seen = []
    read_back = sampling._read_back
    monkeypatch.setattr(sampling, "_read_back", lambda found: seen.append(found.shape) or read_back(found))
    samplers = [Sampler(SamplingParams(temperature=i / 4, seed=i, **cut)) for i in range(4)]  # type: ignore[arg-type]
    assert None not in sample_batch(LOGITS.repeat(4, 1), samplers)
    sample_batch(LOGITS.repeat(2, 1), [samplers[0]] * 2)
    assert seen == [(3, 4), (2, 2)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_give_no_token(bad: float) -> None:
    logits = torch.zeros(3, 8)
    logits[1, 3] = bad
    logits[:, 5] = 1.0
    for cut in ({}, {"top_k": 2}, {"top_p": 0.5}):
        drawing = Sampler(SamplingParams(temperature=1.0, **cut))  # type: ignore[arg-type]
        assert sample_batch(logits, [Sampler(SamplingParams()), drawing, Sampler(SamplingParams())]) == [5, None, 5]


def test_a_draw_of_nothing_picks_no_impossible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "draw", lambda sampler: (0.0, 1e-3, math.inf, math.inf))
    assert sample(Sampler(SamplingParams(temperature=1.0)), torch.tensor([-9.0, 1.0, 0.0])) == 1


def test_a_stop_that_is_no_tuple_is_refused() -> None:
    """An answer ended at the first of its letters."""
    with pytest.raises(InvalidRequest, match="stop: must be a tuple of strings"):
        SamplingParams(stop="\n\nUser:")  # type: ignore[arg-type]
