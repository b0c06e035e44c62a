"""Steps on an accelerator: packs a batch into device tensors and runs the fused decoder, under a graph if it can.

Batches up to the sizes of :mod:`aiodisagg.engine.graphs` are replayed from a graph: decodes, and steps with prompts of
up to some four thousand tokens. Larger ones are launched: they work for longer than launching takes.
"""

# The model is transformers' untyped nn.Module, hence Any.

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aiodisagg.device.alone import Alone, alone_on
from aiodisagg.device.graphs import Capture, Captures
from aiodisagg.device.streams import Priority
from aiodisagg.engine.attention import KvPool
from aiodisagg.engine.decoder import FusedDecoder, shapes_of, unsupported
from aiodisagg.engine.experts import BUCKETS, Experts, choose_experts
from aiodisagg.engine.flash import FlashPrefill
from aiodisagg.engine.graphs import DECODES, KEYS, PROMPT_TOKENS, PROMPTS, StepGraphs, decode_sizes, prompt_sizes
from aiodisagg.engine.inputs import Piece, StepInputs, listed
from aiodisagg.engine.kernels import Kernels, choose_kernels, new_inputs
from aiodisagg.engine.pace import Reads

if TYPE_CHECKING:
    from aiodisagg.engine.batch import Work

logger = logging.getLogger(__name__)

LISTED = 1 << 18
"""Keys of a step that is launched that can be listed."""

Part = tuple[np.ndarray, torch.Tensor]
"""Ascending token indices of a step, and the rows that stand for their embeddings."""


class DeviceRunner:
    """Runs batches of one model over one pool. One thread at a time.

    Args:
        pool: whose pages the batches name. token_budget, max_running: what a batch rarely passes.
        max_context: most tokens of a request.
        kernels, experts: chosen and checked on the device unless given.
        row_width: elements of the rows of items; None: not known, and steps with rows are always launched.
        captures: how steps of a priority are captured, where the kernels allow it; None: as CUDA graphs, on a GPU.
        ladder, prompts: sizes that are, see :mod:`aiodisagg.engine.graphs`.
        alone: taken by graphs of steps with prompts; None: the word of the device, if it has one.
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
        row_width: int | None = None,
        captures: Callable[[Priority], Capture] | None = None,
        ladder: Sequence[int] = DECODES,
        prompts: Sequence[int] = PROMPT_TOKENS,
        buckets: Sequence[int] = BUCKETS,
        alone: Alone | None = None,
    ) -> None:
        self._pool, self.shapes = pool, shapes_of(model, pool.page_size)
        self._alone = alone or alone_on(self.shapes.device)
        with torch.inference_mode(), self._here():
            kernels = kernels or choose_kernels(self.shapes)
            self.decoder = FusedDecoder(model, kernels)
            layer = self.decoder.sparse
            if layer is not None:
                experts = experts or choose_experts(self.shapes, layer.gate_up, layer.down, buckets=buckets)
                self.decoder.experts = experts
        self._context_pages = min(pool.keys.shape[1] // pool.page_size, -(-max_context // pool.page_size))
        self._flash = kernels.attend if isinstance(kernels.attend, FlashPrefill) else None
        self._inputs = self._new_inputs(token_budget, max_running, LISTED)
        self._rows: torch.Tensor | None = None
        self._row_width = row_width
        self.reads = Reads()
        """What steps take for reading experts; known after ``warm_up``."""
        self.graphs: StepGraphs | None = None
        """Of decodes."""
        self.prompt_graphs: StepGraphs | None = None
        self._graph_rows: torch.Tensor | None = None
        if captures is None and self.shapes.device.type == "cuda":
            captures = partial(Captures, self.shapes.device)
        if captures is not None and kernels.padded and (layer is None or self.decoder.experts.captured):
            self._make_graphs(captures, ladder, prompts)
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

    def _make_graphs(
        self, captures: Callable[[Priority], Capture], ladder: Sequence[int], prompts: Sequence[int]
    ) -> None:
        # What computes does not refer to this object: in a cycle, graphs would keep their memory when nobody has them.
        decoder, pool = self.decoder, self._pool
        sizes, capture = decode_sizes(ladder), captures(Priority.DECODES)
        most = max(size.tokens for size in sizes)
        self.graphs = StepGraphs(
            self._new_inputs(most, most, 0), lambda step: decoder(step, pool, every=True), sizes, capture
        )
        sizes = prompt_sizes(self._inputs.tile_tokens, prompts, listed=self._flash is not None)
        capture = self._alone_in(captures(Priority.PROMPTS))
        tokens = min(max(size.tokens for size in sizes), self._inputs.capacity)
        segments = max(size.decodes for size in sizes) + PROMPTS
        rows = self._graph_rows = None if self._row_width is None else self._new_rows(tokens, self._row_width)

        def compute(step: StepInputs) -> torch.Tensor:
            return decoder(step, pool, None if rows is None else rows[: step.tokens])

        inputs = self._new_inputs(tokens, segments, max(KEYS))
        self.prompt_graphs = StepGraphs(inputs, compute, sizes, capture, logits=segments)

    def _alone_in(self, capture: Capture) -> Capture:
        """What is captured has the device alone when it is replayed; not so what runs before, to compile."""
        alone = self._alone
        if alone is None:
            return capture

        def inside(compute: Callable[[], None]) -> Callable[[], None]:
            def taken() -> None:
                with alone.taken():
                    compute()

            return capture(taken)

        return inside

    def _new_inputs(self, tokens: int, segments: int, keys: int) -> StepInputs:
        """``keys``: can be listed, if the kernels want that."""
        pages, keys = segments * self._context_pages, keys if self._flash is not None else 0
        return new_inputs(self.shapes, tokens=tokens, segments=segments, pages=pages, keys=keys)

    def _here(self) -> AbstractContextManager[object]:
        """Makes this thread's current device the model's: kernels are launched on the current one."""
        return torch.cuda.device(self.shapes.device) if self.shapes.device.type == "cuda" else nullcontext()

    def warm_up(self) -> None:
        """Compiles and captures. Takes seconds, and the whole device; without it the first steps are slow.

        Writes to no slot of the pool.
        """
        with torch.inference_mode(), self._here():
            few = 1 + min(256, self._inputs.capacity // 2)
            for tokens in (self._inputs.capacity, few):
                self._dry(tokens)
            self.prompt_graphs = _captured(self.prompt_graphs, "steps with prompts")
            self.graphs = _captured(self.graphs, "decodes")
            if self.graphs is not None:
                self.reads = self._measured_reads()
                logger.info("reading all experts takes %.1f ms", self.reads.all_s * 1e3)
            if self.shapes.device.type == "cuda":
                torch.cuda.synchronize(self.shapes.device)

    @property
    def replayed_tokens(self) -> int:
        """Of the largest step with prompts that is a graph, 0 if none is; known after ``warm_up``."""
        return 0 if self.prompt_graphs is None else max((size.tokens for size in self.prompt_graphs.sizes), default=0)

    def _measured_reads(self) -> Reads:
        """By a step of 64 tokens, which reads nearly all of them."""
        ms = min((self.decoder.experts.measured.get(64) or {}).values(), default=0.0)
        layers = sum(layer.router is not None for layer in self.decoder.layers)
        part = Reads(1.0, self.shapes.top_k / max(1, self.shapes.experts))
        return Reads(layers * ms / 1e3 / part.seconds(64), part.of_token) if layers else Reads()

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
        visual = np.concatenate([where for where, _ in parts]) if parts else None
        used = 0 if visual is None else len(visual)
        logits = self._replayed(pieces, ids, positions, parts, visual, sampled)
        if logits is not None:
            return logits, used
        if not self._inputs.fits(pieces):  # the scheduler's budget is the usual bound; others may call as well
            segments = max(len(batch), self._inputs.segments)
            self._inputs = self._new_inputs(max(at, self._inputs.capacity), segments, LISTED)
        rows = self._room(parts, at)
        if rows is not None:
            _place(parts, rows)
        keys = self._worth_listing(pieces)
        self._inputs.fill(pieces, ids, positions, visual=visual, sampled=sampled, keys=keys)
        return self.decoder(self._inputs, self._pool, rows), used

    def _worth_listing(self, pieces: Sequence[Piece]) -> int:
        """How many keys of a step that is launched should be listed."""
        pairs = sum(piece.new * piece.total for piece in pieces if piece.new > 1)
        if self._flash is None or pairs < self._flash.min_pairs or (keys := listed(pieces)) > self._inputs.keys:
            return 0
        return keys

    def _replayed(
        self, pieces: Sequence[Piece], ids: np.ndarray, positions: np.ndarray, parts: Sequence[Part],
        visual: np.ndarray | None, sampled: Sequence[int],
    ) -> torch.Tensor | None:  # fmt: skip
        """The logits by a graph; None: there is none for such a batch."""
        tokens, decodes = len(ids), sum(piece.new == 1 for piece in pieces)
        if self.graphs is not None and not parts and decodes == tokens:
            size = self.graphs.size_for(tokens, decodes, 0)
            if size is not None:
                logits = self.graphs.run(size, pieces, ids, positions)
                return logits[:tokens] if len(sampled) == tokens else logits[sampled]
        graphs, rows = self.prompt_graphs, self._graph_rows
        if graphs is None or not graphs.inputs.fits(pieces):
            return None
        if any(rows is None or taken.shape[1] != rows.shape[1] for _, taken in parts):
            return None
        longer = [piece for piece in pieces if piece.new > 1]
        tiles = sum(-(-piece.new // graphs.inputs.tile_tokens) for piece in longer)
        size = graphs.size_for(tokens, decodes, tiles, listed(pieces))
        if size is None:
            return None
        if rows is not None:
            _place(parts, rows)
        return graphs.run(size, pieces, ids, positions, visual=visual, sampled=sampled)[: len(sampled)]

    def _room(self, parts: Sequence[Part], tokens: int) -> torch.Tensor | None:
        """For rows [tokens, width] of a step that is launched."""
        if not parts:
            return None
        width = parts[0][1].shape[1]
        if self._rows is None or self._rows.shape[0] < tokens or self._rows.shape[1] != width:
            self._rows = self._new_rows(max(tokens, self._inputs.capacity), width)
        return self._rows[:tokens]

    def _new_rows(self, tokens: int, width: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.zeros(tokens, width, dtype=self.shapes.dtype, device=self.shapes.device)


def _captured(graphs: StepGraphs | None, what: str) -> StepGraphs | None:
    if graphs is None:
        return None
    try:
        graphs.capture()
    except Exception as error:  # a driver's or a library's; steps can still be launched one by one
        logger.warning("no graphs of %s: %r", what, error)
        return None
    return graphs


def _place(parts: Sequence[Part], rows: torch.Tensor) -> None:
    """Puts the rows of items at their tokens; what lies at the others is never used."""
    for where, taken in parts:
        # An image is one run of tokens, a video one a frame pair: copies need no index on the device.
        breaks = np.flatnonzero(np.diff(where) != 1) + 1
        for start, stop in zip([0, *breaks], [*breaks, len(where)], strict=True):
            rows[where[start] : where[start] + stop - start].copy_(taken[start:stop])
