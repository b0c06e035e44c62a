"""The stages of a decoder layer on a device: what each must do, in plain torch; and which implementation runs.

The functions here are the reference and the fallback. :func:`choose_kernels` takes a Triton kernel only if, on this
device and with the model's own shapes, it agrees with them; whatever does not (an older compiler, an unusual head size)
is replaced by its reference and logged, so a model runs slowly rather than wrongly. References do not know padding,
hence CUDA graphs need Triton's ``attend``, ``rotate_store``, ``route`` and ``add_norm``.
"""

# torch declares no types for streams, events and some methods.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from aiodisagg.device.flash import flash_attention
from aiodisagg.engine.inputs import Piece, StepInputs, listed

logger = logging.getLogger(__name__)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension as the model does it: in float32, rounded before the weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_norm(
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    ids: torch.Tensor | None = None,
    experts: int = 0,
    visual: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    column: int = 0,
) -> torch.Tensor:
    """Adds to the residual stream ``hidden`` [T, h] in place and returns its RMSNorm.

    Args:
        delta: [T, h]; or, with ``ids`` [T, k] below ``experts``, [T*k, h]: the sum over a token's k rows is added.
        rows: [T, (1+levels)*h]; where ``visual`` [T] is not zero, columns ``[column, column + h)`` are added as well.
    """
    if delta is not None:
        if ids is not None:
            parts = delta.view(*ids.shape, -1).masked_fill((ids >= experts)[..., None], 0)
            delta = parts.sum(1, dtype=torch.float32).to(hidden.dtype)
        hidden += delta
    if rows is not None and visual is not None:
        row = rows[:, column : column + hidden.shape[1]]
        hidden += torch.where(visual[:, None] != 0, row, torch.zeros_like(row))
    return rms_norm(hidden, weight, eps)


def rotate_store(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Norm per head and rope; writes keys and values of ``slots`` [T] into a layer of the pool [slots, kv_heads, d].

    ``qkv`` is [T, (heads + 2 * kv_heads) * d], ``cos`` and ``sin`` [T, d]. Returns queries [T, heads, d].
    """
    kv_heads, d = keys.shape[1:]
    q, k, v = qkv.view(qkv.shape[0], -1, d).split((qkv.shape[1] // d - 2 * kv_heads, kv_heads, kv_heads), dim=1)

    def turned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = rms_norm(x, weight, eps)
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    where = slots.long()
    keys.index_copy_(0, where, turned(k, k_norm))
    values.index_copy_(0, where, v)
    return turned(q, q_norm)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: StepInputs, scaling: float
) -> torch.Tensor:
    """Attention of queries [T, heads, d] over a layer of the pool: each segment to its past and itself, causally."""
    out = torch.empty_like(query)
    group = query.shape[1] // keys.shape[1]
    at = 0
    for piece in step.pieces:
        pages = torch.tensor(piece.pages[: -(-piece.total // step.page_size)], device=query.device)
        slots = (pages[:, None] * step.page_size + torch.arange(step.page_size, device=query.device)).view(-1)
        k, v = (pool[slots[: piece.total]].repeat_interleave(group, 1).transpose(0, 1) for pool in (keys, values))
        q = query[at : at + piece.new].transpose(0, 1)
        mask = torch.ones(piece.new, piece.total, dtype=torch.bool, device=query.device)
        mask = mask.tril_(piece.total - piece.new)
        done = functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scaling)
        out[at : at + piece.new] = done[0].transpose(0, 1)
        at += piece.new
    return out


def route(logits: torch.Tensor, top_k: int, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each token, int32 [T, k], and their weights [T, k]: the softmax of logits [T, E], renormalised.

    From token ``count`` [1] on there is padding: its ids are E, which no expert has.
    """
    values, ids = torch.topk(functional.softmax(logits, dim=-1, dtype=torch.float32), top_k, dim=-1)
    weights = (values / values.sum(-1, keepdim=True)).to(logits.dtype)
    padding = torch.arange(logits.shape[0], device=logits.device) >= count
    return ids.to(torch.int32).masked_fill_(padding[:, None], logits.shape[1]), weights


@dataclass(slots=True)
class Kernels:
    """One implementation of each stage, and the names of those that are not the reference."""

    add_norm: Callable[..., torch.Tensor] = add_norm
    rotate_store: Callable[..., torch.Tensor] = rotate_store
    attend: Callable[..., torch.Tensor] = attend
    route: Callable[..., tuple[torch.Tensor, torch.Tensor]] = route
    fast: frozenset[str] = frozenset()

    @property
    def padded(self) -> bool:
        """Whether batches may have padding, and steps be captured."""
        return {"add_norm", "rotate_store", "attend", "route"} <= self.fast


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the kernels of a model depend on."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    page_size: int
    dtype: torch.dtype
    device: torch.device


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN is infinite."""
    ours, reference = ours.double(), reference.double()
    found = float((ours - reference).norm() / reference.norm().clamp_min(1e-30))
    return found if found == found else float("inf")


def choose_kernels(shapes: Shapes) -> Kernels:
    """Triton's kernels where they agree with the references on this device. Compiles; takes seconds."""
    try:
        from aiodisagg.engine import triton_attention, triton_layers
    except Exception as error:  # no Triton, or one that cannot define them
        logger.warning("no Triton kernels: %r", error)
        return Kernels()
    candidates: dict[str, tuple[Any, Callable[[Any], float]]] = {
        "add_norm": (triton_layers.add_norm, lambda f: _check_add_norm(f, shapes)),
        "rotate_store": (triton_layers.rotate_store, lambda f: _check_rotate_store(f, shapes)),
        "attend": (triton_attention.attend, lambda f: _check_attend(f, shapes)),
        "route": (triton_layers.route, lambda f: _check_route(f, shapes)),
    }
    chosen, limit = {}, 1e-4 if shapes.dtype is torch.float32 else 2e-2
    for name, (kernel, check) in candidates.items():
        if name == "route" and not shapes.experts:
            chosen[name] = kernel  # not used; must not keep graphs away
            continue
        try:
            found = check(kernel)
        except Exception as error:  # what a compiler or a driver raises
            logger.warning("kernel %s is not used: %r", name, error)
            continue
        if found <= limit:
            chosen[name] = kernel
        else:
            logger.warning("kernel %s is not used: it is off by %.1e", name, found)
    if "attend" in chosen and shapes.device.type == "cuda":
        chosen["attend"] = _with_flash(chosen["attend"], shapes, limit)
    return Kernels(**chosen, fast=frozenset(chosen))


def _with_flash(kernel: Any, shapes: Shapes, limit: float) -> Any:
    """FlashAttention 4 for long prefill, if it is there and agrees."""
    from aiodisagg.engine.flash import FlashPrefill

    try:
        flash_attn_varlen_func = flash_attention().flash_attn_varlen_func

        found = _check_attend(FlashPrefill(kernel, flash_attn_varlen_func), shapes, lists=True)
        if found > limit:
            raise ValueError(f"it is off by {found:.1e}")
    except Exception as error:  # not installed, or not for this device
        logger.info("prefill by flash-attn-4 is not used: %s", error)
        return kernel
    logger.info("prefill by flash-attn-4 where there is much of it")
    return FlashPrefill(kernel, flash_attn_varlen_func)


def _draw(shapes: Shapes, *size: int) -> torch.Tensor:
    generator = torch.Generator(shapes.device).manual_seed(sum(size))
    return torch.randn(size, generator=generator, device=shapes.device, dtype=torch.float32).to(shapes.dtype)


def _check_add_norm(kernel: Any, shapes: Shapes) -> float:
    tokens, h = 5, shapes.hidden
    weight, rows = _draw(shapes, h), _draw(shapes, tokens, 3 * h)
    visual = torch.tensor([1, 0, 1, 1, 0], dtype=torch.int32, device=shapes.device)
    worst = 0.0
    cases: list[dict[str, Any]] = [{"delta": None}, {"delta": _draw(shapes, tokens, h)}]
    if shapes.experts:
        ids = torch.randint(0, shapes.experts + 1, (tokens, shapes.top_k), dtype=torch.int32, device=shapes.device)
        cases.append({"delta": _draw(shapes, tokens * shapes.top_k, h), "ids": ids, "experts": shapes.experts})
    cases += [{**case, "visual": visual, "rows": rows, "column": h} for case in cases[1:]]
    for case in cases:
        hidden, again = _draw(shapes, tokens, h), _draw(shapes, tokens, h)
        wanted = add_norm(hidden, weight=weight, eps=1e-6, **case)
        worst = max(worst, distance(kernel(again, weight=weight, eps=1e-6, **case), wanted), distance(again, hidden))
    return worst


def _check_rotate_store(kernel: Any, shapes: Shapes) -> float:
    tokens, d = 7, shapes.head_dim
    qkv = _draw(shapes, tokens, (shapes.heads + 2 * shapes.kv_heads) * d)
    cos, sin, q_norm, k_norm = _draw(shapes, tokens, d), _draw(shapes, tokens + 1, d)[1:], *_draw(shapes, 2, d)
    slots = torch.tensor([3, 0, 9, 4, 11, 2, 7], dtype=torch.int32, device=shapes.device)
    pools = [torch.zeros(2, 12, shapes.kv_heads, d, dtype=shapes.dtype, device=shapes.device) for _ in range(2)]
    wanted = rotate_store(qkv, q_norm, k_norm, 1e-6, cos, sin, slots, *pools[0])
    found = kernel(qkv, q_norm, k_norm, 1e-6, cos, sin, slots, *pools[1])
    return max(distance(found, wanted), distance(pools[1], pools[0]))


def _check_route(kernel: Any, shapes: Shapes) -> float:
    tokens = 9
    # Distinct logits, so that there is one answer; shuffled per token.
    spread = torch.linspace(-3, 3, shapes.experts, device=shapes.device)
    logits = torch.stack([spread[torch.randperm(shapes.experts, device=shapes.device)] for _ in range(tokens)])
    count = torch.tensor([tokens - 2], dtype=torch.int32, device=shapes.device)
    wanted, found = (f(logits, shapes.top_k, count) for f in (route, kernel))
    if not torch.equal(wanted[0], found[0]):
        return float("inf")
    return distance(found[1][:-2], wanted[1][:-2])


def _check_attend(kernel: Any, shapes: Shapes, *, lists: bool = False) -> float:
    """Decodes, prompts, and prompts with a past in one batch, on pages in no order. ``lists``: it wants keys listed,
    and has to put up with padding of all kinds."""
    page = shapes.page_size
    lengths = [(1, 5 * page + 3), (1, 1), (3 * page + 1, 3 * page + 1), (page + 2, 9 * page), (150, 170)]
    order = iter(torch.randperm(sum(-(-total // page) for _, total in lengths)).tolist())
    pieces = [Piece(new, total, [next(order) for _ in range(-(-total // page))]) for new, total in lengths]
    tokens, pages = sum(p.new for p in pieces), sum(len(p.pages) for p in pieces)
    spare = 9 if lists else 0
    keys = listed(pieces) + spare if lists else 0
    step = new_inputs(shapes, tokens=tokens + spare, segments=len(pieces) + spare, pages=pages, keys=keys)
    pad_to = (tokens + spare, len(pieces), step.tiles) if lists else None
    step.fill(pieces, torch.zeros(tokens).numpy(), torch.zeros(3, tokens).numpy(), pad_to=pad_to, keys=keys)
    query = _draw(shapes, tokens + spare, shapes.heads, shapes.head_dim)
    pool = _draw(shapes, 2, pages * page, shapes.kv_heads, shapes.head_dim)
    scaling = shapes.head_dim**-0.5
    found, wanted = (run(query, pool[0], pool[1], step, scaling)[:tokens] for run in (kernel, attend))
    return distance(found, wanted)


def new_inputs(shapes: Shapes, *, tokens: int, segments: int, pages: int, keys: int = 0) -> StepInputs:
    """Inputs whose tiles suit the attention kernel of these shapes."""
    return StepInputs(
        tokens=tokens,
        segments=segments,
        pages=pages,
        page_size=shapes.page_size,
        tile_tokens=tile_tokens(shapes.heads // shapes.kv_heads),
        device=shapes.device,
        keys=keys,
    )


def tile_tokens(group: int) -> int:
    """Tokens of a tile of the prefill kernel: its 128 rows are (token, head of the group) pairs."""
    return max(1, 128 // group)
