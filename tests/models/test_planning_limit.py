"""A prompt that cannot fit is refused by its number of tokens, before anything of its length is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiodisagg.errors import PromptTooLong
from aiodisagg.models.base import ChatMessage, ImagePart
from aiodisagg.models.plan import Qwen3VLPlanner
from tests.models.halves import PROMPTS, chat, png, video

Tiny = Callable[..., Path]


def nothing_long_is_made(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    repeat = np.repeat

    def short(values: Any, repeats: Any, *more: Any) -> Any:
        assert np.sum(repeats) <= limit
        return repeat(values, repeats, *more)

    def positions(tokens: int, *_: Any) -> Any:
        raise AssertionError(f"positions of {tokens} tokens")

    monkeypatch.setattr(np, "repeat", short)
    monkeypatch.setattr("aiodisagg.models.plan.mrope_positions", positions)
    monkeypatch.setattr("aiodisagg.models.plan.item_digest", positions)


@pytest.mark.parametrize(
    "messages",
    [
        chat(*[ImagePart(png(400, 400))] * 50, "Which?"),
        chat(*[video(8, 400, 400)] * 20, "What happens?"),
        chat("The harbour wakes before the town does. " * 100),
    ],
    ids=["images", "videos", "text"],
)
def test_nothing_is_made_of_a_prompt_beyond_the_limit(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, messages: Sequence[ChatMessage]
) -> None:
    """A thousand small files with large sizes in them became half a gigabyte, and then the prompt was too long."""
    planner = Qwen3VLPlanner(tiny(moe=True, levels=3))
    tokens = planner.plan(messages).tokens
    nothing_long_is_made(monkeypatch, 500)
    with pytest.raises(PromptTooLong) as caught:
        planner.plan(messages, limit=500)
    assert (caught.value.tokens, caught.value.limit) == (tokens, 500)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_of_just_the_limit_is_planned_as_without_one(tiny: Tiny, prompt: str) -> None:
    planner = Qwen3VLPlanner(tiny(moe=True, levels=3))
    plan = planner.plan(PROMPTS[prompt])
    same = planner.plan(PROMPTS[prompt], limit=plan.tokens)
    assert np.array_equal(same.input_ids, plan.input_ids) and same.items == plan.items
    with pytest.raises(PromptTooLong):
        planner.plan(PROMPTS[prompt], limit=plan.tokens - 1)
