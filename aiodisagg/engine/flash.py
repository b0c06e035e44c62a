"""Prefill over long contexts by FlashAttention 4 (of the extra ``gpu``).

It wants the keys of a segment one after another, and pages are small: so each layer's are gathered first, which costs a
read and a write of what the products read many times. Worth it from some millions of query-key pairs on; below that,
and for decodes, our own kernel reads the pages itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from aiodisagg.engine.inputs import StepInputs

MIN_PAIRS = 8_000_000
"""Of new tokens and tokens of context, over the longer segments of a step, to gather keys for. Calling it takes 0.15 to
0.3 ms of Python a layer, which smaller steps do not hide."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """The longer segments of a step: they are its last ``tokens`` tokens, and their keys lie in ``slots`` [K]."""

    tokens: int
    slots: torch.Tensor
    of_queries: torch.Tensor
    """int32 [S + 1]: where each segment's queries begin, and where the last ones end; ``of_keys`` likewise."""
    of_keys: torch.Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, step: StepInputs, min_pairs: int = MIN_PAIRS) -> Gathered | None:
        """None: there is too little to do, or a one-token segment stands between longer ones."""
        page, used, longer = step.page_size, 0, []
        for piece in step.pieces:
            pages = -(-piece.total // page)
            if piece.new > 1:
                longer.append((piece, used))
            elif longer:
                return None
            used += pages
        if sum(piece.new * piece.total for piece, _ in longer) < min_pairs:
            return None
        device = step.pages.device
        offsets = torch.arange(page, device=device)
        slots = [
            (step.pages[at : at + -(-piece.total // page), None] * page + offsets).view(-1)[: piece.total]
            for piece, at in longer
        ]
        news, totals = [piece.new for piece, _ in longer], [piece.total for piece, _ in longer]
        of_queries, of_keys = (
            torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device) for sizes in (news, totals)
        )
        return cls(sum(news), torch.cat(slots), of_queries, of_keys, max(news), max(totals))


class FlashPrefill:
    """Stands for ``attend`` of :class:`~aiodisagg.engine.kernels.Kernels`.

    Args:
        attend: does everything else, see :func:`aiodisagg.engine.triton_attention.attend`.
        flash: ``flash_attn_varlen_func``, or what computes the same.
    """

    def __init__(
        self, attend: Callable[..., torch.Tensor], flash: Callable[..., Any], *, min_pairs: int = MIN_PAIRS
    ) -> None:
        self._attend, self._flash, self.min_pairs = attend, flash, min_pairs

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: StepInputs, scaling: float
    ) -> torch.Tensor:
        """Attention outputs [T, heads, d] of queries [T, heads, d] over one layer of the pool [slots, kv_heads, d]."""
        if "gathered" not in step.derived:
            step.derived["gathered"] = Gathered.of(step, self.min_pairs)
        found: Any = step.derived["gathered"]
        if found is None:
            return self._attend(query, keys, values, step, scaling)
        first = sum(piece.new for piece in step.pieces) - found.tokens
        out = self._attend(query, keys, values, step, scaling, longer=False)
        done, *_ = self._flash(
            query[first : first + found.tokens],
            keys.index_select(0, found.slots),
            values.index_select(0, found.slots),
            cu_seqlens_q=found.of_queries,
            cu_seqlens_k=found.of_keys,
            max_seqlen_q=found.most_queries,
            max_seqlen_k=found.most_keys,
            softmax_scale=scaling,
            causal=True,
        )
        out[first : first + found.tokens] = done
        return out
