"""What a request costs the service, in seconds, learned from what it did.

Theory. The cost of a request is linear in what is known before anything is computed: the request itself, its prompt
tokens, its patches. Being linear, the cost of a queue is the price of the sum of its :class:`Work`.

Prices are marginal: the time by which a request delays those behind it while the service is saturated, whatever it
consists of (several encode peers, batches, a full engine). So they are learned from intervals between two first tokens
with somebody waiting all the time: the service has then done the work of the requests in between, in that time. The
latency of a request in an idle service is another matter, and no price; but as no service does more in a time than a
saturated one, what is done in any interval is reason to lower a price. Without that, a service that sheds because it
once was slow would never wait for anybody, and so never learn that it is fast again.

Learning is multiplicative: the logarithm of *taken / predicted* is shared among the three prices by their parts in the
prediction. Prices stay positive, one odd interval moves them by a bounded factor, and where the mix never changes their
ratios stay as they began. The first interval sets the scale at once: a slow machine may be a thousand times slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_BATCH = 8
"""Requests of one lesson; a single one says more about its neighbours than about itself."""
_GAIN = 0.3
_FIRST = (2e-3, 2e-5, 5e-6)
"""Seconds of a request, a token and a patch to begin with: their ratios are those of a 30B-A3B model."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a request asks for, or several: prompt tokens (visual ones included) and patches to be encoded."""

    tokens: int
    patches: int = 0
    requests: int = 1

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.patches + other.patches, self.requests + other.requests)

    def __sub__(self, other: Work) -> Work:
        return Work(self.tokens - other.tokens, self.patches - other.patches, self.requests - other.requests)


NOTHING = Work(0, 0, 0)


class Prices:
    """Seconds a request, a token, a patch. ``known``: learned from something, so that they are seconds indeed."""

    def __init__(self) -> None:
        self.known = False
        self.request_s, self.token_s, self.patch_s = _FIRST
        self._lessons = {True: (0.0, NOTHING), False: (0.0, NOTHING)}
        """What is not learned yet, by whether somebody waited all the time."""

    def __repr__(self) -> str:
        known = "" if self.known else " unknown"
        return f"<Prices{known} request {self.request_s:.3g} s, token {self.token_s:.3g} s, patch {self.patch_s:.3g} s>"

    def of(self, work: Work) -> float:
        """Seconds of service that ``work`` takes."""
        return work.requests * self.request_s + work.tokens * self.token_s + work.patches * self.patch_s

    def observe(self, took_s: float, done: Work, *, saturated: bool) -> None:
        """``done`` was done in ``took_s``; ``saturated``: with somebody waiting all the time."""
        took_s, done = took_s + self._lessons[saturated][0], done + self._lessons[saturated][1]
        if done.requests < _BATCH or took_s <= 0:
            self._lessons[saturated] = took_s, done
            return
        self._lessons[saturated] = 0.0, NOTHING
        if saturated or (self.known and took_s < self.of(done)):
            self._learn(took_s, done)

    def _learn(self, took_s: float, done: Work) -> None:
        predicted = self.of(done)
        wrong = math.log(took_s / predicted)
        parts = (done.requests * self.request_s, done.tokens * self.token_s, done.patches * self.patch_s)
        if self.known:
            squares = sum((part / predicted) ** 2 for part in parts)
            step = _GAIN * max(-1.0, min(1.0, wrong)) / squares
            factors = [math.exp(step * part / predicted) for part in parts]
        else:
            factors = [math.exp(wrong)] * 3
            self.known = True
        self.request_s *= factors[0]
        self.token_s *= factors[1]
        self.patch_s *= factors[2]
