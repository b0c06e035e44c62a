"""What one request has in the pool stays its own, where attention reads past the end of a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference_flash import TILE, Flash

from aiodisagg.engine.flash import FlashPrefill
from aiodisagg.engine.inputs import Piece
from aiodisagg.engine.kernels import Shapes, attend, new_inputs

PAGE = 16
OF = Shapes(48, 4, 2, 16, 0, 0, PAGE, torch.float32, torch.device("cpu"))


def no_decodes(*args: Any, longer: bool, out: torch.Tensor) -> torch.Tensor:
    assert not longer
    return out


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoilt", ["values", "both"])
def test_a_sick_request_is_alone(bad: float, spoilt: str) -> None:
    """Two prompts and padding, all in one tile: the second one's slots and slot 0 hold what is not finite."""
    pieces = [Piece(20, 20, [3, 1]), Piece(7, 39, [2, 5, 4])]
    tokens, keys = 27, 70
    assert keys < TILE
    step = new_inputs(OF, tokens=tokens, segments=4, pages=8, keys=keys)
    step.fill(pieces, np.zeros(tokens), np.zeros((3, tokens)), keys=keys)
    pool = torch.randn(2, 6 * PAGE, 2, 16)
    query = torch.randn(tokens, 4, 16)
    healthy = attend(query, *pool, step, 0.25)
    kinds = pool[1:] if spoilt == "values" else pool
    kinds[:, :PAGE] = bad
    kinds[:, 2 * PAGE : 3 * PAGE] = bad
    before, flash = pool.clone(), Flash()
    found = FlashPrefill(no_decodes, flash)(query, *pool, step, 0.25)
    assert flash.calls == 1 and torch.equal(pool.nan_to_num(1.0), before.nan_to_num(1.0)), "the pool is only read"
    torch.testing.assert_close(found[:20], healthy[:20], atol=1e-5, rtol=1e-4)
    if spoilt == "both":
        assert found[20:].isnan().any(), "and it can be seen whose they are"
