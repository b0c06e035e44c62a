"""Decode steps under CUDA graphs: one for each batch size of a ladder, all in one memory pool.

A decode step is some 530 launches of a few microseconds each; launched one by one from Python they take longer than
they run. A graph is replayed for any batch that is not larger: the rest of it is padding, which reads no context, no
expert and writes to no slot.
"""

# torch declares no types for streams and events.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from aiodisagg.engine.inputs import Piece, StepInputs

logger = logging.getLogger(__name__)

LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64)


class DecodeGraphs:
    """Captured steps of one token a segment.

    Args:
        inputs: with room for the largest batch; the graphs read it, and nothing else may fill it.
        compute: the step, from inputs to logits [tokens, vocab]; must not wait for the device.
        ladder: batch sizes.
    """

    def __init__(
        self, inputs: StepInputs, compute: Callable[[StepInputs], torch.Tensor], ladder: Sequence[int] = LADDER
    ) -> None:
        self._inputs, self._compute = inputs, compute
        self.ladder = tuple(sorted({size for size in ladder if size <= inputs.segments}))
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, torch.Tensor] = {}

    def size_for(self, batch: int) -> int | None:
        """The captured batch size that ``batch`` segments are padded to; None: there is none."""
        return next((size for size in self.ladder if size >= batch and size in self._graphs), None)

    def capture(self) -> None:
        """Runs and captures every size, the largest first, whose memory the others reuse."""
        began = time.perf_counter()
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._inputs.ids.device)
        for size in reversed(self.ladder):
            self._inputs.fill((), *_nothing(), pad_to=(size, size, 0))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles, and lets libraries allocate what they keep
                    self._compute(self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads copy rows meanwhile, which only a capture of this thread's own calls tolerates.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._logits[size] = self._compute(self._inputs)
            self._graphs[size] = graph
        logger.info("captured decode steps of %s in %.1f s", self.ladder, time.perf_counter() - began)

    def run(self, size: int, pieces: Sequence[Piece], ids: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Logits [size, vocab] of a batch padded to ``size``; valid until the next run."""
        self._inputs.fill(pieces, ids, positions, pad_to=(size, size, 0))
        self._graphs[size].replay()
        return self._logits[size]


def _nothing() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(0, dtype=np.int64), np.zeros((3, 0), dtype=np.int64)
