"""Prefill by FlashAttention 4 (of the extra ``gpu``).

It wants the keys of a segment one after another, and pages are small: so each layer's are gathered first, which costs a
read and a write of what the products read many times. In a step that is replayed from a graph this is worth it from
about a thousand new tokens on. Launched, it takes 0.15 to 0.3 ms of Python a layer more, which only steps with some
millions of query-key pairs hide. Below that, and for decodes, our own kernel reads the pages itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from aiodisagg.engine.inputs import StepInputs

MIN_PAIRS = 8_000_000
"""Of new tokens and tokens of context, over the longer segments of a step that is launched."""


class FlashPrefill:
    """Stands for ``attend`` of :class:`~aiodisagg.engine.kernels.Kernels`, where a step lists its keys.

    Args:
        attend: does everything else, see :func:`aiodisagg.engine.triton_attention.attend`.
        flash: ``flash_attn_varlen_func``, or what computes the same.
    """

    def __init__(self, attend: Callable[..., torch.Tensor], flash: Callable[..., Any]) -> None:
        self._attend, self._flash, self.min_pairs = attend, flash, MIN_PAIRS

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: StepInputs, scaling: float
    ) -> torch.Tensor:
        """Attention outputs [T, heads, d] of queries [T, heads, d] over one layer of the pool [slots, kv_heads, d]."""
        room = step.key_slots.shape[0]
        if not room:
            return self._attend(query, keys, values, step, scaling)
        gathered = values.index_select(0, step.key_slots)
        # Its last tile reaches past a sequence's end, where scores are replaced and values multiplied by 0: what is not
        # finite there, a neighbour's or the padding's, would make NaN of this sequence's outputs. Keys stay, and show
        # what is wrong with a request in its own outputs; what only its values show, its next token reads from pages.
        gathered.nan_to_num_()
        # Sequences that begin behind the decodes, and ones of nothing at the end: both are as good as any to it.
        out, *_ = self._flash(
            query,
            keys.index_select(0, step.key_slots),
            gathered,
            cu_seqlens_q=step.query_at,
            cu_seqlens_k=step.key_at,
            max_seqlen_q=step.tokens,
            max_seqlen_k=room,
            softmax_scale=scaling,
            causal=True,
        )
        return self._attend(query, keys, values, step, scaling, longer=False, out=out)
