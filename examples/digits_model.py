"""The digit reader as a checkpoint folder: configuration, tokenizer, chat template, pixel budget, weights.

The folder has the layout of a released Qwen3-VL-MoE: one safetensors file in bfloat16 with experts stored
``[E, H, 2I]`` / ``[E, I, H]`` (transformers holds them transposed), and every side file that transformers reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

PATCH, MERGE, TEMPORAL = 16, 2, 2
QUESTIONS = (
    "Which digits are these, in order?",
    "Which digits are these?",
    "Which digit is this?",
    "What digits do you see, from first to last?",
    "Read the digits.",
    "Please read these digits in order.",
    "What is written here?",
    "Name the digits in the images.",
)
SYSTEM = "You are a helpful assistant."
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB_SIZE = 512

# How Qwen2 and its successors split text before BPE; digits stay single, a space before one is a token of its own.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or part.type == 'image_url' or 'image' in part or 'image_url' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' or 'video' in part %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The budget lies on both sides of 96 * 96, so that rounding brings every square image to exactly 96 x 96.
_IMAGES: dict[str, Any] = {
    "size": {"shortest_edge": 90 * 90, "longest_edge": 100 * 100},
    "patch_size": PATCH,
    "temporal_patch_size": TEMPORAL,
    "merge_size": MERGE,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}
_PREPROCESSOR = {**_IMAGES, "image_processor_type": "Qwen2VLImageProcessorFast"}
_VIDEOS = {
    **_IMAGES,
    "size": {"shortest_edge": 64 * 64, "longest_edge": 16 * 128 * 128},
    "video_processor_type": "Qwen3VLVideoProcessor",
}


def build_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most ``VOCAB_SIZE`` tokens learnt from the prompts of the task; it encodes any text."""
    from transformers import Qwen2Tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator([*QUESTIONS, SYSTEM, *_ROLES] * 4, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def build_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLMoeConfig:
    """2.6 million parameters; 2 * moe_intermediate_size is not hidden_size, so no layout of experts is ambiguous."""
    from transformers import Qwen3VLMoeConfig

    ids = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in SPECIAL}
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "initializer_range": 0.04,
        "tie_word_embeddings": False,
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100_000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 6,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 128,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2, 4],
        "initializer_range": 0.04,
    }
    return Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        architectures=["Qwen3VLMoeForConditionalGeneration"],
    )


def hub_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """bfloat16 copies on the CPU, expert matrices transposed to the layout of released checkpoints."""
    stored = {}
    for name, tensor in state.items():
        if ".mlp.experts." in name:
            tensor = tensor.transpose(1, 2)
        stored[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous().clone()
    return stored


def save_checkpoint(
    folder: Path, model: Qwen3VLMoeForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes everything that loading needs; files of an earlier save are overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(hub_layout(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "bfloat16"
        part.pop("_name_or_path", None)
    _write(folder / "config.json", config)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    _write(
        folder / "generation_config.json",
        {"do_sample": False, "eos_token_id": [eos, pad], "pad_token_id": pad, "max_new_tokens": 32},
    )
    _write(folder / "preprocessor_config.json", _PREPROCESSOR)
    _write(folder / "video_preprocessor_config.json", _VIDEOS)
    tokenizer.save_pretrained(folder)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
