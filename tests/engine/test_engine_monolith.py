"""Tokens equal transformers' own Qwen3-VL: its tower gives the rows, its ``generate`` the truth."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_engine import ask, make_engine, monolith_and_half
from transformers import AutoConfig

from aiodisagg.models.base import ItemKind, PlannedItem, PromptPlan
from aiodisagg.models.synthetic import build_tiny

pytestmark = pytest.mark.anyio

PROMPTS = {
    "text": [5],
    "one image": [3, (1, 4, 6), 4],
    "three images": [2, (1, 4, 4), 2, (1, 8, 4), 1, (1, 2, 10), 3],
    "video": [3, (3, 4, 4), 4],
    "image and video": [1, (1, 6, 4), 2, (2, 4, 6), 3],
}
NEW = 16


def prompt(config: Any, parts: list[Any], seed: int) -> tuple[list[int], list[int], list[Any]]:
    """Ids, token types (0 text, 1 image, 2 video) and the items' grids in patches with their spans."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    types: list[int] = []
    items = []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(0, 200, part).tolist()
            types += [0] * part
            continue
        t, h, w = part
        token = config.video_token_id if t > 1 else config.image_token_id
        spans = []
        for _ in range(t):
            ids.append(config.vision_start_token_id)
            spans.append((len(ids), len(ids) + h * w // 4))
            ids += [token] * (h * w // 4) + [config.vision_end_token_id]
            types += [0] + [2 if t > 1 else 1] * (h * w // 4) + [0]
        items.append((part, tuple(spans)))
    return ids, types, items


@torch.no_grad()
def truth_and_inputs(mono: Any, parts: list[Any], seed: int) -> tuple[list[int], PromptPlan, list[torch.Tensor]]:
    ids, types, items = prompt(mono.config, parts, seed)
    pixels = [torch.randn(t * h * w, 1536, generator=torch.Generator().manual_seed(seed)) for (t, h, w), _ in items]
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor([types])}
    for name, grids, video in (("pixel_values", "image_grid_thw", 0), ("pixel_values_videos", "video_grid_thw", 1)):
        chosen = [i for i, ((t, _, _), _) in enumerate(items) if (t > 1) == video]
        if chosen:
            inputs[name] = torch.cat([pixels[i] for i in chosen])
            inputs[grids] = torch.tensor([items[i][0] for i in chosen])
    out = mono.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    rope = {k: v for k, v in inputs.items() if k.endswith("thw")}
    where, delta = mono.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **rope)
    rows = []
    planned = []
    for i, (grid, spans) in enumerate(items):
        seen = mono.model.visual(pixels[i], grid_thw=torch.tensor([grid]), return_dict=True)
        rows.append(torch.cat([seen.pooler_output, *seen.deepstack_features], dim=1))
        kind = ItemKind.VIDEO if grid[0] > 1 else ItemKind.IMAGE
        planned.append(PlannedItem(f"{i:032x}", kind, grid, len(rows[-1]), spans, (b"",)))
    plan = PromptPlan(np.array(ids), where[:, 0].numpy(), int(delta), tuple(planned))
    return out[0, len(ids) :].tolist(), plan, rows


@pytest.mark.parametrize(("moe", "levels"), [(True, 3), (True, 1), (False, 2), (False, 0)])
async def test_every_kind_of_prompt_in_one_batch(tmp_path: Path, moe: bool, levels: int) -> None:
    config = AutoConfig.from_pretrained(build_tiny(tmp_path, moe=moe, levels=levels))
    mono, half = monolith_and_half(config, moe=moe)
    cases = [truth_and_inputs(mono, parts, seed) for seed, parts in enumerate(PROMPTS.values())]
    async with make_engine(half, token_budget=24, num_pages=10) as engine:
        answers = await asyncio.gather(*(ask(engine, plan, rows, max_tokens=NEW) for _, plan, rows in cases))
    assert {k: a.tokens for k, a in zip(PROMPTS, answers, strict=True)} == {
        k: truth for k, (truth, _, _) in zip(PROMPTS, cases, strict=True)
    }
