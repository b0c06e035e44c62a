"""Tiny language halves, plans made by hand, and the plain loop that the engine must agree with, token by token."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration

from aiodisagg.engine.config import EngineConfig
from aiodisagg.engine.engine import Engine, EngineRequest
from aiodisagg.engine.stream import RequestHandle
from aiodisagg.engine.types import Delta, FinishReason, SamplingParams
from aiodisagg.models.base import ItemKind, PlannedItem, PromptPlan
from aiodisagg.models.qwen3_text import Qwen3ForCausalLMWithDeepStack, Qwen3MoeForCausalLMWithDeepStack

IMAGE, VIDEO, VOCAB, HIDDEN = 300, 301, 320, 32
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.12,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}


@cache
def tiny_model(kind: str) -> Any:
    """ "moe" or "dense" (language halves), "text" (transformers' plain Qwen3); float32, the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        if kind == "moe":
            experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
            config = Qwen3VLMoeTextConfig(**_SHAPE, **experts, decoder_sparse_step=1)
            return Qwen3MoeForCausalLMWithDeepStack(config).eval()
        if kind == "dense":
            return Qwen3ForCausalLMWithDeepStack(Qwen3VLTextConfig(**_SHAPE)).eval()
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        return Qwen3ForCausalLM(Qwen3Config(**{**_SHAPE, **rope})).eval()


def monolith_and_half(config: Any, *, moe: bool) -> tuple[Any, Any]:
    """transformers' model of that configuration, with random weights, and its language half with the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        mono = (Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration)(config).eval()
    half = (Qwen3MoeForCausalLMWithDeepStack if moe else Qwen3ForCausalLMWithDeepStack)(config.text_config).eval()
    state = {k.replace("model.language_model.", "model."): v for k, v in mono.state_dict().items() if "visual" not in k}
    half.load_state_dict(state)
    return mono, half


def make_plan(parts: Sequence[int | tuple[int, int, int]], seed: int = 0) -> PromptPlan:
    """A prompt of texts (numbers of tokens) and items (merged grids t, h, w; t > 1 is a video with a token of text
    between frame pairs), with M-RoPE positions by the rule of the model."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    positions: list[tuple[int, int, int]] = []
    items = []
    at = 0
    for n, part in enumerate(parts):
        if isinstance(part, int):
            ids += rng.integers(0, 256, part).tolist()
            positions += [(at + i,) * 3 for i in range(part)]
            at += part
            continue
        t, h, w = part
        spans = []
        for frame in range(t):
            if frame:
                ids.append(7)
                positions.append((at,) * 3)
                at += 1
            spans.append((len(ids), len(ids) + h * w))
            ids += [VIDEO if t > 1 else IMAGE] * (h * w)
            positions += [(at, at + y, at + x) for y in range(h) for x in range(w)]
            at += max(h, w)
        kind = ItemKind.VIDEO if t > 1 else ItemKind.IMAGE
        items.append(PlannedItem(f"{seed:016x}{n:016x}", kind, (t, 2 * h, 2 * w), t * h * w, tuple(spans), (b"",) * t))
    where = np.array(positions, dtype=np.int64).T.reshape(3, -1)
    return PromptPlan(np.array(ids, dtype=np.int64), where, int(where.max()) + 1 - len(ids), tuple(items))


def changed(plan: PromptPlan, index: int, **what: Any) -> PromptPlan:
    """The same plan, but for one item."""
    items = [replace(item, **what) if i == index else item for i, item in enumerate(plan.items)]
    return replace(plan, items=tuple(items))


def with_text(plan: PromptPlan, ids: Sequence[int]) -> PromptPlan:
    """The prompt followed by more text: a next turn."""
    where = np.tile(np.arange(plan.tokens, plan.tokens + len(ids)) + plan.delta, (3, 1))
    return replace(
        plan,
        input_ids=np.concatenate([plan.input_ids, np.array(ids)]),
        positions=np.concatenate([plan.positions, where], axis=1),
    )


def make_rows(plan: PromptPlan, levels: int, seed: int = 0) -> list[torch.Tensor]:
    """Random packed rows [rows, (1+levels)*h] of each item."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(item.rows, (1 + levels) * HIDDEN, generator=g) * 0.5 for item in plan.items]


@torch.no_grad()
def plain_loop(model: Any, plan: PromptPlan, rows: Sequence[torch.Tensor], new_tokens: int) -> list[int]:
    """Greedy tokens of one request alone, with a DynamicCache, the prompt in one piece."""
    embeds = model.get_input_embeddings()(torch.from_numpy(plan.input_ids))
    spans = [torch.arange(a, b) for item in plan.items for a, b in item.spans]
    extra: dict[str, Any] = {}
    if rows:
        packed, where = torch.cat(list(rows)), torch.cat(spans)
        embeds[where] = packed[:, :HIDDEN]
        if packed.shape[1] > HIDDEN:
            deepstack = torch.zeros(plan.tokens, packed.shape[1] - HIDDEN)
            deepstack[where] = packed[:, HIDDEN:]
            extra["input_deepstack_embeds"] = deepstack[None]
    mrope = "mrope_section" in model.config.rope_parameters
    where3 = torch.from_numpy(plan.positions)
    kv = DynamicCache(config=model.config)
    out = model(
        inputs_embeds=embeds[None],
        position_ids=where3[:, None] if mrope else where3[:1],
        past_key_values=kv,
        use_cache=True,
        logits_to_keep=1,
        **extra,
    )
    tokens = [int(out.logits[0, -1].argmax())]
    for j in range(new_tokens - 1):
        at = torch.full((3, 1, 1) if mrope else (1, 1), plan.tokens + j + plan.delta)
        ids = torch.tensor([[tokens[-1]]])
        out = model(input_ids=ids, position_ids=at, past_key_values=kv, use_cache=True, logits_to_keep=1)
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens


def decode(ids: Sequence[int]) -> str:
    """Tokens below 256 are bytes, others are special."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def make_engine(model: Any, *, eos: frozenset[int] = frozenset(), **config: Any) -> Engine:
    return Engine(model, decode, eos, EngineConfig(**{"num_pages": 128, "token_budget": 64, **config}))


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    last: Delta | None = None

    @property
    def reason(self) -> FinishReason | None:
        return None if self.last is None else self.last.finish_reason


async def read(handle: RequestHandle) -> Answer:
    answer = Answer()
    async for delta in handle:
        answer.tokens += delta.token_ids
        answer.text += delta.text
        answer.last = delta
    return answer


_ids = itertools.count()


def submit(engine: Engine, plan: PromptPlan, **sampling: Any) -> RequestHandle:
    return engine.submit(EngineRequest(f"r{next(_ids)}", plan, SamplingParams(**{"max_tokens": 8, **sampling})))


def deliver_all(engine: Engine, handle: RequestHandle, rows: Sequence[torch.Tensor]) -> None:
    for i, item in enumerate(rows):
        engine.deliver(handle, i, 0, item)


async def ask(engine: Engine, plan: PromptPlan, rows: Sequence[torch.Tensor] = (), **sampling: Any) -> Answer:
    """Submits with all rows at once and reads to the end."""
    handle = submit(engine, plan, **sampling)
    deliver_all(engine, handle, rows)
    return await asyncio.wait_for(read(handle), 30)


async def eventually(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the step thread announces nothing
        await asyncio.sleep(0.001)
