"""A model folder that lacks a file, or says two things at once: the error names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aiodisagg.errors import CheckpointError, ConfigError
from aiodisagg.models.checkpoint import read_info
from aiodisagg.models.loading import check_device
from aiodisagg.models.plan import Qwen3VLPlanner


@pytest.fixture
def copied(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder to break."""
    return Path(shutil.copytree(tiny(moe=True, levels=3), tmp_path / "broken"))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_the_file_that_is_missing_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match="no such file") as caught:
        Qwen3VLPlanner(copied)
    assert caught.value.name == name


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_vl", "bert", None])
def test_an_architecture_with_another_model_type(copied: Path, kind: str | None) -> None:
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    (copied / "config.json").write_text(json.dumps(config | {"model_type": kind}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="'qwen3_vl_moe'") as caught:
        read_info(copied)
    assert caught.value.name == "config.json: model_type"


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_comes_with_what_to_do(device: str) -> None:
    with pytest.raises(ConfigError, match=r"'cpu'.*torch for") as caught:
        check_device(device)
    assert caught.value.key == "device"
