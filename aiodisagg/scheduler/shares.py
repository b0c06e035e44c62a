"""Whose turn it is: start-time fair queueing among tenants.

Theory. A tenant's *finish* is the service it has had, in seconds over its weight, on an axis that all share. Its
*start* is the later of that and the virtual time, which is the greatest start of anybody served; so whoever was away
comes back with the others and not with savings. The tenant of the smallest start is served, and its finish becomes its
start plus the cost over its weight. Between any two moments at which two tenants wait for the same thing all the time,
their services over their weights differ by at most one largest request of each (Goyal, Vin, Cheng 1996). The start does
not depend on which of its requests a tenant sends next, so that order is free: it is the one of
:mod:`~aiodisagg.scheduler.order`, which each line keeps.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection
from dataclasses import dataclass

from aiodisagg.errors import ConfigError
from aiodisagg.scheduler.order import Claim
from aiodisagg.scheduler.prices import NOTHING, Work

MAX_TENANTS = 1024
"""Tenants that are remembered while they have nothing here. Beyond, the one that had least is forgotten."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who shares the service. Twice the weight is twice the service while others wait."""

    name: str = "default"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("tenant", "needs a name")
        if not 0 < self.weight < float("inf"):
            raise ConfigError("weight", f"of tenant {self.name} must be a positive number, not {self.weight}")


@dataclass(slots=True, eq=False)
class Entry:
    """A request, from its arrival to its end. Times are on the caller's clock."""

    request_id: str
    flow: Flow
    has_media: bool
    priority: int
    work: Work
    arrived: float
    order: int
    deadline: float
    limit: float
    """When its first token must be here, or it is of no use: its deadline or the service's limit."""
    release_by: float = 0.0
    """Nobody who comes later in its line may delay it beyond this: it is due then."""
    service_s: float = 0.0
    """What it was predicted to cost when it came."""
    predicted_s: float | None = None
    """From its arrival to its first token, as it was predicted then; None: nothing was known."""
    released: float = -1.0
    ahead_s: float = 0.0
    """Work in its lane when it was released, itself included."""
    cost_s: float = 0.0
    """What it was charged for."""
    streams: bool = False

    @property
    def claim(self) -> Claim:
        return Claim(self.order, self.release_by, self.priority, self.service_s)


class Line:
    """The queue of one tenant for one lane, in the order of release, and the work in it."""

    __slots__ = ("entries", "work")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.work = NOTHING

    def insert(self, at: int, entry: Entry) -> None:
        self.entries.insert(at, entry)
        self.work += entry.work

    def remove(self, entry: Entry) -> None:
        self.entries.remove(entry)
        self.work -= entry.work


class Flow:
    """A tenant's requests and the service it has had."""

    __slots__ = ("finish", "lines", "name", "open", "weight")

    def __init__(self, tenant: Tenant) -> None:
        self.name, self.weight = tenant.name, tenant.weight
        self.finish = 0.0
        self.open = 0
        """Requests that have not ended."""
        self.lines = (Line(), Line())
        """By ``has_media``."""

    def __repr__(self) -> str:
        return f"<Flow {self.name} {self.waiting} waiting, {self.open} open, finish {self.finish:.3f}>"

    @property
    def waiting(self) -> int:
        return self.lines[0].work.requests + self.lines[1].work.requests


class Shares:
    """All tenants with something here, and some of those that had."""

    def __init__(self) -> None:
        self._flows: dict[str, Flow] = {}
        self._lined: tuple[dict[str, Flow], dict[str, Flow]] = ({}, {})
        """Those with somebody in line, by ``has_media``."""
        self._idle: list[tuple[float, str]] = []
        """Notes, least finish first. One is true as long as its flow is idle and has that finish."""
        self._open = 0
        self.virtual = 0.0

    def enter(self, tenant: Tenant) -> Flow:
        """The tenant's flow, with one more request open; the weight is the one given last."""
        flow = self._flows.get(tenant.name)
        if flow is None:
            flow = self._flows[tenant.name] = Flow(tenant)
        flow.weight = tenant.weight
        flow.open += 1
        self._open += 1
        return flow

    def leave(self, flow: Flow) -> None:
        """A request of the flow has ended. When all have, nobody owes anything."""
        flow.open -= 1
        self._open -= 1
        if not self._open:
            self.virtual = max(self.virtual, *(known.finish for known in self._flows.values()))
            self._flows.clear()
            self._idle.clear()
        elif not flow.open:
            self._remember(flow)

    def _remember(self, flow: Flow) -> None:
        bisect.insort(self._idle, (flow.finish, flow.name))
        if len(self._idle) > MAX_TENANTS:
            self._forget(len(self._idle) // 2)

    def _forget(self, count: int) -> None:
        """Those of ``count`` oldest notes that are still true."""
        for finish, name in self._idle[:count]:
            flow = self._flows.get(name)
            if flow is not None and not flow.open and flow.finish == finish:
                del self._flows[name]
        del self._idle[:count]

    def line_up(self, entry: Entry, at: int) -> None:
        """The entry waits from now on, behind ``at`` others of its tenant and lane."""
        entry.flow.lines[entry.has_media].insert(at, entry)
        self._lined[entry.has_media][entry.flow.name] = entry.flow

    def step_out(self, entry: Entry) -> None:
        """It does not wait any more."""
        line = entry.flow.lines[entry.has_media]
        line.remove(entry)
        if not line.entries:
            del self._lined[entry.has_media][entry.flow.name]

    def waiting(self, has_media: bool) -> Collection[Flow]:
        """Flows with somebody in line for this lane."""
        return self._lined[has_media].values()

    def start(self, flow: Flow) -> float:
        return max(self.virtual, flow.finish)

    def charge(self, flow: Flow, cost_s: float) -> None:
        """The flow is served now, for ``cost_s``."""
        self.virtual = start = self.start(flow)
        flow.finish = start + cost_s / flow.weight

    def others(self, flow: Flow, has_media: bool, ahead_s: float, price: Callable[[Work], float]) -> float:
        """Seconds of others' requests that go before what ``flow`` sends after ``ahead_s`` of its own."""
        mine = self.start(flow) + ahead_s / flow.weight
        found = 0.0
        for other in self.waiting(has_media):
            if other is not flow:
                theirs = max(0.0, (mine - self.start(other)) * other.weight)
                found += min(price(other.lines[has_media].work), theirs)
        return found
