"""When each of a machine's items wants TimerFired."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

K = TypeVar("K")

SPARE = 64
"""So many entries of a heap may be dead, however few are alive."""


class Timers(Generic[K]):
    """One time by key, the earliest first; keys of the same time come in their own order.

    A heap cannot give up an entry in its middle, so what is armed anew or disarmed leaves a dead one there. Most items
    are over long before the deadline that they were armed for: the heap is built anew when most of it is dead.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, K]] = []
        self._armed: dict[K, float] = {}

    def arm(self, key: K, when: float) -> None:
        """Sets the time of ``key``, in place of an earlier one."""
        if self._armed.get(key) != when:
            self._armed[key] = when
            heapq.heappush(self._heap, (when, key))
            self._tidy()

    def disarm(self, key: K) -> None:
        """Does nothing if it has no time."""
        if self._armed.pop(key, None) is not None:
            self._tidy()

    def next(self) -> float | None:
        """The earliest time; None: nothing is armed."""
        while self._heap and self._armed.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, now: float) -> K | None:
        """Disarms the first whose time has come and returns it; None if there is none."""
        due = self.next()
        if due is None or due > now:
            return None
        key = heapq.heappop(self._heap)[1]
        self.disarm(key)
        return key

    def _tidy(self) -> None:
        if len(self._heap) > 2 * len(self._armed) + SPARE:
            self._heap = [(when, key) for key, when in self._armed.items()]
            heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._armed)

    def __contains__(self, key: object) -> bool:
        return key in self._armed

    def __repr__(self) -> str:
        return f"<Timers {len(self._armed)} armed, next {self.next()}>"
