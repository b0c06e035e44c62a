"""What this machine can do, measured before it is asked: prepare and tower, warm, for a few sizes of images."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from aiodisagg.models.base import ItemKind, Patches, VisionEncoder
from aiodisagg.scheduler.cost import ServiceTimes, Timing

logger = logging.getLogger(__name__)

GRIDS = ((1, 14, 14), (1, 32, 32), (1, 68, 120))
"""224 x 224, 512 x 512 and 1920 x 1088 pixels where a patch has 16 of a side."""
PATCH = 16
GROWTH = 1.5
"""A size is not tried if the one before, scaled by its patches to this power, says that it takes too long."""


def self_test(
    encoder: VisionEncoder, budget_s: float, *, prepare_threads: int = 1, clock: Callable[[], float] = time.monotonic
) -> ServiceTimes:  # fmt: skip
    """Measures for at most about ``budget_s``; larger sizes are left out where they would take longer. Blocking.

    What the encoder does not take is left out too (it may be another model's): a peer without times is still a peer.
    """
    until = clock() + budget_s
    prepare: list[Timing] = []
    tower: list[Timing] = []
    for i, grid in enumerate(GRIDS):
        if tower:
            growth = (grid[1] * grid[2] / tower[-1].patches) ** GROWTH
            if clock() + growth * (prepare[-1].seconds + tower[-1].seconds) > until:
                break
        media = _picture(grid)
        try:
            for _ in range(2 if i == 0 else 1):  # what runs first also loads, allocates and compiles
                began = clock()
                patches = encoder.prepare(ItemKind.IMAGE, (media,), grid, 0.0)
                prepared = clock()
                encode_one(encoder, patches)
                ended = clock()
        except Exception as error:  # whatever it is, a request will say it better
            logger.warning("no self-test with a grid of %s: %r", grid, error)
            break
        prepare.append(Timing.of(grid, prepared - began))
        tower.append(Timing.of(grid, ended - prepared))
    return ServiceTimes(tuple(prepare), tuple(tower), prepare_threads)


def small_picture(encoder: VisionEncoder) -> Patches:
    """The first picture of the self-test, prepared. Raises what the encoder raises."""
    return encoder.prepare(ItemKind.IMAGE, (_picture(GRIDS[0]),), GRIDS[0], 0.0)


def _picture(grid_thw: tuple[int, int, int]) -> bytes:
    """A JPEG with structure and noise, so that decoding it costs what photographs cost."""
    _, h, w = grid_thw
    noise = np.random.default_rng(0).normal(0, 12, (h * PATCH, w * PATCH, 3))
    ramp = np.linspace(0, 255, w * PATCH)[None, :, None]
    file = io.BytesIO()
    Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def encode_one(encoder: VisionEncoder, patches: Patches) -> None:
    """Returns when the rows exist."""
    import torch

    rows: Any = encoder.encode([patches])[0]
    if rows.is_cuda:
        torch.cuda.synchronize(rows.device)
