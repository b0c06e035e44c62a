"""What the config of a model does not say about its attention and positions, its modules do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_device_runner import GROUPED, on_device
from test_engine_monolith import NEW, truth_and_inputs
from tiny_engine import ask, make_engine, make_plan, make_rows, monolith_and_half, plain_loop, tiny_model
from transformers import (
    AutoConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from aiodisagg.engine.batch import EngineSequence, Runner, Work
from aiodisagg.engine.decoder import unsupported
from aiodisagg.engine.rows import RequestRows
from aiodisagg.engine.schedule import Segment
from aiodisagg.engine.stream import RequestHandle
from aiodisagg.engine.types import SamplingParams
from aiodisagg.errors import EngineError
from aiodisagg.models.base import PromptPlan
from aiodisagg.models.synthetic import build_tiny

pytestmark = pytest.mark.anyio

PICTURE = [3, (1, 8, 12), 4]


@pytest.fixture(params=["moe", "dense"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """transformers' model and its language half, whose config has no ``mrope_section``: a default counts."""
    moe = request.param == "moe"
    path = build_tiny(tmp_path, moe=moe, levels=2) / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    rope = written["text_config"]["rope_parameters"]
    del rope["mrope_section"], rope["mrope_interleaved"]
    path.write_text(json.dumps(written), encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path)
    assert "mrope_section" not in config.text_config.rope_parameters
    return monolith_and_half(config, moe=moe)


@pytest.mark.parametrize("fused", [False, True])
async def test_answers_about_a_picture_without_sections_in_the_config(models: tuple[Any, Any], fused: bool) -> None:
    mono, half = models
    truth, plan, rows = truth_and_inputs(mono, PICTURE, seed=1)
    async with on_device(half, GROUPED) if fused else make_engine(half) as engine:
        assert (await ask(engine, plan, rows, max_tokens=NEW)).tokens == truth


@torch.inference_mode()
def logits_of(runner: Runner, plan: PromptPlan, rows: list[torch.Tensor]) -> torch.Tensor:
    """[vocab] behind the prompt."""
    held = RequestRows(
        "r", plan, hidden_size=runner.hidden_size, width=None, dtype=runner.dtype, device=runner.device
    )  # fmt: skip
    for i, item in enumerate(rows):
        held.write(i, 0, item)
    sequence = EngineSequence(RequestHandle("r", lambda _: None), plan, SamplingParams(), held, lambda _: "")
    logits, _ = runner.forward([Work(Segment("r", 0, plan.tokens, True), sequence, range(8))])
    return logits[0].clone()


@pytest.mark.parametrize("fused", [False, True])
async def test_logits_are_those_of_three_rows(models: tuple[Any, Any], fused: bool) -> None:
    mono, half = models
    _, plan, rows = truth_and_inputs(mono, PICTURE, seed=1)
    h, visual = half.config.hidden_size, torch.zeros(1, plan.tokens, dtype=torch.bool)
    visual[0, slice(*plan.items[0].spans[0])] = True
    language, where = mono.model.language_model, torch.from_numpy(plan.positions)
    with torch.inference_mode():
        embeds = language.embed_tokens(torch.from_numpy(plan.input_ids))[None]
        embeds[visual] = rows[0][:, :h]
        levels = [rows[0][:, i * h : (i + 1) * h].contiguous() for i in (1, 2)]
        wanted, flat = (
            mono.lm_head(
                language(
                    inputs_embeds=embeds.clone(), position_ids=three[:, None], visual_pos_masks=visual,
                    deepstack_visual_embeds=levels,
                ).last_hidden_state[0, -1]
            )
            for three in (where, where[:1].expand(3, -1))
        )  # fmt: skip
    engine = on_device(half, GROUPED) if fused else make_engine(half)
    found = logits_of(engine._runner, plan, rows)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (wanted - flat).abs().max() > 0.01, "the rows of positions have no effect"
    engine._runner.release()


@pytest.mark.parametrize("fused", [False, True])
async def test_sections_in_the_config_of_a_text_model_make_no_three_rows(fused: bool) -> None:
    model = copy.deepcopy(tiny_model("text"))
    plan = make_plan([9])
    expected = plain_loop(model, plan, [], NEW)
    model.config.rope_parameters["mrope_section"] = [4, 2, 2]
    async with on_device(model, GROUPED) if fused else make_engine(model) as engine:
        assert (await ask(engine, plan, max_tokens=NEW)).tokens == expected


SCALED: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rope", SCALED)
@pytest.mark.parametrize("kind", ["moe", "text"])
async def test_frequencies_that_a_config_scales(kind: str, rope: str, fused: bool) -> None:
    """On a GPU such a model was left to transformers' forward, without graphs."""
    plan = make_plan([30] if kind == "text" else [9, (1, 5, 6), 9])
    rows, usual = make_rows(plan, 2), tiny_model(kind)
    config = copy.deepcopy(usual.config)
    config.rope_parameters |= {"rope_type": rope, **SCALED[rope]}
    model = type(usual)(config).eval()
    model.load_state_dict(usual.state_dict())
    expected = plain_loop(model, plan, rows, NEW)
    async with on_device(model, GROUPED) if fused else make_engine(model) as engine:
        assert (await ask(engine, plan, rows, max_tokens=NEW)).tokens == expected
    assert expected != plain_loop(usual, plan, rows, NEW), "the scaling has no effect"


WINDOW = {"use_sliding_window": True, "sliding_window": 4}
SHAPE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "moe"])
async def test_a_sliding_window_is_not_ignored(kind: str) -> None:
    """Folders with one are refused; a model may come from elsewhere."""
    if kind == "dense":
        model: Any = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **WINDOW, max_window_layers=1)).eval()
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **WINDOW, **experts)).eval()
    assert unsupported(model) == "some of its layers have a sliding window"
    async with make_engine(model) as engine:
        with pytest.raises(EngineError, match=r"layer \d has a sliding window"):
            await ask(engine, make_plan([9]), max_tokens=2)
