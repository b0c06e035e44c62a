"""RowReceiver: fetches items' rows from encode peers, whatever happens to links and peers; knows no engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType

from prometheus_client.core import Metric

from aiodisagg.device.copies import Accelerator, DeviceBytes
from aiodisagg.language.memory import RowMemory
from aiodisagg.language.peers import EncodePeers, LinkEvent
from aiodisagg.language.take import Taker
from aiodisagg.language.trace import Traces
from aiodisagg.link.hello import Hello, PeerRole
from aiodisagg.peer import metrics
from aiodisagg.peer.config import LanguageConfig
from aiodisagg.peer.driver import Driver, Tasks
from aiodisagg.peer.planes import Planes
from aiodisagg.protocol.blocks import BlockPool
from aiodisagg.protocol.events import (
    Fail,
    Finish,
    ItemCancelled,
    ItemRequested,
    ItemSpec,
    LeasesRevoked,
    LinkLost,
    LinkUp,
    MessageReceived,
    Place,
    Placed,
    ReceiverAction,
    ReceiverEvent,
    Revoke,
    RowsRefused,
    RowsTaken,
    Send,
    Take,
    TimerFired,
)
from aiodisagg.protocol.messages import ItemKey
from aiodisagg.protocol.receiving import Receiver, ReceiverConfig
from aiodisagg.protocol.rows import ModelFingerprint, RowLayout

logger = logging.getLogger(__name__)

Deliver = Callable[[ItemKey, int, memoryview | DeviceBytes], None]


@dataclass(slots=True)
class _Item:
    """An item under way, and where it was placed."""

    rows: int
    peer: str = ""


class RowReceiver:
    """An async context manager. Methods belong to the loop's thread.

    Args:
        model: what offers must match; gives the layout of rows.
        deliver: ``deliver(key, start, data)`` copies the packed rows from ``start`` on to where they belong. Called
            on the loop or on a thread, at most once for each row of an item, and perhaps once more after ``cancel``.
        ended: ``ended(key, None)`` when every row of the item was delivered, else with why it failed.
        traces: told about items that it knows.
        accelerator: where the rows are needed; ``deliver`` may get DeviceBytes, and is called on threads only.
    """

    def __init__(
        self, config: LanguageConfig, model: ModelFingerprint, *, name: str, deliver: Deliver,
        ended: Callable[[ItemKey, Fail | None], None], traces: Traces | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:  # fmt: skip
        self._accelerator = accelerator
        self.config, self.model, self.name = config, model, name
        self.layout = RowLayout.of(model)
        self._deliver_rows, self._ended = deliver, ended
        self.traces = traces if traces is not None else Traces()
        self.unplaced: dict[ItemKey, frozenset[str]] = {}
        """Items that wait for an encode peer."""
        self._items: dict[ItemKey, _Item] = {}
        self._revoking: dict[asyncio.Task[None], tuple[int, ...]] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> RowReceiver:
        try:
            return await self._open()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _open(self) -> RowReceiver:
        config, row_bytes = self.config, self.layout.row_bytes
        blocks = max(1, config.pool_bytes // (config.block_rows * row_bytes))
        self.pool = BlockPool(blocks, config.block_rows, row_bytes)
        memory = await asyncio.to_thread(RowMemory, self.pool.size_bytes, self._accelerator)
        self._stack.push_async_callback(asyncio.to_thread, memory.close)
        receiver_config = ReceiverConfig(
            failover_s=config.failover_s, stall_s=config.stall_s, window_blocks=config.window_blocks
        )
        self.receiver = Receiver(self.model, self.pool, receiver_config)
        self.driver: Driver[ReceiverEvent, ReceiverAction] = Driver(self.receiver, self._act, TimerFired)
        self._stack.callback(self.driver.close)
        self._taker = await self._stack.enter_async_context(
            Taker(memory, self._deliver, self._taken, checksum=config.checksum)
        )
        tls = config.tls.contexts() if config.tls is not None else None
        self.planes = Planes(config.transports, config.data_host, tls)
        self._stack.push_async_callback(self.planes.aclose)
        await self.planes.open(memory.arena, self.pool.admits, incarnation=config.incarnation)
        self._tasks = Tasks(f"{self.name} rows")
        self._stack.push_async_callback(self._tasks.aclose)
        hello = Hello.here(
            name=self.name,
            incarnation=config.incarnation,
            role=PeerRole.LANGUAGE,
            model=self.model,
            transports={**self.planes.describe(), **memory.describe()},
        )
        self.peers = EncodePeers(
            lambda: hello, self._heard, model=self.model, secret=config.secret, config=config.link,
            ssl=None if tls is None else tls[1],
        )  # fmt: skip
        self._stack.push_async_callback(self.peers.aclose)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for key in list(self._items):
            self.driver.feed(ItemCancelled(key))
        await self._stack.aclose()

    # -- items ---------------------------------------------------------------------------------------------------

    def request(self, key: ItemKey, spec: ItemSpec, timeout_s: float) -> None:
        """Asks for an item; ends in ``ended``, at the latest after ``timeout_s``, or in ``cancel``."""
        self._items[key] = _Item(spec.rows)
        self.driver.feed(ItemRequested(key, spec, timeout_s))

    def cancel(self, key: ItemKey) -> None:
        """Nobody waits for this item any more: ``ended`` is not called. Does nothing if it has ended."""
        if key in self._items:
            self.driver.feed(ItemCancelled(key))
            self._forget(key)

    # -- the machine's world -------------------------------------------------------------------------------------

    def _heard(self, event: LinkEvent) -> None:
        if isinstance(event, MessageReceived):
            self.traces.heard(event.message)
        self.driver.feed(event)
        if isinstance(event, LinkUp):
            for key, avoid in list(self.unplaced.items()):
                self._place(Place(key, avoid))
        elif isinstance(event, LinkLost):
            self._prune()

    def _act(self, action: ReceiverAction) -> None:
        match action:
            case Send(peer, message):
                self.peers.send(peer, message)
            case Place():
                self._place(action)
            case Take():
                self._taker.take(action)
            case Revoke(peer, leases):
                task = self._tasks.start(self._revoke(peer, leases), f"revoke {peer}")
                self._revoking[task] = leases
                task.add_done_callback(lambda done: self._revoking.pop(done, None))
            case Finish(key):
                self._forget(key)
                self._ended(key, None)
            case Fail(key, code):
                known = key in self._items
                self._forget(key)
                if known and code != "cancelled":
                    self._ended(key, action)

    def _place(self, action: Place) -> None:
        item = self._items.get(action.key)
        if item is None:
            self.unplaced.pop(action.key, None)
            return
        if item.peer:
            self._leave(action.key, item)
        peer = self.peers.choose(action.avoid)
        if peer is None:
            self.unplaced[action.key] = action.avoid
            return
        self.unplaced.pop(action.key, None)
        item.peer = peer.incarnation
        peer.items.add(action.key)
        peer.rows += item.rows
        self.traces.placed(action.key, peer.name)
        self.driver.feed(Placed(action.key, peer.incarnation))

    def _leave(self, key: ItemKey, item: _Item) -> None:
        for peer in self.peers.linked:
            if peer.incarnation == item.peer and key in peer.items:
                peer.items.discard(key)
                peer.rows -= item.rows
        item.peer = ""

    def _forget(self, key: ItemKey) -> None:
        item = self._items.pop(key, None)
        self.unplaced.pop(key, None)
        if item is not None:
            self._leave(key, item)
        self._prune()

    def _deliver(self, take: Take, data: memoryview | DeviceBytes) -> None:
        """On a taker's thread, or on the loop for small chunks."""
        if take.key in self._items:
            self._deliver_rows(take.key, take.chunk.start, data)

    def _taken(self, event: RowsTaken | RowsRefused) -> None:
        if isinstance(event, RowsTaken):
            rows = event.chunk.stop - event.chunk.start
            self.traces.arrived(event.key, rows, rows * self.layout.row_bytes)
        self.driver.feed(event)

    async def _revoke(self, peer: str, leases: tuple[int, ...]) -> None:
        await self.planes.revoke(peer, leases)
        self.driver.feed(LeasesRevoked(leases))

    def _prune(self) -> None:
        """The writer's own word came first: nobody has to wait for its end any more."""
        for task, leases in list(self._revoking.items()):
            if all(self.pool.get(lease) is None for lease in leases):
                task.cancel()

    def metrics(self) -> list[Metric]:
        pool = self.pool
        sent, received = self.peers.link_bytes
        return [
            metrics.byte_counters(self.receiver.counters),
            metrics.counter("link_sent_bytes", "Bytes of control links to encode peers.", sent),
            metrics.counter("link_received_bytes", "Bytes of control links from encode peers.", received),
            metrics.gauge("items_open", "Items asked for and not complete.", len(self.receiver.items)),
            metrics.gauge("items_unplaced", "Items that wait for an encode peer.", len(self.unplaced)),
            metrics.gauge("encode_peers_linked", "Encode peers with a link.", len(self.peers.linked)),
            metrics.gauge("pool_blocks", "Blocks of the receive pool.", pool.blocks),
            metrics.gauge("pool_blocks_free", "Blocks that can be lent.", pool.free),
            metrics.gauge("pool_blocks_quarantined", "Blocks of unfenced writers.", pool.quarantined),
        ]
