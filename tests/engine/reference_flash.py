"""FlashAttention as torch computes it, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


class Flash:
    """What ``flash_attn_varlen_func`` computes, and how often it was asked; what is of no sequence is NaN."""

    calls = 0

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: bool,
    ) -> tuple[torch.Tensor, Any]:  # fmt: skip
        self.calls += 1
        assert causal and k.shape == v.shape and k.is_contiguous()
        queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert len(queries) == len(keys)
        out = torch.full_like(q, float("nan"))
        for first, last, start, stop in zip(queries, queries[1:], keys, keys[1:], strict=False):
            if last > first:
                assert last - first <= max_seqlen_q and stop - start <= max_seqlen_k
                mask = torch.ones(last - first, stop - start, dtype=torch.bool).tril_(stop - start - (last - first))
                heads = [one.transpose(0, 1)[None] for one in (q[first:last], k[start:stop], v[start:stop])]
                done = scaled_dot_product_attention(*heads, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
                out[first:last] = done[0].transpose(0, 1)
        return out, None
