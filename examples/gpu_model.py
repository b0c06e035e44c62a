"""Qwen3-VL-30B-A3B with random weights, made on the device it runs on: for measuring where no checkpoint can be had.

The host never holds a weight: classes are built without memory, get memory on the device, and are filled there. A
folder with everything but weights (config, tokenizer, preprocessor) is written for the planner. ``tiny`` is a model of
the same kind for trying the scripts on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLMoeConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

from aiodisagg.models.language import LanguageHalf
from aiodisagg.models.plan import Qwen3VLPlanner
from aiodisagg.models.preprocessing import load_settings
from aiodisagg.models.qwen3_text import Qwen3MoeForCausalLMWithDeepStack
from aiodisagg.models.synthetic import SPECIAL_TOKENS, Size, _config, _write_json, _write_processors, build_tokenizer
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from aiodisagg.protocol.rows import ModelFingerprint, RowLayout

TOKENIZER = 1024
TINY = Size(64, 4, 8, 2, 16, 160, 8, 2, 40, TOKENIZER, 64, 4, 4, 96, (1024, 65536))
A3B = Size(2048, 48, 32, 4, 128, 6144, 128, 8, 768, 151936, 1152, 27, 16, 4304, (65536, 16777216))


@dataclass(frozen=True, slots=True)
class Random:
    """A folder without weights, and what makes halves for it."""

    folder: Path
    config: Any
    dtype: torch.dtype

    @classmethod
    def write(cls, folder: Path, *, tiny: bool) -> Random:
        size, tokenizer = TINY if tiny else A3B, build_tokenizer(TOKENIZER)
        made = _config(size, 3, tokenizer, False).to_dict()
        if not tiny:
            made["text_config"]["max_position_embeddings"] = 262144
            made["text_config"]["rope_parameters"]["mrope_section"] = [24, 20, 20]
            made["vision_config"]["num_position_embeddings"] = 2304
            made["vision_config"]["deepstack_visual_indexes"] = [8, 16, 24]
        for part in ("text_config", "vision_config"):
            made[part]["initializer_range"] = 0.08 if tiny else 0.02
        config = Qwen3VLMoeConfig(**made)
        config.architectures = ["Qwen3VLMoeForConditionalGeneration"]
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write_processors(folder, size)
        ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
        assert max(map(tokenizer.convert_tokens_to_ids, SPECIAL_TOKENS)) < size.vocab
        _write_json(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": ends[1]})
        return cls(folder, config, torch.float32 if tiny else torch.bfloat16)

    @classmethod
    def read(cls, folder: Path) -> Random:
        config = Qwen3VLMoeConfig.from_pretrained(folder)
        return cls(folder, config, torch.float32 if config.text_config.hidden_size == TINY.hidden else torch.bfloat16)

    @property
    def fingerprint(self) -> ModelFingerprint:
        levels = len(self.config.vision_config.deepstack_visual_indexes)
        hidden, name = self.config.text_config.hidden_size, str(self.dtype).removeprefix("torch.")
        return ModelFingerprint(self.config.architectures[0], hidden, levels, name, "random")

    def words(self) -> torch.Tensor:
        """int64: ids of tokens that are whole letters: others are held back until their neighbours complete them."""
        tokenizer = build_tokenizer(TOKENIZER)
        ordinary = [token for token in range(TOKENIZER) if token not in tokenizer.all_special_ids]
        return torch.tensor([token for token in ordinary if tokenizer.decode([token]).strip().isascii()])

    def planner(self) -> Qwen3VLPlanner:
        return Qwen3VLPlanner(self.folder)

    def language(self, device: str) -> LanguageHalf:
        causal = _fill(Qwen3MoeForCausalLMWithDeepStack, self.config.text_config, self.dtype, device, seed=1)
        causal.model.rotary_emb = type(causal.model.rotary_emb)(self.config.text_config).to(device)
        return LanguageHalf(
            model=causal.model,
            lm_head=causal.lm_head,
            causal=causal,
            config=causal.config,
            layout=RowLayout.of(self.fingerprint),
            device=torch.device(device),
            dtype=self.dtype,
            eos_ids=frozenset(),
            max_positions=int(causal.config.max_position_embeddings),
        )

    def tower(self, device: str) -> Any:
        tower = _fill(Qwen3VLMoeVisionModel, self.config.vision_config, self.dtype, device, seed=2)
        tower.rotary_pos_emb = type(tower.rotary_pos_emb)(self.config.vision_config).to(device)
        return tower

    def encoder(self, device: str) -> Qwen3VLVisionEncoder:
        return Qwen3VLVisionEncoder.of(self.tower(device), self.fingerprint, load_settings(self.folder))


def _fill(family: Any, config: Any, dtype: torch.dtype, device: str, *, seed: int) -> Any:
    with torch.device("meta"):
        module = family._from_config(config, dtype=dtype)
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=config.initializer_range, generator=generator)
    return module.eval().requires_grad_(False)
