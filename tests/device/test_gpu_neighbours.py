"""On a GPU with FlashAttention 4: whoever is not finite stays alone. CI has none, and tests this with a stand-in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from aiodisagg.engine.flash import FlashPrefill
from aiodisagg.engine.inputs import Piece
from aiodisagg.engine.kernels import Shapes, attend, choose_kernels, distance, new_inputs
from aiodisagg.models.base import ItemKind, Patches
from aiodisagg.models.synthetic import TINY, build_synthetic
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from tests.models.halves import png

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PAGE = 16
BAD = (float("nan"), float("inf"))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("spoilt", ["values", "both"])
def test_a_sick_prompt_is_alone(bad: float, spoilt: str) -> None:
    pytest.importorskip("flash_attn.cute")
    shapes = Shapes(2048, 32, 4, 128, 0, 0, PAGE, torch.bfloat16, torch.device("cuda"))
    prefill = choose_kernels(shapes).attend
    assert isinstance(prefill, FlashPrefill)
    prefill.min_pairs = 0
    pieces = [Piece(20, 20, [3, 1]), Piece(7, 39, [2, 5, 4])]
    step = new_inputs(shapes, tokens=27, segments=4, pages=8, keys=70)
    step.fill(pieces, np.zeros(27), np.zeros((3, 27)), keys=70)
    pool = torch.randn(2, 6 * PAGE, 4, 128, device="cuda").bfloat16()
    query = torch.randn(27, 32, 128, device="cuda").bfloat16()
    healthy = attend(query, *pool, step, 128**-0.5)
    kinds = pool[1:] if spoilt == "values" else pool
    kinds[:, :PAGE] = bad
    kinds[:, 2 * PAGE : 3 * PAGE] = bad
    found = prefill(query, *pool, step, 128**-0.5)
    assert distance(found[:20], healthy[:20]) < 2e-2
    if spoilt == "both":
        assert not found[20:].isfinite().all()


@pytest.mark.parametrize("bad", BAD)
def test_a_sick_picture_is_alone(bad: float, tmp_path: Path) -> None:
    """Heads of 72, as the large models have; a picture's neighbours in a batch, and those that come after."""
    pytest.importorskip("flash_attn.cute")
    size = dataclasses.replace(TINY, vision_hidden=288, vision_intermediate=576)
    folder = build_synthetic(tmp_path, size)
    encoder = Qwen3VLVisionEncoder(folder, dtype=torch.bfloat16, device="cuda")
    assert encoder.fused is not None and encoder.fused.graphs is not None
    pictures = [encoder.prepare(ItemKind.IMAGE, (png(96, 64, 3),), (1, 4, 6), 2.0) for _ in range(3)]
    alone = encoder.encode(pictures[:1])[0].clone()
    values = encoder._pixels(pictures[1])
    for at in range(3):
        batch = list(pictures)
        batch[at] = Patches(torch.full_like(values, bad), pictures[at].grid_thw)
        found = encoder.encode(batch)
        assert not found[at].isfinite().all()
        for other in {0, 1, 2} - {at}:
            assert distance(found[other], alone) < 2e-2
    assert distance(encoder.encode(pictures)[2], alone) < 2e-2
