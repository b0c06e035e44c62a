"""Virtual time: what happens next, and nothing else."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """Calls in the order of their times; equal times in the order in which they were asked for. Times in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._asked = 0
        self.stopped = False

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        """Calls ``call(*args)`` at ``when``, now if that is past. There is no way to take it back: a call that may
        be overtaken by events compares a version."""
        self._asked += 1
        heapq.heappush(self._heap, (max(when, self.now), self._asked, call, args))

    @property
    def waiting(self) -> int:
        """Calls that are to come."""
        return len(self._heap)

    def stop(self) -> None:
        """Nothing more happens."""
        self.stopped = True

    def run(self) -> None:
        """Until nothing is left, or :meth:`stop`."""
        heap = self._heap
        while heap and not self.stopped:
            self.now, _, call, args = heapq.heappop(heap)
            self.calls += 1
            call(*args)
