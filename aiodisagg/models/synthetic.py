"""Complete model folders from a seed: random weights, but every file a real Qwen3-VL(-MoE) folder has.

For tests, benchmarks and trying things without a download. The tokenizer is trained on a text of this package, so a
folder is the same on every machine. Two deliberate choices make random weights useful for finding bugs: weights are
wide (``initializer_range`` 0.08), so that a lost DeepStack level or a wrong position changes logits visibly; and
2*I != H for the experts, so that the two expert layouts of checkpoints cannot be mistaken for each other.
"""

from __future__ import annotations

import itertools
import json
import string
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

Layout = Literal["hub", "transformers"]
"""Experts on disk: ``[E, H, 2I]``, ``[E, I, H]`` on the hub; ``[E, 2I, H]``, ``[E, H, I]`` saved by transformers."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif -%}
{%- endfor -%}
{%- endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Dimensions of a synthetic model. ``experts`` 0 makes it dense. Patches are 16x16x2, merged 2x2."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts: int
    experts_per_token: int
    moe_intermediate: int
    vocab: int
    vision_hidden: int
    vision_depth: int
    vision_heads: int
    vision_intermediate: int
    image_pixels: tuple[int, int]
    """Smallest and largest image after resizing, in pixels (1024 are one token)."""


TINY = Size(64, 4, 4, 2, 16, 160, 8, 2, 48, 640, 48, 4, 4, 96, (1024, 65536))
MEDIUM = Size(512, 8, 8, 4, 64, 1536, 16, 4, 384, 8192, 384, 8, 6, 1536, (4096, 1048576))
SIZES = {"tiny": TINY, "115m": MEDIUM}


def build_tokenizer(vocab: int) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer in Qwen's form with exactly ``vocab`` tokens, chat template and special tokens.

    Merges come from the package's text, and when that gives no more, from letter combinations, so that every id of a
    large vocabulary still decodes to something.
    """
    room = vocab - len(SPECIAL_TOKENS)
    text = (resources.files("aiodisagg") / "data" / "corpus.txt").read_text(encoding="utf-8")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(room, 1024),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([text], trainer)
    model = json.loads(trained.to_str())["model"]
    ids: dict[str, int] = model["vocab"]
    merges = [tuple(merge) for merge in model["merges"]]
    letters = string.ascii_lowercase
    pairs = [a + b for a, b in itertools.product(letters, repeat=2)]
    for left, right in itertools.chain(itertools.product(letters, repeat=2), itertools.product(pairs, letters)):
        if len(ids) >= room:
            break
        if left + right not in ids and left in ids:
            ids[left + right] = len(ids)
            merges.append((left, right))
    return Qwen2Tokenizer(
        vocab=ids,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
    )


def _config(size: Size, levels: int, tokenizer: Qwen2Tokenizer, tied: bool) -> Any:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    quarter = size.head_dim // 8
    text = {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": 32768,
        "initializer_range": 0.08,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [size.head_dim // 2 - 2 * quarter, quarter, quarter],
            "mrope_interleaved": True,
        },
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {
        "depth": size.vision_depth,
        "hidden_size": size.vision_hidden,
        "num_heads": size.vision_heads,
        "intermediate_size": size.vision_intermediate,
        "out_hidden_size": size.hidden,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": list(range(levels)),
        "initializer_range": 0.08,
    }
    if size.experts:
        text |= {
            "num_experts": size.experts,
            "num_experts_per_tok": size.experts_per_token,
            "moe_intermediate_size": size.moe_intermediate,
            "decoder_sparse_step": 1,
        }
    return (Qwen3VLMoeConfig if size.experts else Qwen3VLConfig)(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_processors(folder: Path, size: Size) -> None:
    smallest, largest = size.image_pixels
    common = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    image = {"shortest_edge": smallest, "longest_edge": largest}
    video = {"shortest_edge": 2 * smallest, "longest_edge": 4 * largest}
    _write_json(
        folder / "preprocessor_config.json",
        {"size": image, **common, "image_processor_type": "Qwen2VLImageProcessorFast"},
    )
    _write_json(
        folder / "video_preprocessor_config.json",
        {"size": video, **common, "video_processor_type": "Qwen3VLVideoProcessor"},
    )


def save_weights(folder: Path, tensors: dict[str, torch.Tensor], *, layout: Layout = "hub", shards: int = 1) -> None:
    """Writes a state dict of transformers' monolith as ``model.safetensors``, or as shards with their index.

    ``layout`` says how experts are stored; a tied head must have been left out by the caller.
    """

    def stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
        expert = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
        return (tensor.transpose(1, 2) if expert and layout == "hub" else tensor).contiguous()

    files = {name: stored(name, tensor.detach()) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = dict(itertools.islice(files.items(), i, None, shards))
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(t.numel() * t.element_size() for t in files.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def build_synthetic(
    folder: str | Path,
    size: str | Size = "tiny",
    *,
    moe: bool = True,
    levels: int = 3,
    seed: int = 0,
    layout: Layout = "hub",
    shards: int = 1,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a loadable Qwen3-VL-MoE (``moe``) or Qwen3-VL folder with random weights and returns its path.

    Args:
        folder: made if missing; files of the same names are overwritten.
        size: a name from ``SIZES`` ("tiny": 0.7 M parameters, "115m") or dimensions of your own.
        levels: DeepStack levels, 0 to the number of layers of either half.
        seed: equal seeds give equal bytes; torch's global generator is left as it was.
        layout: how experts are stored. shards: number of weight files.
        tied: leave ``lm_head`` out and use the embedding table.
        dtype: element type of the stored weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dims = SIZES[size] if isinstance(size, str) else size
    if not moe:
        dims = Size(**{**{f: getattr(dims, f) for f in Size.__dataclass_fields__}, "experts": 0})
    tokenizer = build_tokenizer(dims.vocab)
    config = _config(dims, levels, tokenizer, tied)
    family = Qwen3VLMoeForConditionalGeneration if dims.experts else Qwen3VLForConditionalGeneration
    config.architectures = [family.__name__]
    config.dtype = dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = family(config).state_dict()
    if tied:
        del state["lm_head.weight"]
    save_weights(folder, {name: t.to(dtype) for name, t in state.items()}, layout=layout, shards=shards)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_processors(folder, dims)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    _write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[1]})
    return folder


def build_tiny(folder: str | Path, **options: Any) -> Path:
    """:func:`build_synthetic` of size "tiny": under a second, for tests."""
    return build_synthetic(folder, "tiny", **options)
