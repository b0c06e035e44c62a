"""Model folders, built once a session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models.conftest import tiny

__all__ = ["text_only", "tiny"]


@pytest.fixture
def text_only(tmp_path: Path) -> Path:
    """A folder that says it is a text model; who reads on in it has come too far."""
    folder = tmp_path / "text-only"
    folder.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 640, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
