"""Steps under CUDA graphs: one for each size of a ladder, all in one memory pool.

A step is some 530 launches of a few microseconds each; launched one by one from Python they take 18 to 55 ms by the
host's processor, and every other thread of the process waits for them. A graph is replayed for any batch that is not
larger: the rest of it is padding, which reads no context, no expert and writes to no slot.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from aiodisagg.device.graphs import Capture
from aiodisagg.engine.inputs import Piece, StepInputs

logger = logging.getLogger(__name__)

DECODES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Batches of decodes."""
PROMPT_TOKENS = (64, 128, 256, 512, 768, *range(1024, 4097, 256))
"""Tokens of a step with prompts. Up to about a thousand its time is that of reading all experts; beyond, padding costs
as much as what is none, but for attention and experts."""
BESIDE = (0, 8, 24, 64)
"""Decodes of such a step."""
LISTED_TOKENS = 1024
"""From so many tokens on the keys of a step's prompts are listed, if the kernels want that."""
KEYS = (8192, 32768)
"""That can be."""
PROMPTS = 16
"""Prompts, or parts of some, in such a step."""


class Size(NamedTuple):
    """What a graph has room for."""

    tokens: int
    decodes: int
    tiles: int
    keys: int = 0
    """Listed ones; with 0, kernels read pages."""


def decode_sizes(ladder: Sequence[int] = DECODES) -> list[Size]:
    return [Size(batch, batch, 0) for batch in ladder]


def prompt_sizes(
    tile_tokens: int, tokens: Sequence[int] = PROMPT_TOKENS, beside: Sequence[int] = BESIDE, *, listed: bool = False
) -> list[Size]:
    """``listed``: the kernels want keys listed."""
    return [
        Size(t, d, -(-t // tile_tokens) + PROMPTS, keys)
        for t in tokens
        for d in beside
        for keys in (KEYS if listed and t >= LISTED_TOKENS else (0,))
        if d < t
    ]


class StepGraphs:
    """Captured steps.

    Args:
        inputs: with room for the largest; the graphs read it, and nothing else may fill it.
        compute: the step, from inputs to logits [n, vocab]; must not wait for the device.
        sizes: those that the inputs have no room for are left out.
        logits: of how many tokens ``compute`` gives logits; None: of all.
        capture: in whose memory pool.
    """

    def __init__(
        self, inputs: StepInputs, compute: Callable[[StepInputs], torch.Tensor], sizes: Sequence[Size],
        capture: Capture, *, logits: int | None = None,
    ) -> None:  # fmt: skip
        self.inputs, self._compute, self._capture, self._wanted = inputs, compute, capture, logits
        self.sizes = tuple(
            sorted(
                s for s in set(sizes)
                if s.tokens <= inputs.capacity and s.decodes <= inputs.segments and s.keys <= inputs.keys
            )
        )  # fmt: skip
        self._replay: dict[Size, Callable[[], None]] = {}
        self._logits: torch.Tensor | None = None

    def size_for(self, tokens: int, decodes: int, tiles: int, keys: int = 0) -> Size | None:
        """The smallest captured size that such a batch fits in; None: there is none."""

        def fits(size: Size) -> bool:
            room = size.tokens >= tokens and size.decodes >= decodes and size.tiles >= tiles
            return room and (not size.keys or size.keys >= keys) and size in self._replay

        return next(filter(fits, self.sizes), None)

    def capture(self) -> None:
        """Runs and captures every size, the largest first, whose memory the others reuse."""
        began, run = time.perf_counter(), set[int]()
        for size in reversed(self.sizes):

            def compute() -> None:
                found = self._compute(self.inputs)
                if self._logits is None:
                    self._logits = torch.empty_like(found)
                self._logits[: len(found)].copy_(found)  # in one place for all sizes: they are large

            self._fill(size, (), np.zeros(0, dtype=np.int64), np.zeros((3, 0), dtype=np.int64))
            if size.tokens not in run:  # compiles, and lets libraries allocate what they keep
                run.add(size.tokens)
                compute()
                compute()
            self._replay[size] = self._capture(compute)
        took = time.perf_counter() - began
        most = max((size.tokens for size in self.sizes), default=0)
        logger.info("captured %d steps of up to %d tokens in %.1f s", len(self.sizes), most, took)

    def run(
        self, size: Size, pieces: Sequence[Piece], ids: np.ndarray, positions: np.ndarray, *,
        visual: np.ndarray | None = None, sampled: Sequence[int] = (),
    ) -> torch.Tensor:  # fmt: skip
        """Logits of a batch padded to ``size``, valid until the next run: of all its tokens and padding, or of those
        of ``sampled`` and others behind them."""
        self._fill(size, pieces, ids, positions, visual, sampled)
        self._replay[size]()
        assert self._logits is not None
        return self._logits[: size.tokens if self._wanted is None else self._wanted]

    def _fill(
        self, size: Size, pieces: Sequence[Piece], ids: np.ndarray, positions: np.ndarray,
        visual: np.ndarray | None = None, sampled: Sequence[int] = (),
    ) -> None:  # fmt: skip
        if self._wanted is not None:
            sampled = [*sampled, *[0] * (self._wanted - len(sampled))]
        self.inputs.fill(pieces, ids, positions, visual=visual, sampled=sampled, pad_to=size[:3], keys=size.keys)
