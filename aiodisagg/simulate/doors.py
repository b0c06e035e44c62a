"""Who is let in, and in which order: the line in front of each language peer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec

from aiodisagg.simulate.clock import Clock
from aiodisagg.simulate.request import SimRequest


class Doors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``inside``: requests of a language peer at once, 0 for all. ``shed_at``: refuse at once who is predicted to wait
    for the first token longer than this multiple of the unloaded time; 0 for nobody."""

    inside: int = 0
    shed_at: float = 0.0


class Door:
    """First come, first served."""

    def __init__(self, doors: Doors, clock: Clock, begin: Callable[[SimRequest], None]) -> None:
        self._doors, self._clock, self._begin = doors, clock, begin
        self._queue: deque[SimRequest] = deque()
        self._inside = 0
        self.waiting_s = 0.0
        """Unloaded seconds of those in line."""

    def arrive(self, request: SimRequest, owed_s: float) -> bool:
        """False: shed. ``owed_s``: seconds of work ahead of it."""
        if self._doors.shed_at and owed_s + request.unloaded_s > self._doors.shed_at * request.unloaded_s:
            return False
        if self._doors.inside and self._inside >= self._doors.inside:
            self._queue.append(request)
            self.waiting_s += request.unloaded_s
        else:
            self._inside += 1
            self._begin(request)
        return True

    def left(self, request: SimRequest) -> None:
        """One who was inside is gone."""
        if self._queue:
            following = self._queue.popleft()
            self.waiting_s -= following.unloaded_s
            self._begin(following)
        else:
            self._inside -= 1


def open_doors(doors: Doors, clock: Clock, begin: Callable[[SimRequest], None]) -> Door:
    return Door(doors, clock, begin)
