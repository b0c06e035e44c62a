"""What happened to a request, for people: stages, rows, bytes and times of each item. Bounded, never in the way."""

from __future__ import annotations

import heapq
import math
import time
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from aiodisagg.models.base import PlannedItem
from aiodisagg.protocol.messages import ItemKey, Message, Offer, Progress

MAX_FINISHED = 512
MAX_ITEMS = 32


class ItemTrace(msgspec.Struct):
    """One item. Times are seconds since the request came in; -1 until they happened."""

    kind: str
    rows: int
    digest: str
    stage: str = "planned"
    peers: list[str] = []
    rows_arrived: int = 0
    bytes_arrived: int = 0
    """What was sent for this item; less than its rows if it was shared or cached."""
    moves: int = 0
    """How often the item went to another peer."""
    hedged: str = ""
    """The peer that was asked as well, because the first was late."""
    rows_kept: int = 0
    """Rows that were already here at the last move and so were not sent again."""
    asked_s: float = -1.0
    encoded_s: float = -1.0
    complete_s: float = -1.0


class RequestTrace(msgspec.Struct):
    """One request."""

    request_id: str
    born: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    state: str = "planning"
    error: str = ""
    items: list[ItemTrace] = []
    """Of a request that has ended, and in what is shown, at most ``MAX_ITEMS`` of them: those that took longest."""
    item_count: int = 0
    """How many there were, known when the request has ended or is shown."""
    planned_s: float = -1.0
    admitted_s: float = -1.0
    first_token_s: float = -1.0
    total_s: float = -1.0

    @property
    def ended(self) -> bool:
        return self.total_s >= 0

    def since(self) -> float:
        return time.monotonic() - self.born


class Traces:
    """Open requests, and the last ``MAX_FINISHED`` finished ones without what few would read of them."""

    def __init__(self) -> None:
        self.open: dict[str, RequestTrace] = {}
        self._finished: OrderedDict[str, RequestTrace] = OrderedDict()
        self._items: dict[ItemKey, tuple[RequestTrace, ItemTrace]] = {}

    def begin(self, request_id: str) -> RequestTrace:
        trace = self.open[request_id] = RequestTrace(request_id, time.monotonic())
        return trace

    def item(self, trace: RequestTrace, key: ItemKey, planned: PlannedItem) -> None:
        item = ItemTrace(planned.kind.value, planned.rows, planned.digest, asked_s=trace.since())
        trace.items.append(item)
        self._items[key] = (trace, item)

    def placed(self, key: ItemKey, peer: str, *, hedge: bool = False) -> None:
        """Asked of a peer; ``hedge``: which is a second one, beside the first."""
        if (found := self._items.get(key)) is None:
            return
        item = found[1]
        if hedge:
            item.hedged = peer
            return
        if item.peers:
            item.moves += 1
            item.rows_kept = item.rows_arrived
        item.peers.append(peer)
        item.stage = "asked"

    def cached(self, key: ItemKey) -> None:
        """The item's rows were here."""
        if (found := self._items.get(key)) is not None:
            trace, item = found
            item.stage, item.rows_arrived, item.complete_s = "cached", item.rows, trace.since()

    def shared(self, key: ItemKey, first: ItemKey, rows: int) -> None:
        """``first`` asked for the same before, and has ``rows`` of it."""
        if (found := self._items.get(key)) is not None:
            item, other = found[1], self._items.get(first)
            item.stage, item.rows_arrived = "shared", rows
            item.peers = [] if other is None else other[1].peers[-1:]

    def heard(self, message: Message) -> None:
        """A sender's word about an item."""
        if not isinstance(message, Offer | Progress) or (found := self._items.get(message.key)) is None:
            return
        trace, item = found
        if isinstance(message, Progress):
            item.stage = message.stage
        if message.ready >= item.rows and item.encoded_s < 0:
            item.encoded_s = trace.since()

    def arrived(self, key: ItemKey, rows: int, size_bytes: int) -> None:
        if (found := self._items.get(key)) is None:
            return
        trace, item = found
        item.rows_arrived += rows
        item.bytes_arrived += size_bytes
        item.stage = "transferring"
        if item.rows_arrived >= item.rows:
            item.stage, item.complete_s = "complete", trace.since()

    def end(self, trace: RequestTrace, keys: list[ItemKey], state: str, error: str = "") -> None:
        trace.state, trace.error, trace.total_s = state, error, trace.since()
        trace.item_count, trace.items = len(trace.items), _longest(trace.items)
        for key in keys:
            self._items.pop(key, None)
        self.open.pop(trace.request_id, None)
        self._finished[trace.request_id] = trace
        while len(self._finished) > MAX_FINISHED:
            self._finished.popitem(last=False)

    def recent(self) -> list[RequestTrace]:
        """Finished ones first, oldest first, then the open ones, with at most ``MAX_ITEMS`` of each one's items."""
        return [*self._finished.values(), *map(_shown, self.open.values())]


def _shown(trace: RequestTrace) -> RequestTrace:
    return msgspec.structs.replace(trace, items=_longest(trace.items), item_count=len(trace.items))


def _longest(items: Sequence[ItemTrace]) -> list[ItemTrace]:
    """The ``MAX_ITEMS`` of them that came last or have not come yet, in the order of the prompt."""

    def lateness(index: int) -> float:
        item = items[index]
        waits = item.complete_s < 0 and item.stage != "reused"  # which needs no rows, so none come
        return math.inf if waits else item.complete_s

    if len(items) <= MAX_ITEMS:
        return list(items)
    return [items[index] for index in sorted(heapq.nlargest(MAX_ITEMS, range(len(items)), key=lateness))]
