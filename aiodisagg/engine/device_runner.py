"""Steps on an accelerator: packs a batch into device tensors and runs the fused decoder, under a graph if it can.

Segments of one token without item rows are decodes; a batch of nothing else, up to the ladder's largest, is replayed
from a graph. Everything else is launched: such a step reads nearly all experts (14 ms of an H200's memory for 30B-A3B),
so its launches hide behind its work.
"""

# The model is transformers' untyped nn.Module, hence Any.

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aiodisagg.engine.attention import KvPool
from aiodisagg.engine.decoder import FusedDecoder, shapes_of, unsupported
from aiodisagg.engine.experts import BUCKETS, Experts, choose_experts
from aiodisagg.engine.graphs import LADDER, DecodeGraphs
from aiodisagg.engine.inputs import Piece, StepInputs
from aiodisagg.engine.kernels import Kernels, choose_kernels, new_inputs

if TYPE_CHECKING:
    from aiodisagg.engine.batch import Work

logger = logging.getLogger(__name__)


class DeviceRunner:
    """Runs batches of one model over one pool. One thread at a time.

    Args:
        pool: whose pages the batches name. token_budget, max_running: what a batch rarely passes.
        max_context: most tokens of a request.
        kernels, experts: chosen and checked on the device unless given.
        graphs: capture decode steps, where the kernels allow it.
    """

    def __init__(
        self,
        model: Any,
        pool: KvPool,
        *,
        token_budget: int,
        max_running: int,
        max_context: int,
        kernels: Kernels | None = None,
        experts: Experts | None = None,
        graphs: bool = True,
        ladder: Sequence[int] = LADDER,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        self._pool, self.shapes = pool, shapes_of(model, pool.page_size)
        with torch.inference_mode(), self._here():
            kernels = kernels or choose_kernels(self.shapes)
            self.decoder = FusedDecoder(model, kernels)
            layer = self.decoder.sparse
            if layer is not None:
                experts = experts or choose_experts(self.shapes, layer.gate_up, layer.down, buckets=buckets)
                self.decoder.experts = experts
        self._context_pages = min(pool.keys.shape[1] // pool.page_size, -(-max_context // pool.page_size))
        self._inputs = self._new_inputs(token_budget, max_running)
        self._rows: torch.Tensor | None = None
        self.launch_s = 0.0
        """What a step costs for being launched and not replayed; known after ``warm_up``."""
        self.graphs: DecodeGraphs | None = None
        if (
            graphs
            and kernels.padded
            and self.shapes.device.type == "cuda"
            and (layer is None or self.decoder.experts.captured)
        ):
            largest = max(ladder)
            self.graphs = DecodeGraphs(
                self._new_inputs(largest, largest), lambda step: self.decoder(step, pool, every=True), ladder
            )
        logger.info("fused decoder: kernels %s, graphs %s", sorted(kernels.fast), self.graphs is not None)

    @classmethod
    def of(cls, model: Any, pool: KvPool, **sizes: Any) -> DeviceRunner | None:
        """A runner, or None (and a line in the log) for a model that needs transformers' own forward."""
        if why := unsupported(model):
            logger.warning("the fused decoder cannot run this model: %s", why)
            return None
        try:
            return cls(model, pool, **sizes)
        except Exception:  # a layer of these names that is built otherwise, or no memory to try kernels in
            logger.exception("the fused decoder cannot run this model")
            return None

    def _new_inputs(self, tokens: int, segments: int) -> StepInputs:
        return new_inputs(self.shapes, tokens=tokens, segments=segments, pages=segments * self._context_pages)

    def _here(self) -> AbstractContextManager[object]:
        """Makes this thread's current device the model's: kernels are launched on the current one."""
        return torch.cuda.device(self.shapes.device) if self.shapes.device.type == "cuda" else nullcontext()

    def warm_up(self) -> None:
        """Compiles and captures. Takes seconds, and the whole device; without it the first steps are slow.

        Writes to no slot of the pool.
        """
        with torch.inference_mode(), self._here():
            if self.graphs is not None:
                try:
                    self.graphs.capture()
                except Exception as error:  # a driver's or a library's; steps can still be launched one by one
                    logger.warning("no decode graphs: %r", error)
                    self.graphs = None
            few = 1 + min(256, self._inputs.capacity // 2)
            for tokens in (self._inputs.capacity, few):
                self._dry(tokens)
            if self.graphs is not None:
                self.launch_s = min(self._timed(few) for _ in range(3))
                logger.info("a step that is launched takes %.1f ms at least", self.launch_s * 1e3)
            if self.shapes.device.type == "cuda":
                torch.cuda.synchronize(self.shapes.device)

    def _timed(self, tokens: int) -> float:
        """Seconds of a step that computes nothing, until the device has done it."""
        torch.cuda.synchronize(self.shapes.device)
        began = perf_counter()
        self._dry(tokens)
        torch.cuda.synchronize(self.shapes.device)
        return perf_counter() - began

    def _dry(self, tokens: int) -> None:
        """A step of one prompt and one decode whose tokens are all padding: every kernel of a launched step runs, on
        numbers that mean nothing, and neither pool nor experts are touched."""
        if not self.decoder.kernels.padded or self.shapes.device.type != "cuda":
            return
        step = self._inputs
        nothing = np.zeros(0, dtype=np.int64), np.zeros((3, 0), dtype=np.int64)
        step.fill((), *nothing, pad_to=(tokens, 1, -(-tokens // step.tile_tokens)))
        self.decoder(step, self._pool)

    def forward(self, batch: Sequence[Work]) -> tuple[torch.Tensor, int]:
        """See :meth:`aiodisagg.engine.batch.Runner.forward`. Logits are valid until the next call."""
        with self._here():
            return self._forward(batch)

    def _forward(self, batch: Sequence[Work]) -> tuple[torch.Tensor, int]:
        ids = np.concatenate([w.sequence.token_ids(w.segment.start, w.segment.stop) for w in batch])
        positions = np.concatenate([w.sequence.positions(w.segment.start, w.segment.stop) for w in batch], axis=1)
        pieces = [Piece(w.segment.tokens, w.segment.stop, w.pages) for w in batch]
        sampled, parts, at = [], [], 0
        for work in batch:
            where, taken = work.sequence.rows.take(work.segment.start, work.segment.stop)
            if taken is not None:
                parts.append((where + at, taken))
            at += work.segment.tokens
            if work.segment.samples:
                sampled.append(at - 1)
        size = None
        if self.graphs is not None and not parts and at == len(batch):
            size = self.graphs.size_for(at)
        if self.graphs is not None and size is not None:
            logits = self.graphs.run(size, pieces, ids, positions)
            return (logits[:at] if len(sampled) == at else logits[sampled]), 0
        if not self._inputs.fits(pieces):  # the scheduler's budget is the usual bound; others may call as well
            self._inputs = self._new_inputs(max(at, self._inputs.capacity), max(len(batch), self._inputs.segments))
        rows = self._place(parts, at)
        visual = np.concatenate([where for where, _ in parts]) if parts else None
        self._inputs.fill(pieces, ids, positions, visual=visual, sampled=sampled)
        return self.decoder(self._inputs, self._pool, rows), 0 if visual is None else len(visual)

    def _place(self, parts: Sequence[tuple[np.ndarray, torch.Tensor]], tokens: int) -> torch.Tensor | None:
        """Rows [tokens, width] with those of the items at their tokens; what lies at the others is never used."""
        if not parts:
            return None
        width = parts[0][1].shape[1]
        if self._rows is None or self._rows.shape[0] < tokens or self._rows.shape[1] != width:
            with torch.inference_mode(False):
                size = max(tokens, self._inputs.capacity), width
                self._rows = torch.zeros(size, dtype=self.shapes.dtype, device=self.shapes.device)
        for where, taken in parts:
            # An image is one run of tokens, a video one a frame pair: copies need no index on the device.
            breaks = np.flatnonzero(np.diff(where) != 1) + 1
            for start, stop in zip([0, *breaks], [*breaks, len(where)], strict=True):
                self._rows[where[start] : where[start] + stop - start].copy_(taken[start:stop])
        return self._rows[:tokens]
