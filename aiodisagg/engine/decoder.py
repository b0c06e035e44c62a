"""The forward pass of Qwen3's decoders (VL or plain, dense or MoE) in few launches, over transformers' own weights.

Numerically it is transformers' layer, stage by stage (:mod:`aiodisagg.engine.kernels` says what each is); what changes
is how many launches that takes and that nothing waits for the device, so that a step can be captured. Projections that
read the same input become one product: their weights are joined in memory and transformers' parameters become views of
it, so the model itself still works and takes no more room.

DeepStack level i is added to the residual stream leaving layer i, which is the first thing that the next norm does.
"""

# The model is transformers' untyped nn.Module, hence Any.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from aiodisagg.engine.attention import KvPool, has_mrope
from aiodisagg.engine.experts import Experts, run_loop
from aiodisagg.engine.inputs import StepInputs
from aiodisagg.engine.kernels import Kernels, Shapes

LAYERS = ("Qwen3VLMoeTextDecoderLayer", "Qwen3VLTextDecoderLayer", "Qwen3MoeDecoderLayer", "Qwen3DecoderLayer")
"""transformers' layers whose mathematics this is."""
ROPES = ("default", "linear", "yarn", "llama3")
"""Frequencies that are known when a model is made; the model's own module turns positions into angles."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """``router`` None: a dense layer, whose gate_up is [2I, h] and down [h, I]; else [E, 2I, h] and [E, h, I]."""

    before: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    out: torch.Tensor
    out_bias: torch.Tensor | None
    after: torch.Tensor
    router: torch.Tensor | None
    gate_up: torch.Tensor
    down: torch.Tensor


def unsupported(model: Any) -> str | None:
    """Why :class:`FusedDecoder` cannot run this model; None: it can."""
    inner = getattr(model, "model", None)
    layers = getattr(inner, "layers", None)
    if inner is None or layers is None or not len(layers):
        return "it has no model.layers"
    config = inner.config
    names = {type(layer).__name__ for layer in layers}
    if not names <= set(LAYERS):
        return f"its layers are {', '.join(sorted(names))}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if any(getattr(layer.self_attn, "sliding_window", None) is not None for layer in layers):
        return "some of its layers have a sliding window"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"its rope is {rope}"
    if not all(getattr(layer.mlp.gate, "norm_topk_prob", True) for layer in layers if hasattr(layer.mlp, "experts")):
        return "its router does not renormalise"
    return None


def shapes_of(model: Any, page_size: int) -> Shapes:
    """What kernels for this model depend on. ``experts`` is 0 for a dense one."""
    config, attention = model.model.config, model.model.layers[0].self_attn
    sparse = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    weight = model.get_input_embeddings().weight
    return Shapes(
        hidden=int(config.hidden_size),
        heads=int(config.num_attention_heads),
        kv_heads=int(config.num_key_value_heads),
        head_dim=int(attention.head_dim),
        experts=int(sparse[0].experts.down_proj.shape[0]) if sparse else 0,
        top_k=int(config.num_experts_per_tok) if sparse else 0,
        page_size=page_size,
        dtype=weight.dtype,
        device=weight.device,
    )


class FusedDecoder:
    """Computes a step: hidden states in few launches, keys and values into the pool, logits of some tokens.

    Args:
        model: one that :func:`unsupported` has nothing to say of; its projections are joined in place.

    ``kernels`` and ``experts`` (which starts as the loop) may be replaced between steps.
    """

    def __init__(self, model: Any, kernels: Kernels) -> None:
        self.kernels, self.experts = kernels, Experts({"loop": run_loop}, ((0, "loop"),))
        inner = model.model
        self._table, self._rotary, self._head = inner.embed_tokens.weight, inner.rotary_emb, model.lm_head
        self._mrope = has_mrope(model)
        self._norm, self._eps = inner.norm.weight, float(inner.config.rms_norm_eps)
        self._scaling = float(inner.layers[0].self_attn.scaling)
        self.layers = [_layer(layer) for layer in inner.layers]
        self.sparse = next((layer for layer in self.layers if layer.router is not None), None)
        """The first layer with experts."""
        self._count = 0 if self.sparse is None else int(self.sparse.down.shape[0])
        self._top_k = 0 if self.sparse is None else int(inner.config.num_experts_per_tok)

    def __call__(
        self, step: StepInputs, pool: KvPool, rows: torch.Tensor | None = None, *, every: bool = False
    ) -> torch.Tensor:
        """Logits [n, vocab] of ``step.sampled``, or of all tokens if ``every``.

        ``rows`` [T, (1+levels)*h]: where ``step.visual`` is set, the embedding and the DeepStack rows of the token.
        """
        run, h = self.kernels, self._table.shape[1]
        hidden = functional.embedding(step.ids, self._table)
        levels = 0
        if rows is not None:
            hidden = torch.where(step.visual[:, None] != 0, rows[:, :h], hidden)
            levels = rows.shape[1] // h - 1
        cos, sin = (part[0] for part in self._rotary(hidden[None], self._where(step)))
        delta: torch.Tensor | None = None
        ids: torch.Tensor | None = None
        for i, layer in enumerate(self.layers):
            x = self._add_norm(hidden, delta, layer.before, ids, step, rows if 0 < i <= levels else None, i)
            qkv = functional.linear(x, layer.qkv, layer.qkv_bias)
            keys, values = pool.keys[i], pool.values[i]
            query = run.rotate_store(
                qkv, layer.q_norm, layer.k_norm, self._eps, cos, sin, step.slots, keys, values
            )  # fmt: skip
            seen = run.attend(query, keys, values, step, self._scaling)
            delta = functional.linear(seen.view(len(seen), -1), layer.out, layer.out_bias)
            x = self._add_norm(hidden, delta, layer.after, None, step, None, i)
            delta, ids = self._feed_forward(layer, x, step)
        last = len(self.layers)
        x = self._add_norm(hidden, delta, self._norm, ids, step, rows if last <= levels else None, last)
        logits: torch.Tensor = self._head(x if every else x.index_select(0, step.sampled))
        return logits

    def _where(self, step: StepInputs) -> torch.Tensor:
        return step.positions[:, None] if self._mrope else step.positions[:1]

    def _add_norm(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        ids: torch.Tensor | None,
        step: StepInputs,
        rows: torch.Tensor | None,
        level: int,
    ) -> torch.Tensor:
        return self.kernels.add_norm(
            hidden,
            delta,
            weight,
            self._eps,
            ids=ids,
            experts=self._count,
            visual=None if rows is None else step.visual,
            rows=rows,
            column=level * hidden.shape[1],
        )

    def _feed_forward(
        self, layer: LayerWeights, x: torch.Tensor, step: StepInputs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if layer.router is None:
            gate, up = functional.linear(x, layer.gate_up).chunk(2, dim=-1)
            return functional.linear(functional.silu(gate) * up, layer.down), None
        ids, weights = self.kernels.route(functional.linear(x, layer.router), self._top_k, step.count)
        return self.experts.run(x, ids, weights, layer.gate_up, layer.down), ids


def _layer(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    sparse = hasattr(mlp, "experts")
    qkv, bias = _join(attention.q_proj, attention.k_proj, attention.v_proj)
    return LayerWeights(
        before=layer.input_layernorm.weight,
        qkv=qkv,
        qkv_bias=bias,
        q_norm=attention.q_norm.weight,
        k_norm=attention.k_norm.weight,
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        after=layer.post_attention_layernorm.weight,
        router=mlp.gate.weight if sparse else None,
        gate_up=mlp.experts.gate_up_proj if sparse else _join(mlp.gate_proj, mlp.up_proj)[0],
        down=mlp.experts.down_proj if sparse else mlp.down_proj.weight,
    )


def _join(*linears: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (and biases) of layers with the same input, one above the other; theirs become views of it."""
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([linear.weight for linear in linears])
        at = 0
        for linear in linears:
            stop = at + linear.weight.shape[0]
            linear.weight = nn.Parameter(whole[at:stop], requires_grad=False)
            at = stop
        bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return whole, bias
