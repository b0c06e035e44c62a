"""A prompt through both halves, and pictures to ask about: what the tests of this folder share."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache

from aiodisagg.models.base import ChatMessage, ImagePart, Patches, PromptPlan, TextPart, VideoPart
from aiodisagg.models.language import LanguageHalf
from aiodisagg.models.loading import load_language, load_monolith
from aiodisagg.models.plan import Qwen3VLPlanner
from aiodisagg.models.qwen3_text import separate_deepstack
from aiodisagg.models.reference import reference_generate, reference_logits
from aiodisagg.models.vision import Qwen3VLVisionEncoder


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@functools.cache
def png(width: int, height: int, seed: int = 0) -> bytes:
    return encoded(noise(width, height, seed))


def chat(*parts: Any, role: str = "user") -> list[ChatMessage]:
    return [ChatMessage(role, tuple(TextPart(p) if isinstance(p, str) else p for p in parts))]


def video(frames: int, width: int = 96, height: int = 64, fps: float = 2.0) -> VideoPart:
    return VideoPart(tuple(png(width, height, 100 + i) for i in range(frames)), fps)


PROMPTS = {
    "text": chat("The harbour wakes before the town does."),
    "one image": chat(ImagePart(png(100, 70)), "What do you see?"),
    "three images": chat(
        "First", ImagePart(png(64, 64, 1)), "second", ImagePart(png(200, 60, 2)), ImagePart(png(70, 150, 3)), "which?"
    ),
    "video": chat(video(7), "What happens?"),
    "image and video": [
        *chat("You are brief.", role="system"),
        *chat(ImagePart(png(90, 130, 4)), "and then", video(4, 130, 70, fps=3.0), "Compare."),
        *chat("I would rather not.", role="assistant"),
        *chat("Please.", ImagePart(png(64, 96, 5))),
    ],
}


@dataclass
class Asked:
    """One prompt, planned and encoded, and laid out as the language half takes it."""

    plan: PromptPlan
    patches: list[Patches]
    embeds: torch.Tensor
    """[1, T, h]"""
    deepstack: torch.Tensor
    """[1, T, k*h]"""
    positions: torch.Tensor
    """[3, 1, T]"""


class Halves:
    """Planner, encode half, language half and monolith of one folder."""

    def __init__(self, folder: Path, vision: torch.dtype, language: torch.dtype) -> None:
        self.planner = Qwen3VLPlanner(folder)
        self.encoder = Qwen3VLVisionEncoder(folder, dtype=vision)
        self.language: LanguageHalf = load_language(folder, dtype=language, row_dtype=vision)
        self.monolith = load_monolith(folder, vision_dtype=vision, language_dtype=language)

    @torch.inference_mode()
    def ask(self, messages: list[ChatMessage]) -> Asked:
        plan = self.planner.plan(messages)
        patches = [self.encoder.prepare(i.kind, i.media, i.grid_thw, i.fps) for i in plan.items]
        embeds = self.language.embed(torch.from_numpy(plan.input_ids))[None]
        h, k = self.language.layout.hidden_size, self.language.layout.deepstack_levels
        deepstack = embeds.new_zeros(1, plan.tokens, k * h)
        for item, rows in zip(plan.items, self.encoder.encode(patches), strict=True):
            assert rows.shape == (item.rows, (1 + k) * h)
            at = 0
            for start, stop in item.spans:
                first, levels = separate_deepstack(rows[at : at + stop - start], h)
                embeds[0, start:stop], deepstack[0, start:stop] = first, levels
                at += stop - start
        return Asked(plan, patches, embeds, deepstack, torch.from_numpy(plan.positions)[:, None])

    @torch.inference_mode()
    def logits(self, asked: Asked) -> torch.Tensor:
        """[T, vocab] of the prompt in one piece."""
        out = self.language.causal(
            inputs_embeds=asked.embeds, position_ids=asked.positions, input_deepstack_embeds=asked.deepstack
        )
        return out.logits[0]

    @torch.inference_mode()
    def generate(self, asked: Asked, tokens: int, cuts: tuple[int, ...] = ()) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, and the logits [1 + tokens, vocab] they were chosen by; the prompt is cut at ``cuts``."""
        cache = DynamicCache(config=self.language.config)
        ends = [*(c for c in cuts if 0 < c < asked.plan.tokens), asked.plan.tokens]
        for start, stop in zip([0, *ends], ends, strict=False):
            out = self.language.causal(
                inputs_embeds=asked.embeds[:, start:stop],
                position_ids=asked.positions[:, :, start:stop],
                input_deepstack_embeds=asked.deepstack[:, start:stop],
                past_key_values=cache,
                logits_to_keep=1,
            )
        said, seen = [], [out.logits[0, -1]]
        for j in range(tokens):
            said.append(int(seen[-1].argmax()))
            at = torch.full((3, 1, 1), asked.plan.tokens + j + asked.plan.delta)
            out = self.language.causal(torch.tensor([said[-1:]]), position_ids=at, past_key_values=cache)
            seen.append(out.logits[0, -1])
        return said, torch.stack(seen)

    def truth(self, asked: Asked) -> torch.Tensor:
        return reference_logits(self.monolith, asked.plan, asked.patches)

    def true_tokens(self, asked: Asked, tokens: int) -> list[int]:
        return list(reference_generate(self.monolith, asked.plan, asked.patches, max_tokens=tokens))


@functools.cache
def halves(folder: Path, vision: torch.dtype = torch.float32, language: torch.dtype = torch.float32) -> Halves:
    return Halves(folder, vision, language)


def truth(
    folder: Path, messages: Sequence[ChatMessage], tokens: int = 6, vision: torch.dtype = torch.float32
) -> tuple[int, ...]:
    """What the monolith answers, greedily."""
    return _truth(folder, tuple(messages), tokens, vision)


@functools.cache
def _truth(folder: Path, messages: tuple[ChatMessage, ...], tokens: int, vision: torch.dtype) -> tuple[int, ...]:
    both = halves(folder, vision)
    return tuple(both.true_tokens(both.ask(list(messages)), tokens))
