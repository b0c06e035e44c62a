"""Loading one half of a model, or the whole of it as the reference.

A half's class is built without memory (on the meta device), the half's tensors are picked by prefix and put in place;
nothing of the other half is read. A tensor that is missing, surplus or of another shape is an error that names it.

Experts come in two layouts, [E, H, 2I] with [E, I, H] on the hub, [E, 2I, H] with [E, H, I] as transformers saves
them. ``gate_up_proj`` alone does not tell when 2I == H, so ``down_proj`` decides for both, and only if I == H the other
way round.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import (
    AutoModelForCausalLM,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel
from transformers.utils import logging as transformers_logging

from aiodisagg.errors import CheckpointError, ConfigError
from aiodisagg.models.checkpoint import HEAD, TEXT_PREFIX, VISION_PREFIX, ModelInfo, Weights, read_info
from aiodisagg.models.folder import fail, read_json
from aiodisagg.models.language import LanguageHalf, PlainTextModel
from aiodisagg.models.preprocessing import load_settings
from aiodisagg.models.qwen3_text import Qwen3ForCausalLMWithDeepStack, Qwen3MoeForCausalLMWithDeepStack
from aiodisagg.protocol.rows import ModelFingerprint, RowLayout

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_VISION_KEYS = (
    "depth",
    "hidden_size",
    "hidden_act",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "out_hidden_size",
    "num_position_embeddings",
    "deepstack_visual_indexes",
)


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """torch's dtype for one of the names in ``DTYPES``; raises ValueError for others."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    return found


def check_device(device: str) -> None:
    """Raises ConfigError unless this torch, on this machine, can put a tensor on ``device``."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown, not there, not built in
        text = f"{device!r} cannot be used: {str(error).splitlines()[0]}"
        remedy = "'cpu' always can; another needs its driver (nvidia-smi shows it) and a torch for it (pytorch.org)"
        raise ConfigError("device", f"{text}; {remedy}") from error


def _name(dtype: str | torch.dtype) -> str:
    return str(as_dtype(dtype)).removeprefix("torch.")


def default_dtypes(device: str | torch.device) -> tuple[torch.dtype, torch.dtype]:
    """(vision, language): bfloat16 both, but float32 for the language half on a CPU, where it is the faster one."""
    return torch.bfloat16, torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


# -- the encode half --------------------------------------------------------------------------------------------


def load_vision(
    folder: str | Path, *, dtype: str | torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> Any:
    """transformers' vision tower of a Qwen3-VL(-MoE) folder, in eval mode. Raises CheckpointError."""
    info = read_info(folder)
    info.check_tower()
    family = Qwen3VLMoeVisionModel if info.is_moe else Qwen3VLVisionModel
    with Weights(info.folder) as weights:
        names = {name.removeprefix(VISION_PREFIX): name for name in weights.names(VISION_PREFIX)}
        config = info.config.vision_config
        tower = _build(info, family, config, weights, names, VISION_PREFIX, as_dtype(dtype), device)
    tower.rotary_pos_emb = type(tower.rotary_pos_emb)(tower.config)
    return _finish(info, tower, device)


# -- the language half ------------------------------------------------------------------------------------------


def load_language(
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    row_dtype: str | torch.dtype = torch.bfloat16,
) -> LanguageHalf:
    """The language half of a Qwen3-VL(-MoE) folder, or a plain Qwen3(-MoE) text model. Raises CheckpointError.

    Args:
        dtype: of the weights; None takes :func:`default_dtypes`. row_dtype: of the rows that encode halves send.
    """
    info = read_info(folder)
    kind = as_dtype(dtype) if dtype is not None else default_dtypes(device)[1]
    causal = _load_deepstack(info, kind, device) if info.is_vision_language else _load_plain(info, kind, device)
    model = causal.model if info.is_vision_language else PlainTextModel(causal.model)
    return LanguageHalf(
        model=model,
        lm_head=causal.lm_head,
        causal=causal,
        config=causal.config,
        layout=RowLayout(info.hidden_size, info.deepstack_levels, _name(row_dtype)),
        device=torch.device(device),
        dtype=kind,
        eos_ids=eos_ids(info),
        max_positions=int(causal.config.max_position_embeddings),
    )


def _load_deepstack(info: ModelInfo, dtype: torch.dtype, device: str | torch.device) -> Any:
    family = Qwen3MoeForCausalLMWithDeepStack if info.is_moe else Qwen3ForCausalLMWithDeepStack
    config, table = copy.deepcopy(info.config.text_config), TEXT_PREFIX + "embed_tokens.weight"
    with Weights(info.folder) as weights:
        tied = bool(info.config.tie_word_embeddings)
        if tied and HEAD in weights:  # a head that was trained apart counts, also for transformers
            tied = torch.equal(weights.tensor(HEAD), weights.tensor(table))
        config.tie_word_embeddings = tied
        names = {"model." + name.removeprefix(TEXT_PREFIX): name for name in weights.names(TEXT_PREFIX)}
        names[HEAD] = table if tied else HEAD
        causal = _build(info, family, config, weights, names, TEXT_PREFIX, dtype, device)
    if tied:
        causal.lm_head.weight = causal.model.embed_tokens.weight
    causal.model.rotary_emb = type(causal.model.rotary_emb)(config)
    return _finish(info, causal, device)


def _load_plain(info: ModelInfo, dtype: torch.dtype, device: str | torch.device) -> Any:
    # A text model has no other half to leave out: transformers' own loader does, once its report is checked.
    causal, report = _from_pretrained(info, AutoModelForCausalLM, dtype)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for entry in report[kind]:
            name = entry if isinstance(entry, str) else entry[0]
            fail(info.folder, name, f"tensor is in {kind.replace('_', ' ')}")
    return causal.to(device).eval().requires_grad_(False)


def eos_ids(info: ModelInfo) -> frozenset[int]:
    """Token ids that end an answer: generation_config.json's, else the config's, else its text part's, as transformers
    looks for them. Raises CheckpointError."""
    file = "generation_config.json"
    found = read_json(info.folder, file, {}).get("eos_token_id")
    if found is not None and not all(type(i) is int for i in (found if isinstance(found, list) else [found])):
        fail(info.folder, f"{file}: eos_token_id", f"{found!r} is neither a token id nor a list of them")
    for config in (info.config, info.config.get_text_config()):
        found = found if found is not None else getattr(config, "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset(int(i) for i in (found if isinstance(found, list) else [found]))


# -- the whole --------------------------------------------------------------------------------------------------


def load_monolith(
    folder: str | Path,
    *,
    vision_dtype: str | torch.dtype | None = None,
    language_dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Any:
    """transformers' own model of the folder, loaded by transformers: what the halves together must equal.

    The tower and the text model may differ in dtype (None: :func:`default_dtypes`); transformers' forward casts image
    embeddings to the text model's. Raises CheckpointError.
    """
    info = read_info(folder)
    if not info.is_vision_language:
        fail(info.folder, "config.json: architectures", f"{info.architecture} is not a vision-language model")
    family = Qwen3VLMoeForConditionalGeneration if info.is_moe else Qwen3VLForConditionalGeneration
    defaults = default_dtypes(device)
    vision = as_dtype(vision_dtype) if vision_dtype is not None else defaults[0]
    language = as_dtype(language_dtype) if language_dtype is not None else defaults[1]
    whole, _ = _from_pretrained(info, family, language)
    if vision != language:
        # Loaded a second time, not cast: a tensor that needs no cast stays where the file has it in memory, as it does
        # in a half, and some kernels round differently for other alignments. Rope frequencies stay float32 as well.
        whole.model.visual = _from_pretrained(info, family, vision)[0].model.visual
    return whole.to(device).eval().requires_grad_(False)


# -- fingerprints -----------------------------------------------------------------------------------------------


_SAMPLE_BYTES = 16 * 1024


def fingerprint(folder: str | Path, dtype: str | torch.dtype = torch.bfloat16) -> ModelFingerprint:
    """Identity of the rows that this folder's encode half makes in ``dtype``. Raises CheckpointError.

    The digest covers name, shape, dtype and the first and last 16 KiB of every vision tensor: training changes all of
    a tensor, and a language peer, which has no use for the tower, reads a few megabytes of it instead of gigabytes.
    The same weights have the same digest whether sharded or not; weights stored in another dtype have another.
    """
    info = read_info(folder)
    digest = ""
    if info.is_vision_language:
        files = [f for f in info.folder.iterdir() if f.suffix in (".safetensors", ".json")]
        stamps = tuple(sorted((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files))
        digest = _digest(info.folder.resolve(), stamps)
    return ModelFingerprint(info.architecture, info.hidden_size, info.deepstack_levels, _name(dtype), digest)


@functools.lru_cache(maxsize=16)
def _digest(folder: Path, stamps: object) -> str:  # stamps: so that a folder written anew is read anew
    info = read_info(folder)
    vision = info.config.vision_config
    settings = [s.determining_rows() for s in load_settings(folder)]
    head = {"vision": [getattr(vision, key, None) for key in _VISION_KEYS], "pixels": settings}
    total = xxhash.xxh3_128(json.dumps(head).encode())
    with Weights(folder) as weights:
        for name in sorted(weights.names(VISION_PREFIX)):
            tensor = weights.tensor(name)
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            total.update(data[:_SAMPLE_BYTES])
            total.update(data[-_SAMPLE_BYTES:])
    return total.hexdigest()


# -- shared -----------------------------------------------------------------------------------------------------


def _build(
    info: ModelInfo,
    family: Any,
    config: Any,
    weights: Weights,
    names: dict[str, str],
    prefix: str,
    dtype: torch.dtype,
    device: str | torch.device,
) -> Any:
    """``family(config)`` with parameter ``p`` taken from the tensor ``names[p]``, and brought to ``device`` before the
    next one is read: a host may have less memory than a GPU."""
    with torch.device("meta"):
        module = family._from_config(copy.deepcopy(config))
    wanted = {name: tuple(parameter.shape) for name, parameter in module.state_dict().items()}
    _check_names(info, wanted, names, prefix)
    state = {}
    for name, shape in wanted.items():
        stored = names[name]
        turned = _is_hub_layout(info, weights, stored, names) if ".mlp.experts." in name else False
        found = weights.shape(stored)
        if turned and len(found) == 3:
            found = (found[0], found[2], found[1])
        if found != shape:
            fail(info.folder, stored, f"tensor has shape {weights.shape(stored)}, the model needs {shape}")
        tensor = weights.tensor(stored).to(device, dtype)
        state[name] = tensor.transpose(1, 2).contiguous() if turned else tensor
    module.load_state_dict(state, assign=True)
    return module


def _check_names(info: ModelInfo, wanted: Iterable[str], names: dict[str, str], prefix: str) -> None:
    for name in wanted:
        if name not in names:
            fail(info.folder, prefix + name.removeprefix("model."), "tensor is missing")
    known = set(wanted)
    for name, stored in names.items():
        # Old exports stored rope frequencies, which are computed.
        if name not in known and not name.endswith("rotary_emb.inv_freq"):
            fail(info.folder, stored, "surplus tensor: the model has no place for it")


def _is_hub_layout(info: ModelInfo, weights: Weights, stored: str, names: dict[str, str]) -> bool:
    text = info.config.get_text_config()
    h, i = text.hidden_size, text.moe_intermediate_size
    layer = stored.rsplit(".", 1)[0]
    if i != h:
        return weights.shape(f"{layer}.down_proj")[1:] == (i, h)
    return weights.shape(f"{layer}.gate_up_proj")[1:] == (h, 2 * i)


def _finish(info: ModelInfo, module: Any, device: str | torch.device) -> Any:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            fail(info.folder, name, "was not loaded; this transformers version has an unknown buffer")
    return module.to(device).eval().requires_grad_(False)


def _from_pretrained(info: ModelInfo, family: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, report = family.from_pretrained(info.folder, dtype=dtype, output_loading_info=True)
    except Exception as error:  # transformers raises what its many checks raise
        raise CheckpointError(str(info.folder), "weights", f"cannot be loaded: {error}") from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    return model, report
