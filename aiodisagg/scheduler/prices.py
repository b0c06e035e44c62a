"""What a request costs the service, in seconds, learned from what it did.

Theory. The cost of a request is linear in what is known before anything is computed: the request itself, its prompt
tokens, its patches. Being linear, the cost of a queue is the price of the sum of its :class:`Work`.

Prices are marginal: the time by which a request delays those behind it while the service is saturated, whatever it
consists of (several encode peers, batches, a full engine). So they are learned from intervals between two first tokens
with somebody waiting all the time: the service has then done the work of the requests in between, in that time. The
latency of a request in an idle service is another matter, and no price; but as no service does more in a time than a
saturated one, what is done in any interval is reason to lower a price, if it is more than chance. Without that, a
service that sheds because it once was slow would never wait for anybody, and so never learn that it is fast again; and
were chance a reason, each lucky interval of an idle service would lower prices that no unlucky one can raise.

A lesson is a *round* of such intervals, long enough to have seen its requests through: no shorter than their mean time
from release to first token. One step of an engine may bring many first tokens within a millisecond: a lesson of these
alone would say that they cost nothing, one of a whole step and few of its tokens that they cost much, and no average of
such lessons is right.

Learning is multiplicative: the logarithm of *taken / predicted* is shared among the three prices by their parts in the
prediction. Prices stay positive, one odd lesson moves them by a bounded factor, and where the mix never changes their
ratios stay as they began. The first lesson sets the scale at once: a slow machine may be a thousand times slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_BATCH = 8
"""The fewest requests of a round; a single one says more about its neighbours than about itself."""
_GAIN = 0.3
_CHANCE = 2.0
"""What the logarithm of the cost of one request may be off by chance; that of n, by the square root of n less."""
_MEMORY = 1024
"""Requests that are looked at together for that, at most."""
_FIRST = (2e-3, 2e-5, 5e-6)
"""Seconds of a request, a token and a patch to begin with: their ratios are those of a 30B-A3B model."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done for a request, or several: prompt tokens to be computed (visual ones included) and patches to
    be encoded; what is held of a prompt costs nothing."""

    tokens: int
    patches: int = 0
    requests: int = 1

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.patches + other.patches, self.requests + other.requests)

    def __sub__(self, other: Work) -> Work:
        return Work(self.tokens - other.tokens, self.patches - other.patches, self.requests - other.requests)


NOTHING = Work(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Round:
    """What was done in some time; ``latency_s``: from release to first token, of all its requests together."""

    took_s: float = 0.0
    done: Work = NOTHING
    latency_s: float = 0.0

    def __add__(self, other: Round) -> Round:
        return Round(self.took_s + other.took_s, self.done + other.done, self.latency_s + other.latency_s)

    @property
    def is_whole(self) -> bool:
        """Whether it has enough requests, and has seen them through."""
        count = self.done.requests
        return count >= _BATCH and self.took_s > 0 and self.latency_s <= self.took_s * count

    @property
    def number(self) -> float:
        """Requests in flight on the average, by Little's law."""
        return self.latency_s / self.took_s

    @property
    def mean_latency_s(self) -> float:
        return self.latency_s / self.done.requests


class Prices:
    """Seconds a request, a token, a patch. ``known``: learned from something, so that they are seconds indeed."""

    def __init__(self) -> None:
        self.known = False
        self.request_s, self.token_s, self.patch_s = _FIRST
        self._idle = Round()
        """What was done since with nobody waiting; so that a price that is little too high is found out, as well."""

    def __repr__(self) -> str:
        known = "" if self.known else " unknown"
        return f"<Prices{known} request {self.request_s:.3g} s, token {self.token_s:.3g} s, patch {self.patch_s:.3g} s>"

    def of(self, work: Work) -> float:
        """Seconds of service that ``work`` takes."""
        return work.requests * self.request_s + work.tokens * self.token_s + work.patches * self.patch_s

    def observe(self, latest: Round, *, saturated: bool) -> None:
        """A whole round is over. ``saturated``: with somebody waiting all the time."""
        if saturated:
            self._idle = Round()
            self._learn(latest.took_s, latest.done, _GAIN)
            return
        if latest.took_s > self.of(latest.done) * _luck(latest.done):
            return  # too little came, and what that took says nothing
        self._idle = latest if self._idle.done.requests >= _MEMORY else self._idle + latest
        most_s = self._idle.took_s * _luck(self._idle.done)
        if most_s < self.of(self._idle.done) and self.known:
            self._learn(most_s, self._idle.done, 1.0)

    def _learn(self, took_s: float, done: Work, gain: float) -> None:
        predicted = self.of(done)
        wrong = math.log(took_s / predicted)
        parts = (done.requests * self.request_s, done.tokens * self.token_s, done.patches * self.patch_s)
        if self.known:
            squares = sum((part / predicted) ** 2 for part in parts)
            step = gain * max(-1.0, min(1.0, wrong)) / squares
            factors = [math.exp(step * part / predicted) for part in parts]
        else:
            factors = [math.exp(wrong)] * 3
            self.known = True
        self.request_s *= factors[0]
        self.token_s *= factors[1]
        self.patch_s *= factors[2]


def _luck(done: Work) -> float:
    """By which factor chance may change what it takes."""
    return math.exp(_CHANCE / math.sqrt(done.requests))
