"""Connections that have not proved themselves yet: how many are borne, and for how long. Every listener has this rule.

One too many ends the oldest, not the newest: silent strangers then cannot lock out somebody honest, who proves himself
at once. But a loop accepts a hundred connections before it reads one, and a proof comes a round trip later; so each is
left alone for ``GRACE_S``, up to ``MOST`` of them, or that many honest ones would end each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

MANY = 64
"""Strangers that had their time and are borne still."""
GRACE_S = 1.0
MOST = 1024
"""Of any age: a descriptor each."""

T = TypeVar("T", bound=Hashable)


class Strangers(Generic[T]):
    """Those of one listener. Belongs to the loop's thread.

    Args:
        limit_s: who has not proved itself in this time is sent away, however few they are.
        send_away: ends a connection; gets why.
    """

    def __init__(self, limit_s: float, send_away: Callable[[T, str], None]) -> None:
        self._limit_s, self._send_away = limit_s, send_away
        self._came: dict[T, float] = {}
        """When, oldest first."""
        self._timer: asyncio.TimerHandle | None = None
        self._crowded = False
        """What the timer waits for: an end of grace, not a limit."""

    def __len__(self) -> int:
        return len(self._came)

    def __contains__(self, one: object) -> bool:
        return one in self._came

    def add(self, one: T) -> None:
        self._came[one] = asyncio.get_running_loop().time()
        if self._timer is None or (len(self) > MANY and not self._crowded) or len(self) > MOST:
            self._look()

    def discard(self, one: T) -> bool:
        """It is no stranger any more, or gone; whether it was one."""
        was = self._came.pop(one, None) is not None
        if not self._came:
            self._forget_timer()
        return was

    def close(self) -> None:
        """Sends everybody away."""
        for one in list(self._came):
            self._end(one, "closed here")
        self._forget_timer()

    def _look(self) -> None:
        """Sends away who has to go, and comes back when the next one will."""
        self._forget_timer()
        loop = asyncio.get_running_loop()
        while self._came:
            oldest, came = next(iter(self._came.items()))
            self._crowded = len(self) > MANY
            due = came + min(self._limit_s, GRACE_S if self._crowded else self._limit_s)
            if due > loop.time() and len(self) <= MOST:
                self._timer = loop.call_at(due, self._look)
                return
            self._end(oldest, "too many that do not greet" if self._crowded else f"no greeting in {self._limit_s:g} s")

    def _end(self, one: T, why: str) -> None:
        del self._came[one]
        self._send_away(one, why)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
