"""The next token from logits: greedy, or by temperature, top-k and top-p with a generator of the request's own.

A seeded request gives the same tokens whatever it is batched with and however often it is preempted: each token takes
exactly one number from the request's generator, and the number picks from the cumulative distribution. (``multinomial``
over a batch would take its numbers from one generator in an order that depends on the neighbours.)
"""

# torch declares no types for streams and events.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import secrets

import torch

from aiodisagg.engine.types import SamplingParams


class Sampler:
    """Chooses one request's tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator: torch.Generator | None = None
        if params.temperature > 0.0:
            # On the CPU also for logits of a GPU: one number a token, the same on every device.
            self._generator = torch.Generator()
            self._generator.manual_seed((secrets.randbits(63) if params.seed is None else params.seed) % 2**63)

    @property
    def greedy(self) -> bool:
        return self._generator is None

    def sample(self, logits: torch.Tensor) -> int:
        """The next token from finite logits [vocab] of any float dtype."""
        if self._generator is None:
            return int(logits.argmax())
        params = self._params
        draw = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        scaled = logits.to(torch.float64)
        scaled = (scaled - scaled.max()) / params.temperature  # however low the temperature, the best one stays finite
        if 0 < params.top_k < scaled.shape[0]:
            values, ids = scaled.topk(params.top_k)  # sorted
        elif params.top_p < 1.0:
            values, ids = scaled.sort(descending=True, stable=True)
        else:
            values, ids = scaled, None
        cumulative = torch.softmax(values, 0).cumsum(0)
        last = cumulative.shape[0] - 1
        if params.top_p < 1.0:  # the smallest set that reaches it: the first token at which the sum does is in
            last = min(last, _first_at_least(cumulative, params.top_p))
        # Past the product only for a draw of 0, which must not pick a token of probability 0.
        target = max(draw * float(cumulative[last]), torch.finfo(torch.float64).tiny)
        picked = min(_first_at_least(cumulative, target), last)
        return picked if ids is None else int(ids[picked])


def _first_at_least(ascending: torch.Tensor, value: float) -> int:
    return int(torch.searchsorted(ascending, torch.tensor(value, dtype=ascending.dtype, device=ascending.device)))


def sample_batch(logits: torch.Tensor, samplers: list[Sampler]) -> list[int | None]:
    """Next tokens from logits [n, vocab], one row a sampler; None where a logit is NaN or infinite."""
    if not samplers:
        return []
    finite, greedy = _read_back(torch.stack([torch.isfinite(logits).all(-1).long(), logits.argmax(-1)]))
    return [
        None if not finite[i] else greedy[i] if sampler.greedy else sampler.sample(logits[i])
        for i, sampler in enumerate(samplers)
    ]


def _read_back(found: torch.Tensor) -> list[list[int]]:
    """What the device found, by one copy and one event: the stream goes on, and so may other threads."""
    if not found.is_cuda:
        return found.tolist()
    pinned = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    pinned.copy_(found, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    copied.synchronize()
    return pinned.tolist()
