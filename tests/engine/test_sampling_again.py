"""A step that raises in sampling is done again, and nobody can tell from the tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from tiny_engine import ask, make_engine, make_plan, tiny_model

from aiodisagg.engine import sampling
from aiodisagg.engine.sampling import Sampler, sample_batch
from aiodisagg.engine.types import SamplingParams

pytestmark = pytest.mark.anyio

CUTS: list[dict[str, Any]] = [{}, {"top_k": 40}]


def fail_once(monkeypatch: pytest.MonkeyPatch, rows: int, calls: int) -> None:
    """Where a device says what it thinks of a step: the numbers are drawn, and no token is known."""
    read_back, left = sampling._read_back, calls

    def may_fail(found: torch.Tensor) -> list[list[int]]:
        nonlocal left
        left -= found.shape[1] == rows
        if found.shape[1] == rows and not left:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return read_back(found)

    monkeypatch.setattr(sampling, "_read_back", may_fail)


async def test_seeded_requests_get_the_tokens_that_they_get_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [make_plan([5], seed=1), make_plan([9], seed=2)]
    params: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": i, "max_tokens": 24, "ignore_eos": True, **cut} for i, cut in enumerate(CUTS)
    ]
    async with make_engine(tiny_model("dense")) as engine:
        alone = [(await ask(engine, plan, **how)).tokens for plan, how in zip(plans, params, strict=True)]
        fail_once(monkeypatch, rows=2, calls=2)
        both = await asyncio.gather(*(ask(engine, plan, **how) for plan, how in zip(plans, params, strict=True)))
        assert engine.stats().retries == 1
    assert [answer.tokens for answer in both] == alone


def test_one_sampler_in_several_rows_repeats_its_numbers_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(4, 1 << 12)
    first, second = ([Sampler(SamplingParams(temperature=1.0, seed=3))] * 4 for _ in range(2))
    expected = [sample_batch(logits, first) for _ in range(2)]
    assert len({*expected[0], *expected[1]}) > 6
    fail_once(monkeypatch, rows=4, calls=1)
    with pytest.raises(RuntimeError, match="illegal"):
        sample_batch(logits, second)
    assert [sample_batch(logits, second) for _ in range(2)] == expected
