"""What the monolith says to a plan: the truth that a disaggregated answer is compared with.

Everything runs through transformers' own forward and ``generate``, with the plan's token ids and patches as input;
positions are transformers' own. A monolith keeps state of one request (``rope_deltas``): one call at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from aiodisagg.models.base import ItemKind, Patches, PromptPlan


def monolith_inputs(monolith: Any, plan: PromptPlan, patches: Sequence[Patches]) -> dict[str, torch.Tensor]:
    """Keyword arguments for the monolith's forward: ids [1, T], patches and grids by kind, token types [1, T].

    ``patches``: one for each of the plan's items, in order.
    """
    device = monolith.device
    ids = torch.from_numpy(plan.input_ids)[None]
    types = torch.zeros_like(ids)
    for item in plan.items:
        for start, stop in item.spans:
            types[0, start:stop] = 1 if item.kind is ItemKind.IMAGE else 2
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    for kind, pixels, grids in (
        (ItemKind.IMAGE, "pixel_values", "image_grid_thw"),
        (ItemKind.VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        own = [p for item, p in zip(plan.items, patches, strict=True) if item.kind is kind]
        if own:
            inputs[pixels] = torch.cat([p.pixel_values for p in own])
            inputs[grids] = torch.tensor([p.grid_thw for p in own])
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def reference_logits(monolith: Any, plan: PromptPlan, patches: Sequence[Patches]) -> torch.Tensor:
    """The monolith's logits [T, vocab] for the whole prompt, in one forward."""
    monolith.model.rope_deltas = None
    with torch.inference_mode():
        logits: torch.Tensor = monolith(**monolith_inputs(monolith, plan, patches)).logits[0]
    return logits


def reference_generate(
    monolith: Any,
    plan: PromptPlan,
    patches: Sequence[Patches],
    *,
    max_tokens: int,
    eos_ids: Collection[int] = (),
) -> tuple[int, ...]:
    """The monolith's greedy tokens, at most ``max_tokens``, the end token included; none of ``eos_ids`` stops it if
    empty."""
    monolith.model.rope_deltas = None
    ends = sorted(eos_ids)
    settings = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    # generate() fills what the given settings leave open from the model's own, the end token among it.
    own, monolith.generation_config = monolith.generation_config, settings
    try:
        with torch.inference_mode():
            out = monolith.generate(**monolith_inputs(monolith, plan, patches), generation_config=settings)
    finally:
        monolith.generation_config = own
    return tuple(out[0, plan.tokens :].tolist())
