"""Attention over a paged KV pool for packed batches, registered with transformers as ``aio_paged``.

A step's tokens of all requests lie one after another in one row ``[1, T]``; each request is a segment ``[start, stop)``
of it. The function writes the new keys and values to the slots of their pages and lets each segment attend to its own
past and to itself, causally. There is no mask over the whole batch (it would be sum of Q times sum of K) and no copy
of keys per query head: the heads of a group share theirs by broadcasting, or, for one query token, become rows of it.

The model hands ``aio_batch`` down to here because it passes unknown keyword arguments to every layer. This is the only
file of the engine that imports transformers. Another device's kernel replaces :meth:`PackedBatch.attend`, which sees
the pool, the slots and the segments: all that flash or Triton kernels want.
"""

# torch and transformers hand tensors and modules through untyped callbacks.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "aio_paged"


class KvPool:
    """Keys and values of all layers: two tensors [layers, pages * page_size, kv_heads, head_dim].

    A slot is ``page * page_size + offset``. What an unowned slot holds is never read.
    """

    def __init__(
        self,
        *,
        layers: int,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, num_pages * page_size, kv_heads, head_dim)
        self.page_size = page_size
        # Not inference tensors, whatever mode the caller is in: those could not be written by another thread.
        with torch.inference_mode(False):
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def size_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def slots(self, pages: Sequence[int], stop: int) -> torch.Tensor:
        """Slots of the first ``stop`` tokens of a request whose pages these are: int64 [stop]."""
        used = torch.tensor(pages[: -(-stop // self.page_size)], dtype=torch.int64)
        slots = used[:, None] * self.page_size + torch.arange(self.page_size)
        return slots.reshape(-1)[:stop].to(self.keys.device)


@dataclass(frozen=True, slots=True)
class PackedSegment:
    """Tokens ``[start, stop)`` of the packed row, which follow ``past`` tokens of the same request."""

    start: int
    stop: int
    past: int
    slots: torch.Tensor
    """int64 [past + stop - start]: where the request's keys and values lie, past and new."""
    mask: torch.Tensor | None = field(repr=False)
    """bool [stop - start, past + stop - start], True is seen; None where a mask is not needed."""

    @classmethod
    def of(cls, start: int, stop: int, slots: torch.Tensor) -> PackedSegment:
        new, total = stop - start, slots.shape[0]
        mask = None
        if new > 1 and total > new:
            mask = torch.ones(new, total, dtype=torch.bool, device=slots.device).tril_(total - new)
        return cls(start, stop, total - new, slots, mask)


class PackedBatch:
    """One step as the attention function sees it; made anew for each step."""

    def __init__(self, pool: KvPool, segments: Sequence[PackedSegment]) -> None:
        self.pool = pool
        self.segments = tuple(segments)
        self.new_slots = torch.cat([s.slots[s.past :] for s in self.segments])

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Attention outputs [1, T, heads, d] for queries [1, heads, T, d], new keys and values [1, kv_heads, T, d]."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys.index_copy_(0, self.new_slots, key[0].transpose(0, 1))
        values.index_copy_(0, self.new_slots, value[0].transpose(0, 1))
        heads, kv_heads, d = query.shape[1], key.shape[1], query.shape[3]
        group = heads // kv_heads
        out = query.new_empty(query.shape[2], heads, d)
        for s in self.segments:
            new = s.stop - s.start
            q = query[0, :, s.start : s.stop].view(kv_heads, group, new, d)
            if s.past:
                # [K, kv, d] -> [kv, 1, K, d]
                k = keys.index_select(0, s.slots).transpose(0, 1)[:, None]
                v = values.index_select(0, s.slots).transpose(0, 1)[:, None]
            else:
                k, v = key[0, :, None, s.start : s.stop], value[0, :, None, s.start : s.stop]
            if new == 1:
                q = q.transpose(1, 2)  # the group's heads are the query's rows
                o = scaled_dot_product_attention(q, k, v, scale=scaling)  # [kv, 1, group, d]
                out[s.start : s.stop] = o.reshape(1, heads, d)
                continue
            k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
            o = scaled_dot_product_attention(q, k, v, attn_mask=s.mask, is_causal=s.past == 0, scale=scaling)
            out[s.start : s.stop] = o.reshape(heads, new, d).transpose(0, 1)
        return out[None]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    aio_batch: PackedBatch | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    if aio_batch is None:
        raise ValueError(f"attention {NAME!r} works inside the engine only: the model's forward got no aio_batch")
    if sliding_window is not None:
        raise ValueError(f"attention {NAME!r} is full attention: layer {module.layer_idx} has a sliding window")
    return aio_batch.attend(module.layer_idx, query, key, value, scaling), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Segments know what they may see; a mask of the whole batch is not made."""


def has_mrope(model: Any) -> bool:
    """Whether the model turns by three rows of positions. Its modules say so: their sections have a default, so the
    config of a model that does need not have any, and that of a plain text model may have kept some."""
    return any(hasattr(module, "mrope_section") for module in model.modules())


def use_paged_attention(model: Any) -> str:
    """Switches a transformers model to ``aio_paged`` and returns the name it had before."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)
    before = str(model.config._attn_implementation)
    model.set_attn_implementation(NAME)
    return before
