"""The language half of Qwen3-VL: a decoder that takes embeddings and adds DeepStack rows itself.

In transformers' monolith the decoder gets a mask of visual positions and a list of features. Here a request's rows
arrive from elsewhere, so the forward takes one dense tensor ``input_deepstack_embeds [B, T, k*h]``, zero at text
positions; level i (columns ``[i*h, (i+1)*h)``) is added to the residual stream **leaving** decoder layer i. A masked
add and a dense add of zeros give the same bits. The number of levels is the tensor's width over h: any k, 0 included.

Parameters are named as in transformers' text model, and everything per layer (attention, experts, rope) is inherited.
The base is the VL text model, not ``Qwen3MoeModel``: that one has 1-D rope.
"""

# transformers is untyped to mypy, so its classes are Any; subclassing them is what this file is for.
# mypy: disallow-subclassing-any=False

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLPreTrainedModel,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
)
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoePreTrainedModel,
    Qwen3VLMoeTextConfig,
    Qwen3VLMoeTextModel,
)


def separate_deepstack(packed: torch.Tensor, hidden_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits packed rows ``[n, (1+k)*h]`` into input embeddings ``[n, h]`` and DeepStack rows ``[n, k*h]`` (views).

    With k = 0 the second tensor has no columns. Raises ValueError if the width is not a positive multiple of h.
    """
    width = packed.shape[-1]
    if width < hidden_size or width % hidden_size:
        raise ValueError(f"rows of {width} elements are not packed rows of hidden size {hidden_size}")
    return packed[..., :hidden_size], packed[..., hidden_size:]


def _three_rows(position_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, past_key_values: Any) -> torch.Tensor:
    """M-RoPE positions [3, B, T] from what callers pass: [3, B, T], [4, B, T] (generate), [B, T] or nothing."""
    if position_ids is None:
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        row = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past
        return row.view(1, 1, -1).expand(3, inputs_embeds.shape[0], -1)
    if position_ids.ndim == 2:
        return position_ids[None].expand(3, -1, -1)
    return position_ids[-3:]


class _DeepStackModel:
    """The forward that both text models share; mixed in before transformers' class."""

    config: Any
    embed_tokens: Any
    layers: Any
    norm: Any
    rotary_emb: Any

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        input_deepstack_embeds: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states [B, T, h] after the final norm, as ``BaseModelOutputWithPast``.

        Args:
            input_ids: int64 [B, T]; exactly one of this and ``inputs_embeds`` [B, T, h].
            position_ids: int64 [3, B, T]; [B, T] counts for all three rows; None counts on from the cache.
            input_deepstack_embeds: [B, T, k*h], zero at text positions; None is k = 0.
            past_key_values: a transformers cache. None means that the attention function sees the new keys and values
                only and may own a cache itself; no cache is made here.
            use_cache: taken and ignored, for ``generate``, which passes its cache.
            kwargs: handed to every layer and so to the attention function.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        x: torch.Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        h = x.shape[-1]
        levels = 0 if input_deepstack_embeds is None else input_deepstack_embeds.shape[-1] // h
        if input_deepstack_embeds is not None:
            if input_deepstack_embeds.shape != (*x.shape[:-1], levels * h) or levels > len(self.layers):
                shapes = f"{tuple(input_deepstack_embeds.shape)} do not fit {tuple(x.shape)}, {len(self.layers)} layers"
                raise ValueError(f"input_deepstack_embeds {shapes}")
            input_deepstack_embeds = input_deepstack_embeds.to(x.dtype)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=None,
        )
        rope = self.rotary_emb(x, _three_rows(position_ids, x, past_key_values))
        for i, layer in enumerate(self.layers):
            x = layer(
                x,
                attention_mask=mask,
                position_ids=None,
                past_key_values=past_key_values,
                position_embeddings=rope,
                **kwargs,
            )
            if i < levels and input_deepstack_embeds is not None:
                x = x + input_deepstack_embeds[..., i * h : (i + 1) * h]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class _DeepStackForCausalLM:
    """Head and forward that both language halves share; mixed in before transformers' classes."""

    model: Any
    lm_head: Any

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        input_deepstack_embeds: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, kept, vocab]; ``logits_to_keep``: 0 all, n the last n, or a tensor of indices along T.

        The rest is as for the model. Computing one row and computing all and taking one differ in the last bits (a
        matrix-vector product is another kernel), which matters to who compares exactly.
        """
        kwargs.pop("return_dict", None)
        out = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            input_deepstack_embeds=input_deepstack_embeds,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = out.last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, kept, :]), past_key_values=out.past_key_values)


class Qwen3MoeModelWithDeepStack(_DeepStackModel, Qwen3VLMoeTextModel):
    """Qwen3-VL-MoE's text model with ``input_deepstack_embeds``."""

    # transformers finds out by reading the source of the class's module whether experts can be switched; for a class
    # outside transformers it falls back to eager experts without a word.
    _can_set_experts_implementation_cached_value = True


class Qwen3MoeForCausalLMWithDeepStack(_DeepStackForCausalLM, Qwen3VLMoePreTrainedModel, GenerationMixin):
    """The language half of ``Qwen3VLMoeForConditionalGeneration``."""

    config: Qwen3VLMoeTextConfig
    config_class = Qwen3VLMoeTextConfig
    input_modalities = ("text",)
    _can_set_experts_implementation_cached_value = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Qwen3VLMoeTextConfig) -> None:
        super().__init__(config)
        self.model = Qwen3MoeModelWithDeepStack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class Qwen3ModelWithDeepStack(_DeepStackModel, Qwen3VLTextModel):
    """Qwen3-VL's dense text model with ``input_deepstack_embeds``."""


class Qwen3ForCausalLMWithDeepStack(_DeepStackForCausalLM, Qwen3VLPreTrainedModel, GenerationMixin):
    """The language half of ``Qwen3VLForConditionalGeneration``."""

    config: Qwen3VLTextConfig
    config_class = Qwen3VLTextConfig
    input_modalities = ("text",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Qwen3VLTextConfig) -> None:
        super().__init__(config)
        self.model = Qwen3ModelWithDeepStack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
