"""A checkpoint folder, read piece by piece: its config, and only those tensors that somebody asks for.

Everything wrong with a folder becomes a :class:`~aiodisagg.errors.CheckpointError` that names the file, the config key
or the tensor. Tensors are memory-mapped: one that needs no cast costs no private memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from aiodisagg.errors import CheckpointError
from aiodisagg.models.folder import fail, read_json

VISION_PREFIX = "model.visual."
TEXT_PREFIX = "model.language_model."
HEAD = "lm_head.weight"

VISION_LANGUAGE = {
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
}
"""With the ``model_type`` of each."""
TEXT_ONLY = {"Qwen3MoeForCausalLM": "qwen3_moe", "Qwen3ForCausalLM": "qwen3"}

_NEEDED = ("text_config", "vision_config", "image_token_id", "video_token_id")
_NEEDED_TEXT = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_NEEDED_VISION = ("depth", "hidden_size", "out_hidden_size", "deepstack_visual_indexes")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a folder says about its model, before any weight is read."""

    folder: Path
    architecture: str
    config: Any
    """transformers' config object."""

    @property
    def is_vision_language(self) -> bool:
        return self.architecture in VISION_LANGUAGE

    @property
    def is_moe(self) -> bool:
        return "Moe" in self.architecture

    @property
    def hidden_size(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    @property
    def deepstack_levels(self) -> int:
        return len(self.config.vision_config.deepstack_visual_indexes) if self.is_vision_language else 0

    def check_tower(self) -> None:
        """Raises CheckpointError unless the model has a vision tower."""
        if not self.is_vision_language:
            fail(self.folder, "config.json: architectures", f"{self.architecture} has no vision tower")


def read_info(folder: str | Path) -> ModelInfo:
    """Reads and checks ``config.json``. Raises CheckpointError."""
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(str(folder), "folder", "no such folder")
    raw = read_json(path, "config.json")
    names = raw.get("architectures") or [None]
    types = VISION_LANGUAGE | TEXT_ONLY
    if names[0] not in types:
        fail(path, "config.json: architectures", f"{names[0]} is not one of {', '.join(types)}")
    if (kind := raw.get("model_type")) != types[names[0]]:
        fail(path, "config.json: model_type", f"{kind!r} is not {types[names[0]]!r}, which {names[0]} has")
    if "quantization_config" in raw:
        fail(path, "config.json: quantization_config", "quantized weights are not supported")
    if names[0] in VISION_LANGUAGE:
        for part, keys in (("", _NEEDED), ("text_config", _NEEDED_TEXT), ("vision_config", _NEEDED_VISION)):
            section = raw[part] if part else raw
            for key in keys:
                if not isinstance(section, dict) or key not in section:
                    fail(path, f"config.json: {part + '.' if part else ''}{key}", "missing")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises what its many validators raise
        raise CheckpointError(str(path), "config.json", f"cannot be used: {error}") from error
    info = ModelInfo(path, str(names[0]), config)
    _check_text(info, raw)
    if info.is_vision_language:
        _check_vision(info)
    return info


def _check_text(info: ModelInfo, raw: dict[str, Any]) -> None:
    """What the engine would compute in another way than transformers, without a word."""
    part, written = ("text_config.", raw["text_config"]) if info.is_vision_language else ("", raw)
    text = info.config.get_text_config()
    others = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention"})
    if others and written.get("layer_types"):
        fail(info.folder, f"config.json: {part}layer_types", f"{', '.join(others)}: only full_attention is supported")
    # Without layer types Qwen3-MoE has the window in all layers; Qwen3-VL has none, whatever its config says.
    if others or (info.architecture == "Qwen3MoeForCausalLM" and text.sliding_window is not None):
        size = f"with a sliding_window of {text.sliding_window}: only full attention is supported"
        fail(info.folder, f"config.json: {part}use_sliding_window", f"{text.use_sliding_window} {size}")
    kind = str((getattr(text, "rope_parameters", None) or {}).get("rope_type"))
    if "dynamic" in kind or kind == "longrope":
        key = "rope_scaling" if written.get("rope_scaling") else "rope_parameters"
        key += ".type" if "rope_type" not in (written.get(key) or ()) else ".rope_type"
        why = "is not supported: what a request gets would depend on the longest one of its batch"
        fail(info.folder, f"config.json: {part}{key}", f"{kind!r} {why}")


def _check_vision(info: ModelInfo) -> None:
    vision = info.config.vision_config
    if vision.out_hidden_size != info.hidden_size:
        fail(info.folder, "config.json: vision_config.out_hidden_size", f"is not the text model's {info.hidden_size}")
    levels, depth = list(vision.deepstack_visual_indexes), int(vision.depth)
    if any(a >= b for a, b in itertools.pairwise([-1, *levels, depth])):  # levels come in the order of the blocks
        why = f"{levels} do not ascend, each once, within the tower's {depth} blocks"
        fail(info.folder, "config.json: vision_config.deepstack_visual_indexes", why)
    layers = int(info.config.get_text_config().num_hidden_layers)
    if len(levels) > layers:
        why = f"are {len(levels)} levels, one for each of the first layers, of which the text model has {layers}"
        fail(info.folder, "config.json: vision_config.deepstack_visual_indexes", why)


class Weights:
    """The tensors of a folder, by name: ``model.safetensors``, or shards with their index. A context manager.

    Opening reads file headers only. Not thread-safe.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        single, index = folder / "model.safetensors", "model.safetensors.index.json"
        if single.exists():  # first, as for transformers, which leaves an old index beside what it saves
            self._where: Mapping[str, str] = dict.fromkeys(self._file(single.name).keys(), single.name)
        elif (folder / index).exists():
            shards = read_json(folder, index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
                fail(folder, f"{index}: weight_map", "missing or not a map")
            self._where = shards
        else:
            fail(folder, "model.safetensors", "no such file, and no index of shards")

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def names(self, prefix: str) -> Iterator[str]:
        return (name for name in self._where if name.startswith(prefix))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor. Raises CheckpointError if it is missing."""
        return tuple(self._ask(name, lambda file: file.get_slice(name).get_shape()))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, mapped from the file. Raises CheckpointError if it is missing."""
        found: torch.Tensor = self._ask(name, lambda file: file.get_tensor(name))
        return found

    def _ask(self, name: str, question: Any) -> Any:
        if name not in self._where:
            fail(self.folder, name, "tensor is missing")
        shard = self._where[name]
        try:
            return question(self._file(shard))
        except SafetensorError as error:
            raise CheckpointError(str(self.folder), name, f"tensor is not in {shard}: {error}") from error

    def _file(self, shard: str) -> Any:
        if shard not in self._files:
            if Path(shard).name != shard:
                fail(self.folder, shard, "shards lie in the folder itself")
            try:
                self._files[shard] = safe_open(self.folder / shard, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(str(self.folder), shard, "no such file") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(str(self.folder), shard, f"cannot be read: {error}") from error
        return self._files[shard]
