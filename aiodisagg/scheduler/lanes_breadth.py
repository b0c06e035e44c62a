"""How many requests at once a lane is worth: learned, because nobody else knows it.

Theory. Behind a lane may be one tower or forty, an engine that takes prompts one by one or thirty in a step. While it
does more the more it has at once, its latency stays what it is and the price of a request falls, so the seconds of work
in flight are that latency, however many are in flight (Little 1961). No bound in seconds finds out that more would be
better; a number that is tried does. One number is held, others are tried beside it, and they are compared by rounds:

* A *round* is what was done in a time that is long enough to have seen its requests through.
* The *worth* of more is d log(rate) / d log(number), of the number that was in fact in flight: 1 where requests do not
  disturb each other, 0 where they only wait for each other. More is worth it above ``_WORTH``.
* Trials go up and down in turn, and on in the same way while they succeed. One that goes up and is not put to the test,
  because too few come, goes on until it is; one that goes down ends then.
* After each failure in a row the next trial comes later. One upwards costs order: who comes meanwhile finds more ahead.
  One downwards costs throughput, and goes only below what was configured if first tokens are too late by their number.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from aiodisagg.scheduler.prices import Round, Work

_UP, _DOWN = 2, 1.5
_WORTH = 0.15
_TESTED = 0.2
"""Numbers are compared whose logarithms differ by this."""
_DOUBT = 1.0
"""Of the logarithm of a rate, from one request: twice what it is if their costs vary by half of their mean."""
_ROUNDS = 8
"""Of a number that are remembered, and of a trial at most."""
_FULL = 0.75
"""Part of a number that must be in flight, or too few come for it to matter."""
_REST = (2, 64)
"""Rounds between trials, at first and at most."""


class Breadth:
    """The number of requests that a lane lets through whatever they cost.

    Args:
        first: to begin with, and the least unless ``half_s`` says otherwise. most: the most, if above ``first``.
        window_s: a latency below it makes the number not matter.
        half_s: a latency above it is too much, so less than ``first`` is tried as well.
    """

    def __init__(self, first: int, most: int, window_s: float, half_s: float) -> None:
        self.limit = first
        self._first, self._most, self._window_s, self._half_s = first, max(first, most), window_s, half_s
        self._held = first
        self._base: deque[Round] = deque(maxlen=_ROUNDS)
        """The last rounds of the number that is held."""
        self._trial: list[Round] | None = None
        self._settles = False
        """The number has changed: this round has something of both."""
        self._up, self._rest, self._pause = True, 0, _REST[0]
        self._tried = False

    def __repr__(self) -> str:
        return f"<Breadth {self.limit}{'' if self._trial is None else f', tried instead of {self._held}'}>"

    def guess(self, price_s: float) -> None:
        """Before anything has been tried: as if requests were served one after another, each for ``price_s``."""
        if not self._tried and self._half_s < math.inf:
            self.limit = self._held = max(1, min(self._first, math.ceil(self._half_s / price_s)))

    def ended(self, latest: Round, price: Callable[[Work], float]) -> None:
        """A round is over; :attr:`limit` is for the next one. ``price``: what work is worth beside other work."""
        if self._settles:
            self._settles = False
        elif self._trial is not None:
            self._judge(self._trial, latest, price)
        elif latest.mean_latency_s < self._window_s or latest.number < _FULL * self.limit:
            self._base.clear()
        else:
            self._base.append(latest)
            self._rest -= 1
            if self._rest <= 0 and not self._begin():
                self._up = not self._up
                self._begin()

    def _begin(self) -> bool:
        """Tries another number, if there is one on this side."""
        held, least = self._held, 1 if _sum(self._base).mean_latency_s > self._half_s else self._first
        end = self._most if self._up else least
        to = min(held * _UP, end) if self._up else max(math.floor(held / _DOWN), end)
        if abs(math.log(to / end)) < _TESTED:  # else the end could not be told from it
            to = end
        if (to > held) is not self._up or abs(math.log(to / held)) < _TESTED:
            return False
        self.limit, self._trial, self._settles, self._tried = to, [], True, True
        return True

    def _judge(self, trial: list[Round], latest: Round, price: Callable[[Work], float]) -> None:
        base = _sum(self._base)
        changed = latest.number / base.number
        if self._up and changed < math.exp(_TESTED):
            return
        if not self._up and (changed > math.exp(-_TESTED) or latest.number < _FULL * self.limit):
            self._fail()
            return
        trial.append(latest)
        found = _sum(trial)
        faster = math.log(price(found.done) / found.took_s * base.took_s / price(base.done))
        wider = math.log(found.number / base.number)
        gain = faster - _WORTH * wider
        doubt = _DOUBT * math.sqrt(1 / base.done.requests + 1 / found.done.requests)
        unlikely = self._up and gain < 0 and len(trial) > 1
        if abs(gain) < doubt and len(trial) < _ROUNDS and not unlikely:
            return
        if gain > (doubt if self._up else 0.0):
            self._held, self._pause, self._trial = self.limit, _REST[0], None
            self._base = deque(trial, maxlen=_ROUNDS)
            if not self._begin():
                self._rest, self._up = self._pause, not self._up
        else:
            self._fail()

    def _fail(self) -> None:
        self.limit, self._trial, self._settles = self._held, None, True
        self._base.clear()
        self._rest, self._pause, self._up = self._pause, min(2 * self._pause, _REST[1]), not self._up


def _sum(rounds: deque[Round] | list[Round]) -> Round:
    return sum(rounds, Round())
