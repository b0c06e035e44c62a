"""Folders that load, and then would be computed in another way than transformers does, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from aiodisagg.errors import CheckpointError
from aiodisagg.language.loading import load_language_half
from aiodisagg.models.loading import fingerprint, load_language, load_vision
from aiodisagg.models.plan import Qwen3VLPlanner
from aiodisagg.models.synthetic import build_tokenizer
from aiodisagg.peer.config import LanguageConfig
from tests.models.halves import chat

Tiny = Callable[..., Path]
BOTH_SIDES = (load_vision, load_language, Qwen3VLPlanner, fingerprint)

SHAPE = {
    "vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 633,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@pytest.fixture
def copied(tiny: Tiny, tmp_path: Path) -> Path:
    """A vision-language folder to break."""
    return Path(shutil.copytree(tiny(moe=True, levels=3), tmp_path / "broken"))


@pytest.fixture(scope="module")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp(kind) for kind in ("dense", "moe")}
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(made["dense"])
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS)).save_pretrained(made["moe"])
    for folder in made.values():
        build_tokenizer(640).save_pretrained(folder)
    return made


def edit(folder: Path, part: str | None = None, **changes: Any) -> Path:
    """Changes ``config.json``, or a part of it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (config if part is None else config[part]).update(changes)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# -- attention and positions that the engine does not have ------------------------------------------------------

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
    ("kind", "changes", "key", "said"),
    [
        ("dense", {**WINDOW, "max_window_layers": 1, "layer_types": None}, "use_sliding_window", "sliding_window of 8"),
        ("dense", {**WINDOW, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types", "sliding_attent"),
        ("moe", WINDOW, "use_sliding_window", "sliding_window of 8"),
        ("dense", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type", "'dynamic'"),
        ("moe", {"rope_parameters": LONG}, "rope_parameters.rope_type", "'longrope'"),
    ],
)
def test_a_text_model_that_the_engine_would_compute_otherwise(
    text_models: dict[str, Path], tmp_path: Path, kind: str, changes: dict[str, Any], key: str, said: str
) -> None:
    folder = edit(Path(shutil.copytree(text_models[kind], tmp_path / "text")), **changes)
    for load in (load_language, Qwen3VLPlanner, fingerprint):
        with pytest.raises(CheckpointError, match=said) as caught:
            load(folder)
        assert caught.value.name == f"config.json: {key}"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "mrope_section": [4, 2, 2]}}, "rope_scaling.type"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
    ],
)
def test_the_same_of_a_vision_language_model(copied: Path, changes: dict[str, Any], key: str) -> None:
    edit(copied, "text_config", **changes)
    for load in BOTH_SIDES:
        with pytest.raises(CheckpointError) as caught:
            load(copied)
        assert caught.value.name == f"config.json: text_config.{key}"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dense", {**WINDOW, "max_window_layers": 2, "layer_types": None}),
        ("dense", {"use_sliding_window": False, "sliding_window": 8}),
        ("moe", {"use_sliding_window": False, "sliding_window": 8}),
        ("dense", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16384}}),
    ],
)
def test_windows_of_no_layer_and_fixed_frequencies_are_served(
    text_models: dict[str, Path], tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    load_language(edit(Path(shutil.copytree(text_models[kind], tmp_path / "text")), **changes))


def test_a_window_that_transformers_ignores_is_no_reason(copied: Path) -> None:
    load_language(edit(copied, "text_config", **WINDOW))


# -- token ids without an embedding -----------------------------------------------------------------------------


def add_token(folder: Path) -> None:
    """As a fine-tune does, which then forgets to resize the embedding table."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens(["<call>"]) == 1
    tokenizer.save_pretrained(folder)


def test_a_token_beyond_the_embedding_table(copied: Path, text_models: dict[str, Path], tmp_path: Path) -> None:
    for folder in (copied, Path(shutil.copytree(text_models["dense"], tmp_path / "text"))):
        add_token(folder)
        with pytest.raises(CheckpointError, match=r"largest id 640 \('<call>'\).*vocab_size 640") as caught:
            Qwen3VLPlanner(folder)
        assert caught.value.name == "tokenizer"


def test_it_is_found_before_weights_are_read(copied: Path) -> None:
    add_token(copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="largest id 640") as caught:
        load_language_half(LanguageConfig(model=copied))
    assert caught.value.name == "tokenizer"


@pytest.mark.parametrize("key", ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"])
@pytest.mark.parametrize("token_id", [640, -1])
def test_a_placeholder_beyond_the_embedding_table(copied: Path, key: str, token_id: int) -> None:
    add_token(copied)
    edit(copied, **{key: token_id})
    with pytest.raises(CheckpointError, match=rf"{token_id} is not .*text_config\.vocab_size 640") as caught:
        Qwen3VLPlanner(copied)
    assert caught.value.name == f"config.json: {key}"


def test_a_table_with_more_rows_than_tokens_is_served(copied: Path) -> None:
    add_token(copied)
    edit(copied, "text_config", vocab_size=704)
    tensors = load_file(copied / "model.safetensors")
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(64, 64)])
    save_file(tensors, copied / "model.safetensors")
    plan = Qwen3VLPlanner(copied).plan(chat("Do <call> it."))
    assert plan.input_ids.max() == 640
    assert load_language(copied).embed(torch.from_numpy(plan.input_ids)).shape == (plan.tokens, 64)


# -- DeepStack levels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexes", [[2, 0, 1], [0, 0, 1], [-1, 0, 1], [0, 1, 4]])
def test_levels_that_are_not_in_the_order_of_the_blocks(copied: Path, indexes: list[int]) -> None:
    """Both towers would bring something, and not the same; of a block that is not there, transformers' fewer levels."""
    edit(copied, "vision_config", deepstack_visual_indexes=indexes)
    for load in BOTH_SIDES:
        with pytest.raises(CheckpointError, match=r"within the tower's 4 blocks") as caught:
            load(copied)
        assert caught.value.name == "config.json: vision_config.deepstack_visual_indexes"
        assert str(indexes) in str(caught.value)


def test_more_levels_than_layers(copied: Path) -> None:
    edit(copied, "text_config", num_hidden_layers=2)
    for load in BOTH_SIDES:
        with pytest.raises(CheckpointError, match=r"are 3 levels, .* the text model has 2"):
            load(copied)


@pytest.mark.parametrize("indexes", [[0, 1, 2], [0, 2, 3]])
def test_levels_with_gaps_are_served(copied: Path, indexes: list[int]) -> None:
    edit(copied, "vision_config", deepstack_visual_indexes=indexes)
    for load in BOTH_SIDES:
        load(copied)
