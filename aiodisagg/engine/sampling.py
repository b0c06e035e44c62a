"""The next token from logits: greedy, or by temperature, top-k and top-p with a generator of the request's own.

A seeded request gives the same tokens whatever it is batched with and however often it is preempted: each token takes
exactly one number from the request's generator, and the number picks from the cumulative distribution. (``multinomial``
over a batch would take its numbers from one generator in an order that depends on the neighbours.) A step that raised
is done again with the same numbers.

The distribution goes through the vocabulary by id, or, where top-k or top-p cut it, from the most likely token down,
and of equally likely ones by id. What is picked is nearly always among the first ``RANKED``, so those are sorted; where
it is not, all are, which takes several times as long.
"""

# torch declares no types for streams and events.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence

import torch

from aiodisagg.engine.types import SamplingParams

RANKED = 1024
CACHED = 1 << 18
"""Logits whose float64 a CPU's cache holds."""
_TINY = torch.finfo(torch.float64).tiny

Draw = tuple[float, float, float, float]
"""For one token: its number, the temperature, how many tokens and which part of them may be chosen."""


class Sampler:
    """How one request's tokens are chosen."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator: torch.Generator | None = None
        self._unused: list[Draw] = []
        if params.temperature > 0.0:
            # On the CPU also for logits of a GPU: one number a token, the same on every device.
            self._generator = torch.Generator()
            self._generator.manual_seed((secrets.randbits(63) if params.seed is None else params.seed) % 2**63)

    @property
    def greedy(self) -> bool:
        return self._generator is None

    def cuts(self, vocabulary: int) -> bool:
        """Whether some tokens are never chosen."""
        return 0 < self._params.top_k < vocabulary or self._params.top_p < 1.0

    @property
    def most(self) -> int:
        """How many tokens may be chosen, as far as top-k says."""
        return self._params.top_k or RANKED

    def draw(self) -> Draw:
        """For the next token."""
        if self._unused:
            return self._unused.pop()
        params = self._params
        number = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        return number, params.temperature, params.top_k or math.inf, params.top_p if params.top_p < 1.0 else math.inf

    def put_back(self, draw: Draw) -> None:
        """No token came of the last draw: it is the next one again."""
        self._unused.append(draw)


def sample_batch(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """Next tokens from logits [n, vocab] of any float dtype, a row a sampler; None where a logit is NaN or infinite.

    If it raises, on a GPU also for the forward pass before it, the samplers are as they were.
    """
    if not samplers:
        return []
    found = torch.stack([torch.isfinite(logits).all(-1).long(), logits.argmax(-1)])
    drawn = {i: sampler.draw() for i, sampler in enumerate(samplers) if not sampler.greedy}
    try:
        finite, tokens = _sample(logits, samplers, drawn, found) if drawn else _read_back(found)
    except BaseException:
        for i in reversed(drawn):
            samplers[i].put_back(drawn[i])
        raise
    return [token if ok else None for ok, token in zip(finite, tokens, strict=True)]


def _sample(
    logits: torch.Tensor, samplers: Sequence[Sampler], drawn: Mapping[int, Draw], found: torch.Tensor
) -> tuple[list[int], list[int]]:
    """``found``, int64 [2, n]: which rows are finite, and their best tokens. Returns that, with tokens of the rows
    ``drawn`` as their samplers choose them."""
    vocabulary = logits.shape[1]
    order = sorted(drawn, key=lambda i: samplers[i].cuts(vocabulary))
    uncut = sum(not samplers[i].cuts(vocabulary) for i in order)
    index = _sent(torch.tensor(order), logits)
    draws = _sent(torch.tensor([drawn[i] for i in order], dtype=torch.float64), logits)
    rows, tokens, sure = logits[index], torch.empty_like(index), torch.ones_like(index)
    for part in _parts(0, uncut, logits):
        tokens[part] = _by_id(rows[part], draws[part])
    # One more than may be chosen: whether others are as likely as the last of them can be seen.
    ranked = min(vocabulary, max((min(RANKED, samplers[i].most + 1) for i in order[uncut:]), default=0))
    for part in _parts(uncut, len(order), logits):
        tokens[part], sure[part] = _by_rank(rows[part], draws[part], ranked)
    known = torch.ones_like(found[0])
    found[1, index], known[index] = tokens, sure
    finite, chosen, is_known = _read_back(torch.cat([found, known[None]]))
    for at, i in enumerate(order):
        if finite[i] and not is_known[i]:
            chosen[i] = int(_by_rank(rows[at : at + 1], draws[at : at + 1], vocabulary)[0])
    return finite, chosen


def _sent(numbers: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """To where the logits are, without waiting for what is computed there."""
    return numbers.pin_memory().to(logits.device, non_blocking=True) if logits.is_cuda else numbers


def _parts(start: int, stop: int, logits: torch.Tensor) -> Iterator[slice]:
    """What is done at once: on a GPU all rows, on a CPU as many as its cache holds."""
    step = len(logits) if logits.is_cuda else max(1, CACHED // logits.shape[1])
    for at in range(start, stop, step):
        yield slice(at, min(at + step, stop))


def _by_id(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Tokens [n] of rows that are not cut."""
    number, temperature, _, _ = draws.unbind(-1)
    cumulative = torch.softmax(_scaled(logits, logits.amax(-1), temperature), -1).cumsum_(-1)
    token = _first_at_least(cumulative, (number * cumulative[:, -1]).clamp(min=_TINY))
    return token.clamp(max=logits.shape[1] - 1)


def _by_rank(logits: torch.Tensor, draws: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [n] of rows that are cut, and whether that is sure: it can be seen from the first ``count``."""
    number, temperature, top_k, top_p = draws.unbind(-1)
    values, ids = _ranked(logits, count)
    best = values[:, 0]
    weights = _scaled(values, best, temperature).exp_()
    weights = weights.where(torch.arange(count, device=logits.device) < top_k[:, None], 0.0)
    total = weights.sum(-1)  # top_p is a part of what top_k leaves
    if logits.is_cuda or bool((top_k > count).any()):  # on a GPU to ask is to wait
        total = total.where(top_k <= count, _scaled(logits, best, temperature).exp_().sum(-1))
    cumulative = (weights / total[:, None]).cumsum_(-1)
    # The smallest set that reaches it: the first token at which the sum does is in.
    last = torch.minimum(_first_at_least(cumulative, top_p), top_k.clamp(max=logits.shape[1]).long() - 1)
    sure = (last < count) & ((top_k <= count) | (top_k >= logits.shape[1]))
    last = last.clamp(max=count - 1)
    # Past the product only for a draw of 0, which must not pick a token of probability 0.
    target = (number * cumulative.gather(-1, last[:, None])[:, 0]).clamp(min=_TINY)
    rank = torch.minimum(_first_at_least(cumulative, target), last)[:, None]
    if count < logits.shape[1]:  # of those that are as likely as the last of them, others may be missing
        sure &= (values.gather(-1, rank) > values[:, -1:])[:, 0]
    return ids.gather(-1, rank)[:, 0], sure.long()


def _ranked(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` highest of each row and their ids, equal ones by id."""
    if count == logits.shape[1]:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values, ids
    ids = logits.topk(count).indices.sort(-1).values  # topk has no order among equal ones
    values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _scaled(logits: torch.Tensor, best: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """In float64, and less the best one, which stays finite however low the temperature."""
    return logits.to(torch.float64, copy=True).sub_(best[:, None]).div_(temperature[:, None])


def _first_at_least(ascending: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(ascending, value[:, None].contiguous())[:, 0]


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
