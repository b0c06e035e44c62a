"""How long a step takes, learned from steps, and how much prefill one can hold for streams to keep their pace. Pure.

A step's time is modelled as ``c0 + c1 * decodes + c2 * context + c3 * prefill + c4 * attention + c5 * reads``: reading
the weights, each decode and the keys and values it reads, each prompt token, the query-key pairs of the prompt's
attention, and what is read of a mixture's experts. The six are fitted to the steps seen, by least squares of relative
errors with no coefficient below zero (a step does not get faster by doing more). Steps with and without prefill are
remembered apart, so a long stretch of decodes does not make the cost of a prompt forgotten. Old steps fade: what the
machine does besides may change.

What is read of experts no line describes: a few decodes read a few, and some dozen tokens of a prompt nearly all. It
follows from the number of tokens (:class:`Reads`), and how long reading all takes is measured at the start. ``c5``, at
most 1, is what it costs on top of the rest: it is read while others are computed with, and the tokens of one prompt may
choose less differently than by chance.

The budget is kept as far as decodes leave it: **a step may take the budget, or one and a half times what it takes
before its first prompt token if that is more**, so prompt tokens always get at least a third of the time, and a budget
that such steps cannot keep does not make them so small that prompts pile up. And a step may not take more than
twice the prefill that has been tried before: what has never been measured is approached, not believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import TYPE_CHECKING

from aiodisagg.scheduler import pieces
from aiodisagg.scheduler.cost import PrefillCosts

if TYPE_CHECKING:
    from aiodisagg.engine.schedule import Segment

_FADE = 0.9
"""Weight of a step after the next of its kind."""
_FIRST = 64
"""Prompt tokens that may always be tried."""
_LEAST = 0.5
"""Of what a step takes before its first prompt token, for prompt tokens at least."""
_OUTLIER = 4.0
"""A step that took this many times what was expected counts as this many times: something else held it up."""
_SETTLED = 8
"""Steps of a kind before outliers can be told."""
_REFIT = 16
"""Steps between fits while there is nothing to decide: a fit takes as long as a few hundred additions in Python."""
_LEARNING = 0.1
"""Weight of the newest relative error in its mean."""
_ORDER = (4, 3, 2, 1, 5, 0)
_SWEEPS = 100
_SETTLES = 1e-3
"""Fitting ends when no cost changes what it explains by more than about this part of it."""


@dataclass(frozen=True, slots=True)
class Reads:
    """Reading experts: ``all_s`` seconds for all of them, of which one token reads the part ``of_token``.

    Tokens choose as if by chance, so ``n`` of them read the part ``1 - (1 - of_token)**n``.
    """

    all_s: float = 0.0
    of_token: float = 1.0

    def seconds(self, tokens: int) -> float:
        return self.all_s * (1.0 - (1.0 - self.of_token) ** tokens)


NO_READS = Reads()


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computes, as far as its time depends on it."""

    decodes: int = 0
    context: int = 0
    """Keys that its decodes read, over all of them."""
    prefill: int = 0
    """Prompt tokens."""
    attention: float = 0.0
    """Query-key pairs of the prompt tokens."""

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> StepShape:
        decodes = context = prefill = 0
        attention = 0.0
        for segment in segments:
            if segment.tokens == 1:
                decodes += 1
                context += segment.stop
            else:
                prefill += segment.tokens
                attention += segment.tokens * (segment.start + segment.stop) / 2
        return cls(decodes, context, prefill, attention)


class _Memory:
    """The sums that least squares needs, of steps of one kind."""

    def __init__(self) -> None:
        self.steps = 0
        self.products = [[0.0] * 6 for _ in range(6)]
        self.targets = [0.0] * 6

    def add(self, terms: tuple[float, ...], seconds: float, scale: float) -> None:
        """Counts the error relative to ``scale``."""
        self.steps += 1
        weight = 1.0 / max(scale, 1e-6) ** 2
        for i, a in enumerate(terms):
            self.targets[i] = _FADE * self.targets[i] + weight * a * seconds
            row = self.products[i]
            for j, b in enumerate(terms):
                row[j] = _FADE * row[j] + weight * a * b


class Pace:
    """Step times so far, and the prefill that fits beside decodes.

    ``budget_s``: of a step, and so between tokens. ``reads``: what a step takes for reading experts.
    """

    def __init__(self, budget_s: float, reads: Reads = NO_READS) -> None:
        self.budget_s, self.reads = budget_s, reads
        self._memories = {False: _Memory(), True: _Memory()}
        self._costs = [*[0.0] * 5, 1.0]
        self._unfitted = 0  # steps since the last fit
        self._tried = self._error = 0.0

    def __repr__(self) -> str:
        costs = ", ".join(f"{cost:.2e}" for cost in self._fitted())
        return f"<Pace {self.budget_s * 1e3:g} ms; s per step, decode, 1k context, token, 1M pairs; of reads: {costs}>"

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape took so long."""
        memory = self._memories[shape.prefill > 0]
        if shape.prefill and memory.steps:
            expected = self.expect(shape)
            error = abs(expected - seconds) / max(expected, seconds, 1e-9)
            self._error += (error - self._error) * max(_LEARNING, 1 / memory.steps)
        scale = seconds
        if memory.steps >= _SETTLED:
            # Relative to what was expected: else a machine that got slower would long be judged by its fast steps.
            scale = max(self._sum(shape, self._fitted(min(_REFIT, memory.steps - _SETTLED))), 1e-6)
            seconds = min(seconds, _OUTLIER * scale)
        memory.add(self._terms(shape), seconds, scale)
        self._tried = max(float(shape.prefill), _FADE * self._tried if shape.prefill else self._tried)
        self._unfitted += 1

    def expect(self, shape: StepShape) -> float:
        """Seconds that a step of this shape should take."""
        return self._sum(shape, self._fitted())

    def _terms(self, shape: StepShape) -> tuple[float, ...]:
        reads_s = self.reads.seconds(shape.decodes + shape.prefill)
        decodes, context = float(shape.decodes), shape.context / 1e3
        return 1.0, decodes, context, float(shape.prefill), shape.attention / 1e6, reads_s

    def _sum(self, shape: StepShape, costs: list[float]) -> float:
        return sum(cost * term for cost, term in zip(costs, self._terms(shape), strict=True))

    def prefill_costs(self) -> PrefillCosts | None:
        """None after too few steps to tell."""
        if (observed := self._memories[True].steps) < _SETTLED:
            return None
        step_s, token, pair = self._prefill()
        return PrefillCosts(step_s, token, pair / 1e6, self._error, observed)

    def _prefill(self) -> tuple[float, float, float]:
        """Seconds of a step besides its prompt tokens, of a token, and of a million pairs."""
        fixed, _, _, token, pair, read = self._fitted()
        return fixed + read * self.reads.all_s, token, pair

    def begins(self, start: int, ready: int, later: Sequence[tuple[float, int]]) -> bool:
        """Whether a step for the tokens ``[start, ready)`` of a prompt alone, of which more come, should begin at once.

        ``later``: (seconds from now, tokens that can be computed by then) until all can; empty: nobody knows, then a
        step must cost less than its tokens.
        """
        step_s, token, pair = self._prefill()
        bounds = [start, ready, *(stop for _, stop in later)]

        def cost_s(i: int, k: int) -> float:
            tokens, middle = bounds[k] - bounds[i], (bounds[i] + bounds[k]) / 2e6
            return step_s + tokens * (token + pair * middle)

        if not later:
            return cost_s(0, 1) >= 2 * step_s
        return pieces.plan([0.0, *(seconds for seconds, _ in later)], cost_s)[0] <= 0.0

    def prefill_beside(self, decodes: StepShape, start: int, most: int) -> int:
        """Prompt tokens, at least 1 and at most ``most``, for a step with these decodes.

        ``start``: tokens before the first of them, of the request that has most.
        """
        before = self._sum(decodes, self._fitted())
        if self.reads.all_s:  # with prompt tokens it reads all of them
            before += self._costs[5] * (self.reads.all_s - self.reads.seconds(decodes.decodes))
        return self._fit_into(max(self.budget_s - before, _LEAST * before), start, most)

    def prefill_after(self, step: StepShape, start: int, most: int) -> int:
        """Prompt tokens, at most ``most``, for which this step takes twice as long; ``start`` as above."""
        return min(most, self._fit_into(self.expect(step), start, most))

    def _fit_into(self, room: float, start: int, most: int) -> int:
        _, token, pair = self._prefill()
        linear, square = token + pair * start / 1e6, pair / 2e6
        # The positive root of square * n**2 + linear * n = room, in the form that does not divide by a small square.
        below = linear + sqrt(linear * linear + 4 * square * room)
        fits = 2 * room / below if below > 0 else inf
        return max(1, int(min(fits, max(_FIRST, 2 * self._tried), most)))

    def _fitted(self, patience: int = 0) -> list[float]:
        if self._unfitted > patience:
            self._fit()
            self._unfitted = 0
        return self._costs

    def _fit(self) -> None:
        """Coordinate descent from the last fit: each cost in turn takes its best value that is not negative.

        Attention and tokens come first and what a step costs besides last: as long as a few steps leave it open what
        took the time, more prefill is thought to take more of it.
        """
        a, b = self._memories.values()
        products = [[x + y for x, y in zip(p, q, strict=True)] for p, q in zip(a.products, b.products, strict=True)]
        targets = [x + y for x, y in zip(a.targets, b.targets, strict=True)]
        costs = self._costs
        for _ in range(_SWEEPS):
            moved = 0.0
            for i in _ORDER:
                row = products[i]
                if row[i] > 0:
                    error = targets[i] - sum(c * p for c, p in zip(costs, row, strict=True))
                    before, costs[i] = costs[i], max(0.0, costs[i] + error / row[i])
                    if i == 5:
                        costs[i] = min(costs[i], 1.0)
                    moved = max(moved, abs(costs[i] - before) * sqrt(row[i]))
            if moved < _SETTLES:
                return
