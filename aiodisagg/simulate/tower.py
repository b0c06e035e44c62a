"""The encode side of a peer in virtual time: CPU threads prepare, the tower takes batches of a patch budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

from aiodisagg.encode.queue import TowerQueue
from aiodisagg.scheduler.advertise import ADVERTISED
from aiodisagg.scheduler.order import Order, Queue
from aiodisagg.scheduler.slack import Slack
from aiodisagg.scheduler.turns import tower_may_begin
from aiodisagg.simulate.clock import Clock
from aiodisagg.simulate.device import Lane
from aiodisagg.simulate.request import Item
from aiodisagg.simulate.times import Costs

if TYPE_CHECKING:
    from aiodisagg.simulate.engine import Engine

Rows = Callable[[Item], None]
Stage = Callable[[Item, str, float], None]

PREPARED_PATCHES = 32768
KEPT_ROWS = 1 << 17
STEPS_TO_FILL = 4
"""Steps after which a Slack account is as full as it gets: each earns a third of its bound or more."""


class Preparing:
    """``threads`` CPU threads, by the items' claims; ``room`` says whether more may be prepared now."""

    def __init__(self, clock: Clock, costs: Costs, done: Rows, room: Callable[[], bool]) -> None:
        self.clock, self.costs = clock, costs
        self._done, self._room = done, room
        self._free = costs.times.prepare_threads
        self._queue: Queue[Item] = Queue(Order.SHORT_FIRST)
        self._asked = 0
        self.waiting_s = 0.0
        """CPU seconds of what waits or is at work."""

    def add(self, item: Item) -> None:
        self._asked += 1
        item.asked = self._asked
        self._queue.add(item, item.claim)
        self.waiting_s += self.costs.prepare_s(item.patches)
        self.feed()

    def feed(self) -> None:
        while self._free and self._room() and (item := self._queue.first(self.clock.now)) is not None:
            self._queue.remove(item)
            spent = self.costs.prepare_s(item.patches)
            if not spent:
                self._done(item)
                continue
            self._free -= 1
            self.clock.at(self.clock.now + spent, self._prepared, item, spent)

    def _prepared(self, item: Item, spent: float) -> None:
        self._free += 1
        self.waiting_s -= spent
        self._done(item)
        self.feed()


class Tower:
    """As :class:`aiodisagg.encode.pipeline.EncodePipeline`: items are prepared, wait, and are encoded in batches.

    The real :class:`~aiodisagg.encode.queue.TowerQueue` fills batches; beside an engine the real
    :class:`~aiodisagg.scheduler.slack.Slack` says when the next one may begin. An identity that is being encoded, or
    whose rows are kept, is not encoded again: ``KEPT_ROWS`` bounds the latter.
    """

    def __init__(self, clock: Clock, costs: Costs, lane: Lane, *, slack: Slack | None = None) -> None:
        self.costs, self._clock, self._lane, self.slack = costs, clock, lane, slack
        self._queue = TowerQueue(costs.times.batch_patches)
        self._room = 2 * max(costs.times.batch_patches, PREPARED_PATCHES)
        self._preparing = Preparing(clock, costs, self._prepared, lambda: self._patches < self._room)
        self._patches = 0
        self._waiting: dict[int, list[tuple[Item, Rows]]] = {}
        self._kept: OrderedDict[int, int] = OrderedDict()
        self._free_rows = KEPT_ROWS
        self._began_s = 0.0
        self._ready: dict[int, Item] = {}
        self._at_work: list[Item] = []
        self.entered: Stage = lambda item, stage, elapsed_s: None
        """Told that an item entered a stage, and for how long it was in the one before."""
        self.waiting_patches = 0
        """Of what has been asked for and has no rows yet."""
        self._prepared_s: dict[int, float] = {}
        self.beside: Engine | None = None
        """The engine that shares the device, if they take turns."""
        self.lends: Callable[[], bool] = lambda: False
        """Whether a prompt waits for a step before which batches go: see :mod:`aiodisagg.encode.device`."""
        self.batches = 0
        self.encoded = 0
        self.hits = 0
        self.queued_s = 0.0
        """Tower seconds of what has been asked for and has no rows yet."""

    def newest(self) -> frozenset[int]:
        """What a heartbeat says of the identities whose rows are here."""
        return frozenset(islice(reversed(self._kept), ADVERTISED))

    @property
    def working(self) -> bool:
        """A batch is at work or could be."""
        return self._lane.busy or bool(self._queue)

    def oldest_s(self) -> float | None:
        """When the oldest request was let in that has an item at work or ready."""
        return min((item.request.begun_s for item in (*self._at_work, *self._ready.values())), default=None)

    def submit(self, item: Item, rows: Rows) -> None:
        """``rows(item)`` when all its rows exist."""
        if item.identity in self._kept:
            self._kept.move_to_end(item.identity)
            self.hits += 1
            rows(item)
        elif item.identity in self._waiting:
            self.hits += 1
            self._waiting[item.identity].append((item, rows))
        else:
            self._waiting[item.identity] = [(item, rows)]
            self.queued_s += self.costs.tower_s((item.patches,))
            self.waiting_patches += item.patches
            self._preparing.add(item)

    def stepped(self, step_s: float, decodes: int, steps: int) -> None:
        """The engine beside did so many steps, each of ``step_s``; 0 decodes: it has nobody to keep waiting."""
        if self.slack is not None:
            for _ in range(min(steps, STEPS_TO_FILL)):
                self.slack.stepped(step_s, decodes)
        self._next()

    def _tell(self, identity: int, stage: str, elapsed_s: float) -> None:
        for item, _ in self._waiting[identity]:
            self.entered(item, stage, elapsed_s)

    def _prepared(self, item: Item) -> None:
        self._prepared_s[item.identity] = self._clock.now
        self._tell(item.identity, "prepared", self.costs.prepare_s(item.patches))
        self._patches += item.patches
        self._ready[item.identity] = item
        self._queue.add(str(item.identity), item.claim, 1, item.patches)
        if not self._lane.busy:
            # In the same moment others may become ready: the batch is taken when all have been heard.
            self._clock.at(self._clock.now, self._next)

    def _next(self) -> None:
        first = None if self._lane.busy else self._queue.first(self._clock.now)
        if first is None:
            return
        head = self._ready[int(first)]
        if self.beside is not None and (
            not tower_may_begin(head.request.begun_s, self.beside.oldest_prefill_s())
            or self.beside.has_before(head.request)
        ):
            return
        if self.lends():
            return
        if self.slack is not None and not self.slack.free:
            self._lane.device.before_sharing()  # a leap of the engine would earn nothing before its end
            return
        pieces = self._queue.take(self._clock.now)
        patches = [piece.patches for piece in pieces]
        self._patches -= sum(patches)
        self.batches += 1
        self._began_s = self._clock.now
        identities = [int(piece.digest) for piece in pieces]
        self._at_work = [self._ready.pop(identity) for identity in identities]
        for item in self._at_work:
            if item.request.served_s < 0:
                item.request.served_s = self._clock.now
        for identity in identities:
            self._tell(identity, "encoding", self._clock.now - self._prepared_s.pop(identity))
        self._lane.device.batch_waited_s = 0.0
        self._lane.start(self.costs.tower_s(patches), lambda: self._encoded(identities))
        self._preparing.feed()

    def _encoded(self, identities: list[int]) -> None:
        if self.slack is not None:
            self.slack.spent(self._clock.now - self._began_s - self._lane.device.batch_waited_s)
        self._at_work = []
        spent_s = self._clock.now - self._began_s
        self._next()
        for identity in identities:
            item = self._waiting[identity][0][0]
            self.waiting_patches -= item.patches
            self._tell(identity, "encoded", spent_s)
            waiting = self._waiting.pop(identity)
            self.encoded += 1
            self.queued_s -= self.costs.tower_s((item.patches,))
            self._keep(item)
            for each, rows in waiting:
                rows(each)
        if self.beside is not None:
            self.beside.release()
        if not self._waiting:
            self.queued_s = 0.0  # sums of floats drift

    def _keep(self, item: Item) -> None:
        self._kept[item.identity] = item.rows
        self._free_rows -= item.rows
        while self._free_rows < 0 and self._kept:
            self._free_rows += self._kept.popitem(last=False)[1]
