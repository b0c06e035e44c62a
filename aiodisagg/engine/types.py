"""What goes into the engine and what comes out; no torch needed to build or read these."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from aiodisagg.errors import InvalidRequest, PromptTooLong


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. ``temperature`` 0 is greedy; ``top_k`` 0 means all; ``seed`` None draws one."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    as_fits: bool = False
    """A prompt that leaves room for fewer than ``max_tokens`` gets so many instead of being refused."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidRequest("max_tokens", f"must be at least 1, not {self.max_tokens}")
        if not math.isfinite(self.temperature) or not 0.0 <= self.temperature <= 2.0:
            raise InvalidRequest("temperature", f"must be between 0 and 2, not {self.temperature}")
        if not math.isfinite(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest("top_p", f"must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise InvalidRequest("top_k", f"must be 0 (all) or positive, not {self.top_k}")
        if isinstance(self.stop, str):  # type: ignore[unreachable]  # who has no types: each letter would be one
            raise InvalidRequest("stop", "must be a tuple of strings, not a string")
        if len(self.stop) > 16 or any(not s for s in self.stop):
            raise InvalidRequest("stop", "at most 16 strings, none of them empty")

    def fitted(self, prompt_tokens: int, limit: int) -> SamplingParams:
        """For a prompt of so many tokens, where it and its answer have at most ``limit``. Raises PromptTooLong."""
        needed = prompt_tokens + (1 if self.as_fits else self.max_tokens)
        if needed > limit:
            raise PromptTooLong(needed, limit)
        return replace(self, max_tokens=min(self.max_tokens, limit - prompt_tokens))


class FinishReason(enum.StrEnum):
    """Why an answer ended; in the last delta of each."""

    STOP = "stop"
    """End of sequence or a stop string."""
    LENGTH = "length"
    """``max_tokens`` reached."""
    CANCELLED = "cancelled"
    """Whoever asked for it has left."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer took, in tokens; those of images count in the prompt."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer. ``text`` holds whole characters only and never part of a stop string."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    """Set on the last delta."""
