"""What an item costs on a peer: a model of its three stages, calibrated by what really happens.

| stage | seconds | grows with |
|---|---|---|
| prepare | ``a + b * patches`` | decoding, resizing and cutting: one CPU thread |
| tower | ``a + b * patches + c * squares`` | the tower's layers, and its attention: each frame pair attends to itself |
| transfer | ``a + b * bytes`` | the round trip and the link |

A model starts from priors, is moved to a peer's self-test (:class:`ServiceTimes`) if there is one, and follows
observations. Fitting is least squares over relative shares with exponential forgetting; what data do not determine
is drawn towards *one* multiple of the priors, so that a machine seen ten times slower at one size is believed to be so
at all sizes. Coefficients are never negative, so costs are monotone in every size. An observation far outside the
usual spread is clipped: one page fault moves nothing, while a lasting change moves the model within a few items.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]

FORGET = 0.97
"""Weight of the past at each observation: the last thirty or so count."""
FORGET_CLIPPED = 0.6
"""The same when the observation had to be clipped: perhaps the past is of another machine."""
YOUNG = 6
"""So many observations forget as fast: what was before is a self-test, which may have been disturbed."""
CLIP = 3.0
"""Usual spreads that an observation may be away from its prediction."""
RIDGE = 0.01
"""Weight, in observations, of the pull towards one multiple of the priors."""
SWEEPS = 12
LEARNING = 0.1
"""Weight of the newest relative error in its mean."""
SHORTEST_S = 1e-9


@dataclass(frozen=True, slots=True)
class Size:
    """What the cost of an item depends on.

    ``squares``: the sum over frame pairs of the square of a frame pair's patches. ``size_bytes``: of its packed rows.
    """

    patches: int
    squares: int
    size_bytes: int = 0

    @classmethod
    def of(cls, grid_thw: tuple[int, int, int], size_bytes: int = 0) -> Size:
        """Of a grid in patches, before the merge."""
        t, h, w = grid_thw
        return cls(t * h * w, t * (h * w) ** 2, size_bytes)


class Timing(msgspec.Struct, frozen=True, array_like=True):
    """One measured run of a stage over ``patches`` patches; see :class:`Size`."""

    patches: Count
    squares: Count
    seconds: Seconds

    @classmethod
    def of(cls, grid_thw: tuple[int, int, int], seconds: float) -> Timing:
        size = Size.of(grid_thw)
        return cls(size.patches, size.squares, seconds)


class ServiceTimes(msgspec.Struct, frozen=True, array_like=True):
    """An encode peer's self-test: what it measured at its start, warm, one item at a time.

    Two sizes of each stage suffice: what they leave open is taken from the priors' proportions.
    """

    prepare: Annotated[tuple[Timing, ...], msgspec.Meta(max_length=8)] = ()
    tower: Annotated[tuple[Timing, ...], msgspec.Meta(max_length=8)] = ()
    prepare_threads: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    """How many items are prepared at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Coefficients of the stages, all above zero. Defaults: modelled times of an H200 for the tower of
    Qwen3-VL-30B-A3B, one CPU thread, a link of 2 GB/s. Wrong for most machines; the proportions are what counts.
    """

    prepare_s: float = 1e-3
    prepare_patch_s: float = 7e-6
    tower_s: float = 1e-3
    tower_patch_s: float = 2.16e-6
    tower_square_s: float = 2.54e-10
    transfer_s: float = 2e-4
    transfer_byte_s: float = 5e-10


class PrefillCosts(NamedTuple):
    """What prefill takes, as the engine has learned it: seconds of a step besides its tokens, of a prompt token, and of
    a query-key pair.

    ``error``: mean relative error of predicted steps with prompts, recent ones first, of ``observed`` ones.
    """

    step_s: float
    token_s: float
    pair_s: float = 0.0
    error: float = 0.0
    observed: int = 0


class Service(NamedTuple):
    """Predicted seconds of an item's stages on a peer that does nothing else.

    A tuple, as one is made for each item and candidate: frozen dataclasses take four times as long to make.
    """

    prepare_s: float
    tower_s: float
    transfer_s: float

    @property
    def total_s(self) -> float:
        return self.prepare_s + self.tower_s + self.transfer_s


class StageModel:
    """``seconds = sum(coefficient * feature)``, fitted on line; see the module's text.

    Args:
        priors: a coefficient for each feature, all above zero.
    """

    __slots__ = ("_cross", "_products", "_ratio", "_spread", "_weight", "coefficients", "error", "observed", "priors")

    def __init__(self, priors: Sequence[float]) -> None:
        if not priors or min(priors) <= 0:
            raise ValueError(f"priors must be above zero, not {priors}")
        self.priors = tuple(priors)
        self.coefficients = self.priors
        self.observed = 0
        self.error = 0.0
        """Mean of |predicted - observed| / the larger of both, recent ones first: 0 is exact, 1 is hopeless."""
        n = len(self.priors)
        self._products = [[0.0] * n for _ in range(n)]
        self._cross = [0.0] * n
        self._ratio = self._weight = 0.0
        self._spread = 1.0

    def predict(self, features: Sequence[float]) -> float:
        """Seconds; ``features`` in the order of the priors."""
        return sum(c * x for c, x in zip(self.coefficients, features, strict=True))

    def observe(self, features: Sequence[float], seconds: float) -> float:
        """Learns from one run of the stage; returns the relative error of what was predicted for it."""
        predicted = max(SHORTEST_S, self.predict(features))
        seconds = max(SHORTEST_S, seconds)
        high, low = max(seconds, predicted), min(seconds, predicted)
        error = (high - low) / high
        self.error += (error - self.error) * (LEARNING if self.observed else 1.0)
        self.observed += 1
        room = 1.0 + CLIP * self._spread
        clipped = min(max(seconds, predicted / room), predicted * room)
        self._spread += LEARNING * (min(high / low - 1.0, 4.0) - self._spread)
        usual = clipped == seconds and self.observed > YOUNG
        self._learn(features, clipped, FORGET if usual else FORGET_CLIPPED)
        return error

    def fit(self, runs: Iterable[tuple[Sequence[float], float]]) -> None:
        """Believes measurements as they are: a self-test. They are no predictions' test, so ``error`` stays."""
        for features, seconds in runs:
            self._learn(features, max(SHORTEST_S, seconds), 1.0)
            self._spread = 0.5

    def _learn(self, features: Sequence[float], seconds: float, forget: float) -> None:
        parts = [prior * x for prior, x in zip(self.priors, features, strict=True)]
        base = sum(parts)
        if base <= 0:
            return
        shares, ratio = [part / base for part in parts], seconds / base
        n = range(len(shares))
        self._weight = forget * self._weight + 1.0
        self._ratio = forget * self._ratio + ratio
        for i in n:
            self._cross[i] = forget * self._cross[i] + shares[i] * ratio
            row = self._products[i]
            for j in n:
                row[j] = forget * row[j] + shares[i] * shares[j]
        common = RIDGE * self._ratio / self._weight
        products, cross = self._products, self._cross
        if len(n) == 2:
            first, second = _two(products, cross, common)
            self.coefficients = (first * self.priors[0], second * self.priors[1])
            return
        multiples = [c / prior for c, prior in zip(self.coefficients, self.priors, strict=True)]
        for _ in range(SWEEPS):  # coordinate descent: convex, so it cannot go astray, and a bound at zero is one max()
            for i in n:
                row = products[i]
                rest = -row[i] * multiples[i]
                for j in n:
                    rest += row[j] * multiples[j]
                after = (cross[i] + common - rest) / (row[i] + RIDGE)
                multiples[i] = after if after > 0.0 else 0.0
        self.coefficients = tuple(m * prior for m, prior in zip(multiples, self.priors, strict=True))


def _two(products: Sequence[Sequence[float]], cross: Sequence[float], common: float) -> tuple[float, float]:
    """The same for two features, at once: most models have two, and each item teaches two of them."""
    (a, b), (_, d) = products
    a, d, left, right = a + RIDGE, d + RIDGE, cross[0] + common, cross[1] + common
    scale = a * d - b * b
    first, second = (d * left - b * right) / scale, (a * right - b * left) / scale
    if first < 0.0:  # the best within the bounds lies on the bound that was crossed; never both are
        return 0.0, right / d
    if second < 0.0:
        return left / a, 0.0
    return first, second


class PeerCosts:
    """The three stages of one peer, and its link, as one language peer sees them. Not thread-safe."""

    def __init__(self, rates: Rates | None = None) -> None:
        rates = rates or Rates()
        self.prepare_threads = 1
        self.prepare = StageModel((rates.prepare_s, rates.prepare_patch_s))
        self.tower = StageModel((rates.tower_s, rates.tower_patch_s, rates.tower_square_s))
        self.transfer = StageModel((rates.transfer_s, rates.transfer_byte_s))
        self.finish_error = 0.0
        """Mean relative error of predicted finishes, as ``StageModel.error``."""
        self.finishes = 0

    def believe(self, times: ServiceTimes) -> None:
        """Takes a self-test for what it is: measurements of this peer."""
        self.prepare_threads = times.prepare_threads
        self.prepare.fit(((1.0, t.patches), t.seconds) for t in times.prepare)
        self.tower.fit(((1.0, t.patches, t.squares), t.seconds) for t in times.tower)

    def predict(self, size: Size) -> Service:
        """Without any waiting."""
        patches = size.patches  # written out: this is what placing spends its time on
        item_s, patch_s = self.prepare.coefficients
        batch_s, row_s, square_s = self.tower.coefficients
        trip_s, byte_s = self.transfer.coefficients
        return Service(
            item_s + patch_s * patches,
            batch_s + row_s * patches + square_s * size.squares,
            trip_s + byte_s * size.size_bytes,
        )

    def prepared(self, size: Size, seconds: float) -> float:
        """``prepare`` of one item took this long. Returns the relative error, as all of these."""
        return self.prepare.observe((1.0, size.patches), seconds)

    def encoded(self, batch: Sequence[Size], seconds: float) -> float:
        """The tower took this long over these items together."""
        patches, squares = sum(size.patches for size in batch), sum(size.squares for size in batch)
        return self.tower.observe((1.0, patches, squares), seconds)

    def transferred(self, size_bytes: int, seconds: float) -> float:
        return self.transfer.observe((1.0, size_bytes), seconds)

    def finished(self, predicted_s: float, seconds: float) -> float:
        """An item was complete this long after it was asked for; changes nothing but the error's mean."""
        high = max(predicted_s, seconds, SHORTEST_S)
        error = abs(predicted_s - seconds) / high
        self.finish_error += (error - self.finish_error) * (LEARNING if self.finishes else 1.0)
        self.finishes += 1
        return error
