"""What the fit of step times makes of the cost of tokens, of their attention and of reading experts."""

from __future__ import annotations

import random

import pytest

from aiodisagg.engine.pace import Pace, Reads, StepShape

BUDGET_S = 0.05


def test_attention_counts_among_what_tokens_cost() -> None:
    """Prompts of several sizes leave it open whether tokens or pairs of them take the time."""
    pace = Pace(BUDGET_S)
    for prefill in (4000, 1000, 8000, 2000, 6000, 3000, 7000, 5000):
        pace.observe(StepShape(prefill=prefill, attention=prefill**2 / 2), 1e-9 * prefill**2 / 2 + 0.005)
    assert not pace.begins(0, 2000, ()) and pace.begins(0, 4000, ()) and pace.begins(8000, 9000, ())
    costs = pace.prefill_costs()  # as peers are told
    assert costs is not None and 1e-6 < costs.token_s * 4000 + costs.pair_s * 4000**2 / 2 < 0.016


@pytest.mark.parametrize("part", [0.0, 0.2, 1.0])
def test_what_reading_experts_costs_on_top_is_learned(part: float) -> None:
    """It is measured alone; beside other work it may hide, and tokens of one prompt may choose few experts."""
    reads = Reads(0.014, 1 / 16)
    pace, chance = Pace(BUDGET_S, reads), random.Random(1)

    def takes(prefill: int, decodes: int) -> float:
        return 0.004 + 0.0003 * decodes + 1.4e-5 * prefill + part * reads.seconds(prefill + decodes)

    for _ in range(150):
        prefill, decodes = chance.choice([0, 0, 130, 900, 1800, 2700]), chance.randrange(1, 8)
        pace.observe(StepShape(decodes, 400 * decodes, prefill, prefill**2 / 2), takes(prefill, decodes))
    for prefill in (600, 900, 4000):
        assert pace.expect(StepShape(prefill=prefill, attention=prefill**2 / 2)) == pytest.approx(
            takes(prefill, 0), rel=0.06
        )
    costs = pace.prefill_costs()
    assert costs is not None and costs.step_s == pytest.approx(0.004 + part * 0.014, rel=0.25) and costs.error < 0.1
