"""When the rows that a prompt still waits for should be here, from when others came. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence


class Arrivals:
    """How a front has moved: (when, where to), to begin with and since then."""

    def __init__(self, now: float, front: int) -> None:
        self._begin = self._first = self._last = now, front

    def begins_at(self, front: int) -> None:
        """This much needs no rows; before anything has moved."""
        self._begin = self._first = self._last = self._begin[0], front

    def moved(self, front: int, now: float) -> None:
        if front > self._last[1]:
            self._last = now, front
            if self._first is self._begin or self._first[0] == now:
                self._first = self._last

    def expected(self, stops: Sequence[int], end: int, now: float) -> tuple[list[tuple[float, int]], float]:
        """The moves to come, (seconds from now, front), if they are as fast, in tokens, as those until now, and in how
        many seconds the next one will be late; nothing and infinity if nothing has moved yet, or all at once.

        What lies between moves says more than the first one, before which everything began. What comes may take half as
        long again before it is late; what is late takes as long again as since the last move.
        """
        (since, start), (last_at, last) = self._begin if self._first is self._last else self._first, self._last
        if last <= start or last_at <= since:
            return [], math.inf
        token_s = (last_at - since) / (last - start)
        left = [(last_at - now + token_s * (stop - last), stop) for stop in (*stops, end)]
        late_at = last_at + 1.5 * token_s * (left[0][1] - last)
        if now >= late_at:
            late_at = now + (now - last_at)
        if left[0][0] <= 0:
            later_s = late_at - now - left[0][0]
            left = [(seconds + later_s, stop) for seconds, stop in left]
        return left, late_at - now
