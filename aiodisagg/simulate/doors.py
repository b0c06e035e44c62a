"""Who is let in, and in which order: the line in front of each language peer."""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from aiodisagg.errors import ConfigError
from aiodisagg.scheduler.admission import (
    AdmissionConfig,
    AdmissionQueue,
    Arrived,
    Decision,
    Ended,
    Expire,
    FirstToken,
    Release,
    Shed,
    TimerFired,
)
from aiodisagg.scheduler.order import Order
from aiodisagg.scheduler.prices import Work
from aiodisagg.scheduler.shares import Tenant
from aiodisagg.simulate.clock import Clock
from aiodisagg.simulate.request import SimRequest

Tell = Callable[[SimRequest], None]


class Line(enum.StrEnum):
    """Where those wait who are not let in."""

    ARRIVAL = "arrival"
    """In one line, whatever they want."""
    ADMISSION = "admission"
    """As the services do: :class:`aiodisagg.scheduler.admission.AdmissionQueue`."""


class Doors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How requests are let in to each language peer.

    ``inside``: requests at once, 0 for as many as come (arrival) or as the engine runs (admission). ``shed_at``, of
    the admission queue: a deadline for first tokens, as a multiple of the request's unloaded time, and so the queue
    refuses those that are predicted, or have become, later; 0: nobody.
    ``order`` and ``max_wait_s``, as in :class:`~aiodisagg.scheduler.admission.AdmissionConfig`, hold inside of the
    engine as well. What else that has is as it is by itself.
    """

    line: Line = Line.ARRIVAL
    order: Order = Order.SHORT_FIRST
    inside: int = 0
    shed_at: float = 0.0
    max_wait_s: float = 10.0

    def check(self) -> None:
        """Raises ConfigError."""
        if self.inside < 0 or self.shed_at < 0:
            raise ConfigError("doors", f"{self} is out of range")
        if self.shed_at and self.line is not Line.ADMISSION:
            raise ConfigError("doors", "shed_at needs the admission queue")
        self.admission()

    def admission(self) -> AdmissionConfig:
        """Raises ConfigError."""
        return AdmissionConfig(max_wait_s=self.max_wait_s, order=self.order)


class Door(Protocol):
    """Each arrival ends in ``begin`` or ``refuse``, at once or later; who was begun leaves once."""

    waiting_s: float
    """Unloaded seconds of those in line."""

    def arrive(self, request: SimRequest) -> None:
        """It has been sent here."""

    def first(self, request: SimRequest) -> None:
        """It has its first token."""

    def left(self, request: SimRequest) -> None:
        """It has all of them."""


def open_door(doors: Doors, clock: Clock, begin: Tell, refuse: Tell, *, runs: int) -> Door:
    """``runs``: requests that the engine behind it runs at once."""
    if doors.line is Line.ADMISSION:
        return QueueDoor(doors, clock, begin, refuse, runs)
    return LineDoor(doors.inside, begin)


class LineDoor:
    """First come, first served; all of them."""

    def __init__(self, most: int, begin: Tell) -> None:
        self._most, self._begin = most, begin
        self._queue: deque[SimRequest] = deque()
        self._inside = 0
        self.waiting_s = 0.0

    def arrive(self, request: SimRequest) -> None:
        if self._most and self._inside >= self._most:
            self._queue.append(request)
            self.waiting_s += request.unloaded_s
        else:
            self._inside += 1
            self._begin(request)

    def first(self, request: SimRequest) -> None:
        pass

    def left(self, request: SimRequest) -> None:
        self._inside -= 1
        if self._queue:
            following = self._queue.popleft()
            self.waiting_s -= following.unloaded_s
            self._inside += 1
            self._begin(following)


class QueueDoor:
    """The services' queue: lanes, fair shares of tenants, aging, predicted first tokens."""

    def __init__(self, doors: Doors, clock: Clock, begin: Tell, refuse: Tell, runs: int) -> None:
        self._doors, self._clock, self._begin, self._refuse = doors, clock, begin, refuse
        self._queue = AdmissionQueue(doors.admission(), doors.inside or runs)
        self._here: dict[str, SimRequest] = {}
        self._armed: float | None = None
        self.waiting_s = 0.0

    def arrive(self, request: SimRequest) -> None:
        source, now = request.source, self._clock.now
        work = Work(request.prompt, sum(item.patches for item in request.items))
        shed_at = self._doors.shed_at  # of the time since it was sent, not since it was planned
        deadline = source.arrival_s + shed_at * request.unloaded_s if shed_at else math.inf
        self._here[request.name] = request
        self.waiting_s += request.unloaded_s
        tenant = Tenant(source.tenant or "default")
        self._act(self._queue.handle(Arrived(request.name, work, tenant, source.priority, deadline), now))

    def first(self, request: SimRequest) -> None:
        self._act(self._queue.handle(FirstToken(request.name), self._clock.now))

    def left(self, request: SimRequest) -> None:
        self._act(self._queue.handle(Ended(request.name, request.generated), self._clock.now))

    def _act(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Release | Shed | Expire):
                request = self._here.pop(decision.request_id)
                self.waiting_s -= request.unloaded_s
                (self._begin if isinstance(decision, Release) else self._refuse)(request)
        due = self._queue.next_timer()
        if due is not None and (self._armed is None or due < self._armed):
            self._armed = due
            self._clock.at(due, self._fire, due)

    def _fire(self, due: float) -> None:
        if due == self._armed:
            self._armed = None
            self._act(self._queue.handle(TimerFired(), self._clock.now))
