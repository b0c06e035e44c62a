"""Whose turn it is: start-time fair queueing among tenants, for each thing that they wait for.

Theory. A tenant has an account for each *queue* in which it waits: service in seconds over its weight, on an axis that
all who wait there share. Whoever joins begins at the queue's virtual time, or where it was, if that is later; so who
was away comes back with the others and not with savings. From then on its account grows by what it gets, and by nothing
else: whatever others get, nobody who waits loses credit. Whose account is least is served. The virtual time is what was
the least account when somebody was served last, and never goes back; so nobody who waits is before it.

While two tenants wait in one queue all the time, neither is served there while its account is above the other's. So
their services over their weights differ by what they differed when the later one came, and by one largest request of
the one that is ahead (Goyal, Vin, Cheng 1996). An account does not depend on which of its requests a tenant sends next,
so that order is free: it is the one of :mod:`~aiodisagg.scheduler.order`, which each line keeps.

There are three queues. A lane is one, and who waits there waits for the tower or for the engine. When there is room in
both lanes and one place left behind them, all wait for that, and so the *places* are the third. What a tenant gets is
charged in every queue that it waits in: one that has the engine to itself leaves the tower to others until they have as
much. But nobody gives way for ever for what no other wanted. What was not decided in a queue puts nobody further than
``DEBT_S`` beyond the last of the others there; and who does not wait in a lane owes it nothing for the other one.
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
DEBT_S = 10.0
"""Of service, over the weight."""
PLACES = 2
"""The queue behind both lanes; that of a lane has the number ``has_media``."""


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

    __slots__ = ("accounts", "lines", "name", "open", "weight")

    def __init__(self, tenant: Tenant) -> None:
        self.name, self.weight = tenant.name, tenant.weight
        self.accounts = [0.0, 0.0, 0.0]
        """By queue."""
        self.open = 0
        """Requests that have not ended."""
        self.lines = (Line(), Line())
        """By ``has_media``."""

    def __repr__(self) -> str:
        accounts = ", ".join(f"{account:.3f}" for account in self.accounts)
        return f"<Flow {self.name} {self.waiting} waiting, {self.open} open, had {accounts}>"

    @property
    def waiting(self) -> int:
        return self.lines[0].work.requests + self.lines[1].work.requests


class Queue:
    """Those that wait for one thing, and what they have had since they do."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.flows: dict[str, Flow] = {}
        self.virtual = 0.0

    def start(self, flow: Flow) -> float:
        """Where its next request begins on the axis."""
        return max(self.virtual, flow.accounts[self.number])

    def join(self, flow: Flow) -> None:
        """It waits from now on. No effect on one that does."""
        if flow.name not in self.flows:
            flow.accounts[self.number] = self.start(flow)
            self.flows[flow.name] = flow

    def leave(self, flow: Flow) -> None:
        del self.flows[flow.name]

    def first(self) -> Flow:
        """Whose turn it is. Somebody must wait."""
        return min(self.flows.values(), key=lambda flow: (flow.accounts[self.number], flow.name))

    def advance(self) -> None:
        """Somebody who waits is about to be served."""
        self.virtual = max(self.virtual, min(flow.accounts[self.number] for flow in self.flows.values()))

    def charge(self, flow: Flow, cost: float, *, decided: bool) -> None:
        """It has been given ``cost``; ``decided``: because of its account here."""
        before = self.start(flow)
        after = before + cost
        if not decided:
            others = [other.accounts[self.number] for other in self.flows.values() if other is not flow]
            after = min(after, max(before, DEBT_S + max(others, default=self.virtual)))
        flow.accounts[self.number] = after


class Shares:
    """All tenants with something here, and some of those that had."""

    def __init__(self) -> None:
        self._flows: dict[str, Flow] = {}
        self.queues = (Queue(False), Queue(True), Queue(PLACES))
        self._idle: list[tuple[float, str]] = []
        """Of each flow that has nothing here, and of no other, what it had; least first."""
        self._open = 0
        self.work = [NOTHING, NOTHING]
        """Of all that wait, by ``has_media``."""

    def enter(self, tenant: Tenant) -> Flow:
        """The tenant's flow, with one more request open; the weight is the one given last."""
        flow = self._flows.get(tenant.name)
        if flow is None:
            flow = self._flows[tenant.name] = Flow(tenant)
        elif not flow.open:
            del self._idle[bisect.bisect_left(self._idle, (flow.accounts[PLACES], flow.name))]
        flow.weight = tenant.weight
        flow.open += 1
        self._open += 1
        return flow

    def leave(self, flow: Flow) -> None:
        """A request of the flow has ended. When all have, nobody owes anything."""
        flow.open -= 1
        self._open -= 1
        if not self._open:
            for queue in self.queues:
                queue.virtual = max(queue.virtual, *(known.accounts[queue.number] for known in self._flows.values()))
            self._flows.clear()
            self._idle.clear()
        elif not flow.open:
            self._remember(flow)

    def _remember(self, flow: Flow) -> None:
        bisect.insort(self._idle, (flow.accounts[PLACES], flow.name))
        if len(self._idle) > MAX_TENANTS:
            _, least = self._idle.pop(0)
            del self._flows[least]

    def line_up(self, entry: Entry, at: int) -> None:
        """The entry waits from now on, behind ``at`` others of its tenant and lane."""
        entry.flow.lines[entry.has_media].insert(at, entry)
        self.work[entry.has_media] += entry.work
        for queue in (self.queues[entry.has_media], self.queues[PLACES]):
            queue.join(entry.flow)

    def step_out(self, entry: Entry) -> None:
        """It does not wait any more."""
        flow = entry.flow
        flow.lines[entry.has_media].remove(entry)
        self.work[entry.has_media] -= entry.work
        if not flow.lines[entry.has_media].entries:
            self.queues[entry.has_media].leave(flow)
        if not flow.waiting:
            self.queues[PLACES].leave(flow)

    def waiting(self, queue: int) -> Collection[Flow]:
        """Flows with somebody in this queue: in line for a lane, or, for the places, at all."""
        return self.queues[queue].flows.values()

    def serve(self, entry: Entry, decided: int) -> None:
        """The entry, which waits, is given what it costs, because it was its turn in this queue."""
        for queue in (self.queues[entry.has_media], self.queues[PLACES]):
            queue.advance()
        self.charge(entry, entry.cost_s, decided)

    def charge(self, entry: Entry, cost_s: float, decided: int) -> None:
        """The entry costs so much more than was charged for it."""
        flow = entry.flow
        for queue in self.queues:
            if queue.number in (entry.has_media, PLACES) or flow.name in queue.flows:
                queue.charge(flow, cost_s / flow.weight, decided=queue.number == decided)

    def others(self, flow: Flow, has_media: bool, ahead_s: float, price: Callable[[Work], float]) -> float:
        """Seconds of others' requests that go before what ``flow`` sends after ``ahead_s`` of its own."""
        queue = self.queues[has_media]
        mine = queue.start(flow) + ahead_s / flow.weight
        found = 0.0
        for other in queue.flows.values():
            theirs = (mine - queue.start(other)) * other.weight
            if theirs > 0 and other is not flow:
                found += min(price(other.lines[has_media].work), theirs)
        return found
