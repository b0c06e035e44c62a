"""Folders in which transformers has saved a model over another one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLMoeForConditionalGeneration

from aiodisagg.models.loading import fingerprint
from tests.models.halves import PROMPTS, Halves

Tiny = Callable[..., Path]


@pytest.mark.parametrize("shards_left", [False, True])
def test_one_file_beside_an_old_index_is_what_counts(tiny: Tiny, tmp_path: Path, shards_left: bool) -> None:
    """transformers removes old shards, and not their index, where it saves one file. The halves read the index: shards
    that were not there or, had somebody kept them, the weights of before."""
    folder = Path(shutil.copytree(tiny(moe=True, levels=2, shards=3), tmp_path / "saved"))
    before, kept = fingerprint(folder), {file: file.read_bytes() for file in folder.glob("model-*.safetensors")}
    Qwen3VLMoeForConditionalGeneration.from_pretrained(tiny(moe=True, levels=2, seed=1)).save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists() and not list(folder.glob("model-*.safetensors"))
    if shards_left:
        for file, data in kept.items():
            file.write_bytes(data)
    both = Halves(folder, torch.float32, torch.float32)
    asked = both.ask(PROMPTS["one image"])
    assert torch.equal(both.logits(asked), both.truth(asked))
    assert fingerprint(folder) != before
