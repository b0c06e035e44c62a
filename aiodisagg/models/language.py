"""What an engine is handed: the language half of a model, ready to run.

A plain text model (Qwen3, Qwen3-MoE) rides along behind the same forward, with no DeepStack levels and 1-D positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from aiodisagg.protocol.rows import RowLayout


class PlainTextModel(nn.Module):
    """transformers' own text model behind the DeepStack model's forward; positions [3, B, T] lose two equal rows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    @property
    def config(self) -> Any:
        return self.inner.config

    @property
    def embed_tokens(self) -> nn.Module:
        found: nn.Module = self.inner.embed_tokens
        return found

    def set_attn_implementation(self, name: str) -> None:
        self.inner.set_attn_implementation(name)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        input_deepstack_embeds: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``Qwen3MoeModelWithDeepStack.forward``, but raises ValueError for DeepStack rows."""
        if input_deepstack_embeds is not None and input_deepstack_embeds.shape[-1]:
            raise ValueError("a text model takes no DeepStack rows")
        if position_ids is not None and position_ids.ndim == 3:
            position_ids = position_ids[0]
        kwargs.setdefault("use_cache", False)  # or transformers makes a cache nobody asked for
        return self.inner(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **kwargs,
        )


@dataclass(frozen=True, slots=True)
class LanguageHalf:
    """The language half, in eval mode, without gradients.

    ``model(inputs_embeds=, position_ids=, input_deepstack_embeds=, past_key_values=, attention_mask=, **kw)`` gives
    ``last_hidden_state`` [B, T, h]; ``lm_head`` makes logits of it. Not thread-safe: one forward at a time.
    """

    model: Any
    """Qwen3MoeModelWithDeepStack, Qwen3ModelWithDeepStack or PlainTextModel."""
    lm_head: nn.Module
    causal: Any
    """``model`` and ``lm_head`` as one transformers model."""
    config: Any
    """The text config: num_hidden_layers, num_key_value_heads, head_dim, vocab_size ..."""
    layout: RowLayout
    """Of rows that come from an encode half. Their dtype need not be that of this half; rows are cast."""
    device: torch.device
    dtype: torch.dtype
    eos_ids: frozenset[int]
    max_positions: int
    """Longest context, prompt and answer together, in tokens."""

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., h] of token ids [...] on this half's device."""
        found: torch.Tensor = self.model.embed_tokens(input_ids.to(self.device))
        return found

    @property
    def text_only(self) -> bool:
        """It takes no rows: there is nothing for encode peers to do."""
        return isinstance(self.model, PlainTextModel)
