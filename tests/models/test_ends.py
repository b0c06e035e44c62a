"""Which tokens end an answer, as a folder says it in several places."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GenerationConfig

from aiodisagg.errors import CheckpointError
from aiodisagg.models.plan import Qwen3VLPlanner

Tiny = Callable[..., Path]


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny(moe=False, levels=2), tmp_path / "folder"))


@pytest.mark.parametrize(("whole", "text"), [(7, 9), (7, None), (None, 9), ([7, 8], 9), (None, [9, 10])])
def test_without_generation_settings_the_config_is_read_as_transformers_reads_it(
    folder: Path, whole: Any, text: Any
) -> None:
    """Of a config with an end of its own beside its text part's, the other one was taken: answers went on."""
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["eos_token_id"], config["text_config"]["eos_token_id"] = whole, text
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    theirs = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).eos_token_id
    assert Qwen3VLPlanner(folder).eos_ids == frozenset(theirs if isinstance(theirs, list) else [theirs])


@pytest.mark.parametrize("said", ["<|im_end|>", [5, None], [[5]], True, {"id": 5}])
def test_what_is_no_token_id_is_named(folder: Path, said: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": said}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="neither a token id nor a list") as caught:
        Qwen3VLPlanner(folder)
    assert caught.value.name == "generation_config.json: eos_token_id"


@pytest.mark.parametrize(("said", "ends"), [(5, {5}), ([5, 6], {5, 6}), (None, {633}), ([], {633})])
def test_one_end_or_several_or_none(folder: Path, said: Any, ends: set[int]) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": said}), encoding="utf-8")
    assert Qwen3VLPlanner(folder).eos_ids == ends
