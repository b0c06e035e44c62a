"""From planned segments to one forward pass: requests as the step thread knows them, and the packed inputs.

Token embeddings come from the model's table; at visual tokens they are replaced by the item's rows, and the rest of
each row is the token's DeepStack input. Positions of the prompt are the plan's; decode token j is at ``T + j + delta``
in all three rows.
"""

# The model is transformers' untyped nn.Module, hence Any.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aiodisagg.engine.attention import KvPool, PackedBatch, PackedSegment, has_mrope, use_paged_attention
from aiodisagg.engine.config import EngineConfig
from aiodisagg.engine.detokenize import AnswerText
from aiodisagg.engine.prefix import PageKeys
from aiodisagg.engine.rows import RequestRows
from aiodisagg.engine.sampling import Sampler
from aiodisagg.engine.schedule import Segment, most_tokens
from aiodisagg.engine.stream import RequestHandle
from aiodisagg.engine.types import SamplingParams
from aiodisagg.errors import ConfigError
from aiodisagg.models.base import PromptPlan

if TYPE_CHECKING:
    from aiodisagg.engine.device_runner import DeviceRunner


STEP_BYTES = 2 << 30
"""Of a GPU's memory, kept for a step's own tensors."""


class EngineSequence:
    """One request: its prompt, its rows, what it has generated. Only ``rows`` is touched by other threads."""

    def __init__(
        self,
        handle: RequestHandle,
        plan: PromptPlan,
        sampling: SamplingParams,
        rows: RequestRows,
        decode: Callable[[Sequence[int]], str],
        keys: PageKeys | None = None,
        *,
        due: float = -math.inf,
        priority: int = 0,
    ) -> None:
        self.request_id = handle.request_id
        self.handle, self.plan, self.sampling, self.rows = handle, plan, sampling, rows
        self.sampler = Sampler(sampling)
        self.text = AnswerText(decode, sampling.stop)
        self.generated: list[int] = []
        self.keys = keys
        """None: its pages are not shared."""
        self.due, self.priority = due, priority
        """See :class:`~aiodisagg.scheduler.order.Claim`; on the clock ``time.monotonic``."""

    def append(self, token: int) -> None:
        """The answer's next token."""
        if self.keys is not None:
            self.keys.grow(token, self.plan.tokens + len(self.generated) + self.plan.delta)
        self.generated.append(token)

    def token_ids(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: prompt, then answer."""
        prompt = self.plan.tokens
        if stop <= prompt:
            return self.plan.input_ids[start:stop]
        if start == stop - 1:  # a decode
            return np.array((self.generated[start - prompt],), dtype=np.int64)
        answer = self.generated[max(start - prompt, 0) : stop - prompt]
        return np.concatenate([self.plan.input_ids[start:], np.asarray(answer, dtype=np.int64)])

    def positions(self, start: int, stop: int) -> np.ndarray:
        """int64 [3, stop - start]."""
        prompt = self.plan.tokens
        if stop <= prompt:
            return self.plan.positions[:, start:stop]
        if start == stop - 1:
            return np.full((3, 1), start + self.plan.delta, dtype=np.int64)
        counted = np.arange(max(start, prompt), stop) + self.plan.delta
        return np.concatenate([self.plan.positions[:, start:], np.tile(counted, (3, 1))], axis=1)


@dataclass(frozen=True, slots=True)
class Work:
    """A segment with what computing it needs."""

    segment: Segment
    sequence: EngineSequence
    pages: Sequence[int]


def pool_bytes_on(device: torch.device) -> int:
    """For KV pages, when nobody said how much: of a GPU 0.9 of its memory, less what is taken already and 2 GiB for
    what a step computes with, so load everything else first. Elsewhere 256 MiB. ConfigError if a GPU is too full."""
    if device.type != "cuda":
        return 256 << 20
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    left = int(free - 0.1 * total) - STEP_BYTES
    if left < 1:
        held = f"{free >> 20} of {total >> 20} MiB are free"
        raise ConfigError("pool_bytes", f"no room for KV pages on {device}: {held}, 2048 and a tenth are kept free")
    return left


class Runner:
    """The language model with its KV pool. One thread at a time; it owns the model's attention until ``release``.

    Args:
        model: a causal language model in transformers' form: ``config``, ``get_input_embeddings()``, and a forward
            that takes inputs_embeds [1, T, h], position_ids ([3, 1, T] if one of its modules has an ``mrope_section``,
            else [1, T]), input_deepstack_embeds [1, T, k*h] (passed only with rows that have them), logits_to_keep
            (indices) and hands other keyword arguments to its attention function.
        row_width: elements of the rows that will come, if known.

    Raises ConfigError if the model cannot be switched to paged attention or the pool has no page.
    """

    def __init__(self, model: Any, config: EngineConfig, *, row_width: int | None = None) -> None:
        shape = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self._model, self._embed = model, model.get_input_embeddings()
        self.hidden_size = int(shape.hidden_size)
        self.dtype: torch.dtype = self._embed.weight.dtype
        self.device: torch.device = self._embed.weight.device
        self._mrope = has_mrope(model)
        self.max_context = int(config.max_context or shape.max_position_embeddings)
        kv_heads = int(shape.num_key_value_heads)
        head_dim = int(getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)
        layers = int(shape.num_hidden_layers)
        page_bytes = 2 * layers * config.page_size * kv_heads * head_dim * self.dtype.itemsize
        pool_bytes = config.pool_bytes if config.pool_bytes is not None else pool_bytes_on(self.device)
        num_pages = config.num_pages if config.num_pages is not None else pool_bytes // page_bytes
        if not num_pages:
            raise ConfigError("pool_bytes", f"{pool_bytes} hold no page of {page_bytes} bytes")
        self.num_pages = num_pages
        try:
            self.pool = KvPool(
                layers=layers,
                num_pages=num_pages,
                page_size=config.page_size,
                kv_heads=kv_heads,
                head_dim=head_dim,
                dtype=self.dtype,
                device=self.device,
            )
        except RuntimeError as error:  # as torch says it for every device
            text = f"no room for {num_pages * page_bytes >> 20} MiB of KV pages on {self.device}: {error}"
            raise ConfigError("pool_bytes", text) from error
        self._attention_before = use_paged_attention(model)
        self._config, self._row_width = config, row_width
        self.device_runner: DeviceRunner | None = None
        """The same model in few launches, on a GPU after ``warm_up``."""

    def probe(self, pages: Sequence[int]) -> None:
        """Computes a prompt over a page that nobody uses, the way of prompts. Raises what the model or the device
        raises."""
        tokens = self.pool.page_size  # one token alone would go the way of decodes
        plan = PromptPlan(np.zeros(tokens, dtype=np.int64), np.tile(np.arange(tokens), (3, 1)), 0, ())
        rows = RequestRows(
            "probe", plan, hidden_size=self.hidden_size, width=None, dtype=self.dtype, device=self.device
        )  # fmt: skip
        sequence = EngineSequence(RequestHandle("probe", lambda _: None), plan, SamplingParams(), rows, lambda _: "")
        logits, _ = self.forward([Work(Segment("probe", 0, tokens, True), sequence, pages)])
        logits.sum().item()  # a device says only now what it thinks of it

    def warm_up(self) -> None:
        """Chooses and compiles kernels and captures graphs, on a GPU; takes seconds to a minute there, and no time
        elsewhere.

        Call it before the first step, on any thread; the pool's contents stay as they are.
        """
        if self.device.type == "cuda":
            from aiodisagg.engine.device_runner import DeviceRunner  # Triton is only there, and needed, with a GPU

            self.device_runner = DeviceRunner.of(
                self._model,
                self.pool,
                token_budget=most_tokens(self._config.token_budget),
                max_running=min(self._config.max_running, self._config.token_budget),
                max_context=self.max_context,
                row_width=self._row_width,
            )
            torch.cuda.empty_cache()  # of weights before they were joined: gigabytes, when memory is shared out already
        if self.device_runner is not None:
            self.device_runner.warm_up()

    def release(self) -> None:
        """Gives the model back with the attention it came with, and the memory: what refers to this object may be
        garbage in cycles, which lies there until somebody looks for it. Idempotent."""
        model, self._model = self._model, None
        if model is not None:
            model.set_attn_implementation(self._attention_before)
            self._embed = self.device_runner = None
            del self.pool

    def forward(self, batch: Sequence[Work]) -> tuple[torch.Tensor, int]:
        """Computes the segments: logits [samples, vocab] in their order, and the number of rows used.

        Keys and values go to the pool; doing a segment again writes the same ones again. Raises whatever the model
        raises. On a GPU the logits are valid until the next call, and a step that samples nothing is waited for: what
        arrives while it computes belongs into one next step, and not each row into a step of its own behind it.
        """
        if self.device_runner is not None:
            found = self.device_runner.forward(batch)
            if self.device.type == "cuda" and not any(work.segment.samples for work in batch):
                torch.cuda.current_stream(self.device).synchronize()
            return found
        ids = np.concatenate([w.sequence.token_ids(w.segment.start, w.segment.stop) for w in batch])
        positions = np.concatenate([w.sequence.positions(w.segment.start, w.segment.stop) for w in batch], axis=1)
        embeds = self._embed(torch.from_numpy(ids).to(self.device))
        segments, sampled, at = [], [], 0
        visual: list[np.ndarray] = []
        rows: list[torch.Tensor] = []
        for work in batch:
            s = work.segment
            where, taken = work.sequence.rows.take(s.start, s.stop)
            if taken is not None:
                visual.append(where + at)
                rows.append(taken)
            segments.append(PackedSegment.of(at, at + s.tokens, self.pool.slots(work.pages, s.stop)))
            at += s.tokens
            if s.samples:
                sampled.append(at - 1)
        inputs: dict[str, Any] = {}
        used = 0
        if rows:
            index, packed = torch.from_numpy(np.concatenate(visual)).to(self.device), torch.cat(rows)
            used = packed.shape[0]
            embeds[index] = packed[:, : self.hidden_size]
            if packed.shape[1] > self.hidden_size:
                deepstack = embeds.new_zeros(at, packed.shape[1] - self.hidden_size)
                deepstack[index] = packed[:, self.hidden_size :]
                inputs["input_deepstack_embeds"] = deepstack[None]
        where3 = torch.from_numpy(positions).to(self.device)
        out = self._model(
            inputs_embeds=embeds[None],
            position_ids=where3[:, None] if self._mrope else where3[:1],
            logits_to_keep=torch.tensor(sampled, dtype=torch.int64, device=self.device),
            use_cache=False,
            aio_batch=PackedBatch(self.pool, segments),
            **inputs,
        )
        logits: torch.Tensor = out.logits[0]
        return logits, used
