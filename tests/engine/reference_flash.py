"""FlashAttention as torch computes it, on the CPU."""

from __future__ import annotations

from typing import Any

import torch

TILE = 128


class Flash:
    """What ``flash_attn_varlen_func`` computes, and how often it was asked; what is of no sequence is NaN.

    As the kernel for Hopper, it reads keys and values in whole tiles from the beginning of a sequence, past its end up
    to that of the tensor: scores there are replaced, values there are multiplied by 0.
    """

    calls = 0

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: bool = False,
    ) -> tuple[torch.Tensor, Any]:  # fmt: skip
        self.calls += 1
        assert k.shape == v.shape and k.stride(-1) == v.stride(-1) == 1
        queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert len(queries) == len(keys)
        out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        for first, last, start, stop in zip(queries, queries[1:], keys, keys[1:], strict=False):
            if last > first:
                new, total = last - first, stop - start
                assert new <= max_seqlen_q and total <= max_seqlen_k
                read = min(start + -(-total // TILE) * TILE, k.shape[0])
                seen = torch.arange(read - start) < total
                if causal:
                    seen = seen & torch.ones(new, read - start, dtype=torch.bool).tril_(total - new)
                group = q.shape[1] // k.shape[1]
                its = [one[start:read].repeat_interleave(group, 1).transpose(0, 1) for one in (k, v)]
                scores = q[first:last].transpose(0, 1) @ its[0].transpose(1, 2) * softmax_scale
                weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
                out[first:last] = (weights @ its[1]).transpose(0, 1)
        return out, None
