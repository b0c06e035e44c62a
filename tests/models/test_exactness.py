"""The two halves say what transformers' monolith says, and a comparison that would miss a mistake is found out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.halves import PROMPTS, Asked, Halves, chat, halves

Tiny = Callable[..., Path]
MODELS = [(True, 0), (True, 1), (True, 2), (True, 3), (False, 0), (False, 3)]
LEVELS = pytest.mark.parametrize(("moe", "levels"), MODELS, ids=[f"{'moe' if m else 'dense'}-{k}" for m, k in MODELS])


@LEVELS
@pytest.mark.parametrize("prompt", PROMPTS)
def test_unchunked_logits_are_the_monoliths_bit_for_bit(tiny: Tiny, moe: bool, levels: int, prompt: str) -> None:
    both = halves(tiny(moe=moe, levels=levels))
    asked = both.ask(PROMPTS[prompt])
    assert torch.equal(both.logits(asked), both.truth(asked))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("moe", [True, False], ids=["moe", "dense"])
def test_chunked_prefill_and_decode_give_the_monoliths_tokens(tiny: Tiny, moe: bool, prompt: str) -> None:
    both = halves(tiny(moe=moe, levels=3))
    asked = both.ask(PROMPTS[prompt])
    truth = both.true_tokens(asked, 12)
    length = asked.plan.tokens
    inside = [start + 1 for item in asked.plan.items for start, _ in item.spans]  # cut in the middle of pictures
    whole, logits = both.generate(asked, 12)
    assert whole == truth
    for cuts in ((length // 2,), tuple(range(8, length, 8)), tuple(inside), (length - 1,)):
        tokens, chunked = both.generate(asked, 12, cuts)
        assert tokens == truth
        torch.testing.assert_close(chunked, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["stored f32", "stored bf16"])
@pytest.mark.parametrize("language", [torch.float32, torch.bfloat16], ids=["text f32", "text bf16"])
def test_a_bfloat16_tower_equals_the_monolith_with_the_same_dtypes(
    tiny: Tiny, language: torch.dtype, stored: torch.dtype
) -> None:
    both = halves(tiny(moe=True, levels=3, dtype=stored), torch.bfloat16, language)
    for messages in PROMPTS.values():
        asked = both.ask(messages)
        assert torch.equal(both.logits(asked), both.truth(asked))


def test_experts_are_not_run_one_by_one(tiny: Tiny) -> None:
    """transformers falls back to eager experts, without a word, for classes it cannot look into."""
    both = halves(tiny(moe=True, levels=3))
    chosen = both.monolith.config.text_config._experts_implementation
    assert chosen == "grouped_mm"
    assert both.language.config._experts_implementation == chosen
    for name in ("eager", "grouped_mm"):
        both.language.causal.set_experts_implementation(name)
        assert both.language.config._experts_implementation == name


def test_items_in_a_batch_get_the_rows_they_get_alone(tiny: Tiny) -> None:
    both = halves(tiny(moe=True, levels=3))
    patches = [p for messages in PROMPTS.values() for p in both.ask(messages).patches]
    assert len(patches) >= 8
    together = both.encoder.encode(patches)
    for one, rows in zip(patches, together, strict=True):
        assert torch.equal(both.encoder.encode([one])[0], rows)
    assert both.encoder.encode([]) == []


def test_text_generation_works_without_anything_of_ours(tiny: Tiny) -> None:
    """The language half is an ordinary transformers model for prompts without pictures."""
    both = halves(tiny(moe=True, levels=3))
    asked = both.ask(chat("How many birds are there?"))
    ids = torch.from_numpy(asked.plan.input_ids)[None]
    out = both.language.causal.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out[0, asked.plan.tokens :].tolist() == both.true_tokens(asked, 8)


# -- the comparison can fail ------------------------------------------------------------------------------------


def _shift_rows(asked: Asked) -> Asked:
    shifted = asked.deepstack.clone()
    for item in asked.plan.items:
        for start, stop in item.spans:
            shifted[0, start:stop] = asked.deepstack[0, start:stop].roll(1, dims=0)
    return dataclasses.replace(asked, deepstack=shifted)


def _without_level(asked: Asked, h: int) -> Asked:
    lost = asked.deepstack.clone()
    lost[..., :h] = 0
    return dataclasses.replace(asked, deepstack=lost)


def _with_positions(asked: Asked, positions: torch.Tensor) -> Asked:
    return dataclasses.replace(asked, positions=positions)


MUTATIONS: dict[str, Callable[[Asked, int], Asked]] = {
    "no DeepStack": lambda a, h: dataclasses.replace(a, deepstack=torch.zeros_like(a.deepstack)),
    "level 0 missing": _without_level,
    "levels rotated": lambda a, h: dataclasses.replace(a, deepstack=a.deepstack.roll(h, dims=-1)),
    "rows shifted by one": lambda a, h: _shift_rows(a),
    "1-D positions": lambda a, h: _with_positions(a, torch.arange(a.plan.tokens).expand(3, 1, -1)),
    "height and width swapped": lambda a, h: _with_positions(a, a.positions[[0, 2, 1]]),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("moe", [True, False], ids=["moe", "dense"])
def test_a_mistake_shows_in_the_logits(tiny: Tiny, moe: bool, mutation: str) -> None:
    both = halves(tiny(moe=moe, levels=3))
    asked = both.ask(PROMPTS["one image"])
    truth = both.truth(asked)
    wrong = both.logits(MUTATIONS[mutation](asked, both.language.layout.hidden_size))
    assert torch.equal(both.logits(asked), truth)
    assert (wrong - truth).abs().max() > 0.1


class _Before(torch.nn.Module):
    """A decoder layer that gets its DeepStack level on the way in: the mistake to be found out."""

    def __init__(self, layer: torch.nn.Module, level: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.level = layer, level

    def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
        return self.layer(x + self.level, **kwargs)


def test_levels_added_before_the_layer_show_in_the_logits(tiny: Tiny) -> None:
    both = halves(tiny(moe=True, levels=3))
    asked = both.ask(PROMPTS["one image"])
    truth, h = both.truth(asked), both.language.layout.hidden_size
    layers = both.language.model.layers
    kept = list(layers)
    try:
        for i in range(3):
            layers[i] = _Before(kept[i], asked.deepstack[..., i * h : (i + 1) * h])
        wrong = both.logits(dataclasses.replace(asked, deepstack=asked.deepstack[..., :0]))
    finally:
        for i in range(3):
            layers[i] = kept[i]
    assert (wrong - truth).abs().max() > 0.1
    assert torch.equal(both.logits(asked), truth)


def test_a_delta_off_by_one_shows_in_the_answer(tiny: Tiny) -> None:
    both: Halves = halves(tiny(moe=True, levels=3))
    asked = both.ask(PROMPTS["image and video"])
    off = dataclasses.replace(asked, plan=dataclasses.replace(asked.plan, delta=asked.plan.delta + 1))
    tokens, logits = both.generate(asked, 12)
    wrong_tokens, wrong = both.generate(off, 12)
    assert tokens == both.true_tokens(asked, 12)
    assert torch.equal(wrong[0], logits[0])  # the prompt is right; what follows is not
    assert (wrong[1] - logits[1]).abs().max() > 0.05
    assert wrong_tokens != tokens


def test_rows_of_another_width_are_refused(tiny: Tiny) -> None:
    both = halves(tiny(moe=True, levels=3))
    asked = both.ask(PROMPTS["one image"])
    for bad in (asked.deepstack[..., :-1], asked.deepstack[:, :-1], torch.cat([asked.deepstack] * 2, dim=-1)):
        with pytest.raises(ValueError, match="input_deepstack_embeds"):
            both.logits(dataclasses.replace(asked, deepstack=bad))
