"""The vision tower on an accelerator: transformers' weights, a third of its launches, and no wait for the device.

What differs from transformers' forward, and why (1080p, 27 blocks, an H200):

* lengths of segments come from the grids, which the host knows; transformers asks the device, once a block;
* positions (resampled embeddings, rope) of a grid are kept for the next picture of that size;
* the patch embedding is a product, not a three-dimensional convolution with one step;
* rope is one kernel in place, where casting, turning and casting back was ten; so are a residual and the norm behind
  it, and GELU is in the product before it;
* attention runs by whichever kernel is fastest here for this head size (:mod:`~aiodisagg.models.tower_kernels`), all
  equal segments that follow each other in one call;
* where it can, all of it is replayed from a graph (:mod:`~aiodisagg.models.tower_graphs`).

The sums are the same up to the order of rounding.
"""

# The tower is transformers' untyped nn.Module, hence Any.

# torch declares no types for streams, events and some methods.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from aiodisagg.device.alone import Alone
from aiodisagg.device.flash import flash_attention
from aiodisagg.device.graphs import Capture
from aiodisagg.models.tower_graphs import AttendRanges, TowerGraphs

GRIDS_KEPT = 8
WAIT_PATCHES = 8192
"""So many patches of a block are computed between two looks at whether a step with prompts wants the device: a
millisecond."""

Grid = tuple[int, int, int]
Attend = Callable[[torch.Tensor, int, int, torch.Tensor, float], None]
"""(qkv [n*size, 3, heads, d], n, size, out [n*size, heads, d], scaling): each of n segments attends to itself."""
Turn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(qkv [N, 3, heads, d], cos [N, d], sin [N, d]) with rope in queries and keys."""
AddNorm = Callable[[torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]
"""(x [N, hidden], delta [N, hidden], a LayerNorm): ``x + delta``, maybe in the memory of ``x``, and its norm."""
Grow = Callable[[Any, torch.Tensor], torch.Tensor]
"""(a block's mlp, x [N, hidden]): its first product and activation, [N, intermediate]."""


def turn(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rope in float32, rounded once."""
    wide = qkv[:, :2].float()
    first, second = wide.chunk(2, dim=-1)
    turned = wide * cos[:, None, None] + torch.cat((-second, first), dim=-1) * sin[:, None, None]
    qkv[:, :2] = turned.to(qkv.dtype)
    return qkv


def add_norm(x: torch.Tensor, delta: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x = x + delta
    return x, norm(x)


def grow(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, mlp.act_fn(mlp.linear_fc1(x)))


def grow_at_once(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """The same with the activation in the product, if it is GELU by tanh."""
    first = mlp.linear_fc1
    return torch._addmm_activation(first.bias, x, first.weight.t(), use_gelu=True)


def sdpa(backend: SDPBackend | None, pad_to: int | None = None) -> Attend:
    """torch's attention by one backend (None: its own choice), heads padded with zeros to ``pad_to`` elements."""

    def attend(qkv: torch.Tensor, segments: int, size: int, out: torch.Tensor, scaling: float) -> None:
        heads, d = qkv.shape[2:]
        if pad_to is not None:
            qkv = functional.pad(qkv, (0, pad_to - d))
        q, k, v = qkv.view(segments, size, 3, heads, -1).permute(2, 0, 3, 1, 4)
        if backend is None:
            made = functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        else:
            with sdpa_kernel(backend):
                made = functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        out.view(segments, size, heads, d).copy_(made[..., :d].transpose(1, 2))

    return attend


@dataclass(frozen=True, slots=True)
class BySize:
    """For each size of a segment the way that was fastest there."""

    ways: tuple[tuple[int, Attend], ...]
    """(from so many patches on, how), ascending."""

    def __call__(self, qkv: torch.Tensor, segments: int, size: int, out: torch.Tensor, scaling: float) -> None:
        found = self.ways[0][1]
        for least, way in self.ways:
            if size >= least:
                found = way
        found(qkv, segments, size, out, scaling)


def flash_4() -> Attend:
    """FlashAttention 4, of the extra ``gpu``: its kernel for Hopper pads heads of 72 to 80. Raises ImportError."""
    flash_attn_func = flash_attention().flash_attn_func

    def attend(qkv: torch.Tensor, segments: int, size: int, out: torch.Tensor, scaling: float) -> None:
        q, k, v = qkv.view(segments, size, 3, *qkv.shape[2:]).unbind(2)
        made, *_ = flash_attn_func(q, k, v, softmax_scale=scaling)
        out.view(made.shape).copy_(made)

    return attend


def flash_4_ranges(scaling: float) -> AttendRanges:
    """The same over segments whose bounds the device knows. Raises ImportError."""
    flash_attn_varlen_func = flash_attention().flash_attn_varlen_func

    def attend(qkv: torch.Tensor, bounds: torch.Tensor, most: int) -> torch.Tensor:
        q, k, v = qkv.unbind(1)
        made, *_ = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=most, max_seqlen_k=most,
            softmax_scale=scaling,
        )  # fmt: skip
        return cast(torch.Tensor, made).reshape(qkv.shape[0], -1)

    return attend


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """Of one grid, or of several: embeddings [n, hidden], cos and sin float32 [n, head_dim]. Equal to itself only."""

    embeddings: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def together(cls, parts: Sequence[Positions]) -> Positions:
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat(of) for of in zip(*((p.embeddings, p.cos, p.sin) for p in parts), strict=True)))


class FusedTower:
    """Packed rows of patches by transformers' Qwen3-VL(-MoE) vision tower. One call at a time.

    ``turn``, ``add_norm``, ``grow`` and ``attend`` may be replaced by what :mod:`~aiodisagg.models.tower_kernels`
    finds.
    """

    def __init__(self, tower: Any) -> None:
        self._tower = tower
        attention = tower.blocks[0].attn
        self.heads, self.head_dim = int(attention.num_heads), int(attention.head_dim)
        self._scaling = float(attention.scaling)
        self._levels = {int(block): i for i, block in enumerate(tower.deepstack_visual_indexes)}
        embed = tower.patch_embed.proj
        self._patch, self._patch_bias = embed.weight.view(embed.weight.shape[0], -1), embed.bias
        self._positions: OrderedDict[Grid, Positions] = OrderedDict()
        self.turn: Turn = turn
        self.add_norm: AddNorm = add_norm
        self.grow: Grow = grow
        self.attend: Attend = sdpa(None)
        self.graphs: TowerGraphs | None = None
        """Asked first."""
        self.alone: Alone | None = None
        """Waited for between blocks."""

    @property
    def activation(self) -> str:
        """Of the blocks, as configurations name it."""
        return str(self._tower.config.hidden_act)

    @property
    def block(self) -> Any:
        """The first one."""
        return self._tower.blocks[0]

    def use_graphs(self, attend: AttendRanges, capture: Capture, **sizes: Any) -> None:
        """Computes from graphs what they have room for, attending by ``attend``; see TowerGraphs for ``sizes``."""
        config = self._tower.config
        self.graphs = TowerGraphs(
            self, attend, capture, values=self._patch.shape[1], hidden=self._patch.shape[0],
            merge=config.spatial_merge_size**2, width=(1 + len(self._levels)) * config.out_hidden_size,
            dtype=self._patch.dtype, device=self._patch.device, **sizes,
        )  # fmt: skip

    def __call__(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Rows [sum(t*h*w)/merge**2, (1+levels)*out_hidden] of patches [sum(t*h*w), values]."""
        found = [self.positions(grid) for grid in grids]
        segments = [(t, h * w) for t, h, w in grids]
        if self.graphs is not None:
            rows = self.graphs(patches, found, [size for times, size in segments for _ in range(times)])
            if rows is not None:
                return rows
        return self.compute(patches, Positions.together(found), lambda qkv: self._attend(qkv, segments))

    def compute(
        self, patches: torch.Tensor, positions: Positions, attend: Callable[[torch.Tensor], torch.Tensor],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The tower without what differs from batch to batch: which patches attend to each other is ``attend``'s, from
        queries, keys and values [N, 3, heads, d] to [N, heads*d]."""
        tower, heads, d = self._tower, self.heads, self.head_dim
        x = functional.linear(patches, self._patch, self._patch_bias) + positions.embeddings
        deep: dict[int, torch.Tensor] = {}
        normed = tower.blocks[0].norm1(x)
        looks = max(1, WAIT_PATCHES // max(1, len(x)))
        for i, (block, after) in enumerate(itertools.zip_longest(tower.blocks, tower.blocks[1:])):
            if self.alone is not None and i % looks == 0:
                self.alone.wait()
            qkv = block.attn.qkv(normed).view(-1, 3, heads, d)
            seen = block.attn.proj(attend(self.turn(qkv, positions.cos, positions.sin)))
            x, normed = self.add_norm(x, seen, block.norm2)
            made = block.mlp.linear_fc2(self.grow(block.mlp, normed))
            x, normed = (x + made, normed) if after is None else self.add_norm(x, made, after.norm1)
            if i in self._levels:
                deep[self._levels[i]] = tower.deepstack_merger_list[self._levels[i]](x)
        return torch.cat([tower.merger(x), *(deep[level] for level in sorted(deep))], dim=-1, out=out)

    def _attend(self, qkv: torch.Tensor, segments: Sequence[tuple[int, int]]) -> torch.Tensor:
        out = torch.empty(qkv.shape[0], self.heads, self.head_dim, dtype=qkv.dtype, device=qkv.device)
        at = 0
        for size, group in itertools.groupby(segments, key=lambda segment: segment[1]):
            count = sum(times for times, _ in group)
            stop = at + count * size
            self.attend(qkv[at:stop], count, size, out[at:stop], self._scaling)
            at = stop
        return out.view(qkv.shape[0], -1)

    def positions(self, grid: Grid) -> Positions:
        """Computed as transformers does, and kept for the last few grids."""
        kept = self._positions.get(grid)
        if kept is None:
            kept = self._positions[grid] = self._compute(grid)
            if len(self._positions) > GRIDS_KEPT:
                self._positions.popitem(last=False)
        self._positions.move_to_end(grid)
        return kept

    def _compute(self, grid: Grid) -> Positions:
        tower, table = self._tower, self._tower.pos_embed.weight
        grids = torch.tensor([grid], device=table.device)
        merge = tower.config.spatial_merge_size
        indices, weights = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        embeddings = (tower.pos_embed(indices) * weights[:, :, None]).sum(1).to(table.dtype)
        cos, sin = tower.rotary_pos_emb(embeddings.float(), get_vision_position_ids(grids, merge))
        return Positions(embeddings, cos.float().contiguous(), sin.float().contiguous())
