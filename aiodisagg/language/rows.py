"""RowReceiver: fetches items' rows from encode peers, whatever happens to links and peers; knows no engine."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence

from prometheus_client.core import Metric

from aiodisagg.bootstrap.client import MembershipChange
from aiodisagg.device.copies import Accelerator, DeviceBytes
from aiodisagg.errors import ConfigError
from aiodisagg.language.errands import Errand
from aiodisagg.language.memory import RowMemory, receive_pool
from aiodisagg.language.peers import EncodePeers, LinkEvent
from aiodisagg.language.placing import Placing
from aiodisagg.language.sharing import Sharing
from aiodisagg.language.take import Taker
from aiodisagg.language.trace import Traces
from aiodisagg.link.hello import Hello, PeerRole
from aiodisagg.peer import metrics
from aiodisagg.peer.config import LanguageConfig
from aiodisagg.peer.driver import Driver, Tasks
from aiodisagg.peer.once import EnteredOnce
from aiodisagg.peer.planes import Planes
from aiodisagg.protocol.events import (
    Fail,
    Finish,
    ItemCancelled,
    ItemHurried,
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
from aiodisagg.protocol.messages import FOREVER_S, ItemKey, Refuse, Want
from aiodisagg.protocol.receiving import Receiver, ReceiverConfig
from aiodisagg.protocol.rows import ModelFingerprint, RowLayout
from aiodisagg.scheduler.health import HealthConfig

logger = logging.getLogger(__name__)

Deliver = Callable[[ItemKey, int, memoryview | DeviceBytes], None]


async def _close(making: asyncio.Task[RowMemory]) -> None:
    """Closes what is made, or would be: also for somebody who is cancelled again and again, as anyio does it."""
    try:
        if not making.done():
            await asyncio.wait([making])
    except asyncio.CancelledError:
        making.add_done_callback(_let_go)
        raise
    if making.exception() is None:
        await asyncio.shield(asyncio.to_thread(making.result().close))


def _let_go(making: asyncio.Task[RowMemory]) -> None:
    if not making.cancelled() and making.exception() is None:
        asyncio.get_running_loop().run_in_executor(None, making.result().close)


class RowReceiver(EnteredOnce):
    """An async context manager. Methods belong to the loop's thread.

    Args:
        model: what offers must match; gives the layout of rows.
        deliver: ``deliver(key, start, data)`` copies the packed rows from ``start`` on to where they belong. Called
            on the loop or on a thread, at most once for each row of an item, and perhaps once more after ``cancel``;
            again only for rows with which it raised.
        ended: ``ended(key, None)`` when every row of the item was delivered, else with why it failed.
        traces: told about items that it knows.
        accelerator: where the rows are needed; ``deliver`` may get DeviceBytes, and is called on threads only.
    """

    def __init__(
        self, config: LanguageConfig, model: ModelFingerprint, *, name: str, deliver: Deliver,
        ended: Callable[[ItemKey, Fail | None], None], traces: Traces | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._accelerator = accelerator
        self.config, self.model, self.name = config, model, name
        self.layout = RowLayout.of(model)
        self._deliver_rows, self._tell_end = deliver, ended
        self.traces = traces if traces is not None else Traces()
        self.unplaced: dict[ItemKey, frozenset[str]] = {}
        """Items that wait for an encode peer."""
        self._again: asyncio.TimerHandle | None = None
        self._again_due = 0.0
        self._hedging: asyncio.TimerHandle | None = None
        self._hedge_due = 0.0
        self._revoking: dict[asyncio.Task[None], tuple[int, ...]] = {}

    async def _open(self) -> None:
        config, row_bytes = self.config, self.layout.row_bytes
        self.pool = receive_pool(config, row_bytes)
        make = asyncio.to_thread(RowMemory, self.pool.size_bytes, self._accelerator)
        making = asyncio.get_running_loop().create_task(make, name="receive pool")
        self._stack.push_async_callback(_close, making)  # also of who is cancelled while the thread makes it
        try:
            memory = await asyncio.shield(making)
        except (MemoryError, OSError) as error:
            text = f"no room for a receive pool of {self.pool.size_bytes >> 20} MiB: {error or 'no memory'}"
            raise ConfigError("pool_bytes", text) from error
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
            checksum=config.checksum,
        )
        self.peers = EncodePeers(
            lambda: hello, self._heard, model=self.model, secret=config.secret, config=config.link,
            ssl=None if tls is None else tls[1],
        )  # fmt: skip
        self._stack.push_async_callback(self.peers.aclose)
        self.placing = Placing(self.peers, row_bytes, HealthConfig(hedge_slack_s=config.hedge_s))
        self.peers.judged = lambda incarnation: self.placing.judged(incarnation, self._now())
        self.receiver.counters.labels = self.placing.labels
        self.sharing = Sharing(
            self._fetch,
            self._drop,
            lambda key, urgency: self.driver.feed(ItemHurried(key, urgency)),
            deliver=self._deliver_rows,
            ended=self._tell_end,
            cache_bytes=config.cache_bytes,
            row_bytes=row_bytes,
            tasks=self._tasks,
            traces=self.traces,
            accelerator=self._accelerator,
        )

    def _leave(self) -> None:
        for timer in (self._hedging, self._again):
            if timer is not None:
                timer.cancel()
        for key in list(self.placing.errands):
            self.driver.feed(ItemCancelled(key))
        self.sharing.close()

    # -- items ---------------------------------------------------------------------------------------------------

    def request(self, items: Sequence[tuple[ItemKey, ItemSpec]], timeout_s: float) -> None:
        """Asks for the items of one request, in prompt order; each ends in ``ended``, at the latest after
        ``timeout_s``, or in ``cancel``."""
        self.sharing.request(items, min(timeout_s, FOREVER_S))

    def cancel(self, key: ItemKey) -> None:
        """Nobody waits for this item any more: ``ended`` is not called. Does nothing if it has ended."""
        self.sharing.cancel(key)

    def told(self, change: MembershipChange) -> None:
        """Membership changed: who drains, who is suspect, how busy they are, what they hold."""
        gone = [record.incarnation for record in change.gone]
        self.placing.told(change.entries, gone, self._now())
        if gone:
            self._place_waiting()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # -- fetches: the machine's items ----------------------------------------------------------------------------

    def _fetch(self, items: Sequence[tuple[ItemKey, ItemSpec, float]]) -> None:
        for key, spec, _ in items:
            self.placing.errand(key, spec)
        if not self.peers.settling_s:  # a plan for the few that are linked by now is none
            self.placing.plan([key for key, _, _ in items], self._now())
        for key, spec, left_s in items:
            self.driver.feed(ItemRequested(key, spec, left_s))

    def _drop(self, key: ItemKey) -> None:
        if key in self.placing.errands:
            self._forget(key)
            self.driver.feed(ItemCancelled(key))

    def _look_for_overdue(self) -> None:
        """Asks a second peer for items that are late, if another is likely to be faster."""
        self._hedging = None
        placing, now = self.placing, self._now()
        for key in placing.hedges.overdue(now):
            errand = placing.errands.get(key)
            if errand is None or errand.peer is None:
                continue
            if not placing.hedges.allowed(len(placing.errands)):  # most are refused here, and the peers not compared
                placing.hedges.later(key, self.config.hedge_s, now)
                continue
            avoid = errand.avoid | errand.drained | {errand.last}
            other = placing.best(Errand(errand.spec, errand.size, avoid), frozenset(), now)
            if other is None or other.finish_s > now - errand.asked:
                placing.hedges.later(key, self.config.hedge_s, now)
            elif (second := self.sharing.hedge(key)) is not None:
                hedge, spec, left_s = second
                logger.info("item %s is late at %s: %s fetches it elsewhere too", key, errand.peer.name, hedge)
                placing.hedges.hedged(hedge)
                placing.errand(hedge, spec, avoid)
                self.driver.feed(ItemRequested(hedge, spec, left_s))
        self._watch_overdue()

    def _watch_overdue(self) -> None:
        due = self.placing.hedges.next_timer()
        if due is not None and (self._hedging is None or due < self._hedge_due):
            if self._hedging is not None:
                self._hedging.cancel()
            self._hedging, self._hedge_due = asyncio.get_running_loop().call_at(due, self._look_for_overdue), due

    # -- the machine's world -------------------------------------------------------------------------------------

    def _heard(self, event: LinkEvent) -> None:
        now = self._now()
        if isinstance(event, LinkLost):
            self.placing.link_lost(event.peer, now, gone=event.gone)
        elif isinstance(event, LinkUp):
            self.placing.link_up(event.peer)
        else:
            self.traces.heard(event.message)
            if isinstance(event.message, Refuse):
                self.placing.refused(event.peer, event.message, now)
        self.driver.feed(event)
        if isinstance(event, MessageReceived):
            self.placing.heard(event.peer, event.message, now)
        else:
            self._place_waiting()
            self._prune()

    def _place_waiting(self) -> None:
        if settling_s := self.peers.settling_s:
            self._place_again(self._now() + settling_s)
            return
        for key, avoid in list(self.unplaced.items()):
            self._place(Place(key, avoid))

    def _act(self, action: ReceiverAction) -> None:
        match action:
            case Send(peer, message):
                if isinstance(message, Want):
                    message = self.placing.asking(peer, message, self._now())
                if self.peers.send(peer, message):
                    self.placing.unsent(peer, message.key)
            case Place():
                self._place(action)
            case Take():
                self._taker.take(action)
            case Revoke(peer, leases):
                task = self._tasks.start(self._revoke(peer, leases), f"revoke {peer}")
                self._revoking[task] = leases
                task.add_done_callback(lambda done: self._revoking.pop(done, None))
            case Finish(key):
                self._finished(key)
            case Fail(key, code):
                known, others = key in self.placing.errands, self.sharing.fetches(key)
                self._forget(key)
                if known and code != "cancelled":
                    self.sharing.failed(action)
                for other in others:  # a hedge may have its peer now
                    self.placing.free(other)
                    if (avoid := self.unplaced.get(other)) is not None:
                        self._place(Place(other, avoid))

    def _finished(self, key: ItemKey) -> None:
        placing = self.placing
        errand = placing.errands.get(key)
        others = [other for other in self.sharing.fetches(key) if other != key]
        if errand is not None and errand.avoid:  # a hedge, and it was first
            placing.hedges.won += 1
            for other in others:
                late = placing.errands.get(other)
                # An item among many of its request may have been passed, as it should be.
                if late is not None and late.peer is not None and late.spec.urgency.work <= late.size.patches:
                    placing.failed(late, f"item {other} came from another peer first", self._now())
        self._forget(key, complete=True)
        self.sharing.landed(key)

    def _place(self, action: Place) -> None:
        key, now = action.key, self._now()
        errand = self.placing.errands.get(key)
        if errand is None:
            self.unplaced.pop(key, None)
            return
        self.placing.given_up(key, now)
        poison, digest = self.placing.poison, errand.spec.digest
        if poison.refuses(digest, now):
            self._refuse(key, errand)
            return
        held_s = max(poison.unsure_s(digest, now), self.peers.settling_s)
        placement = None if held_s else self.placing.choose(key, action.avoid, now)
        if placement is None:
            absent_s = self.placing.absent_s(key, now)
            patience_s = math.inf if absent_s is None else self.config.peer_wait_s - absent_s
            if patience_s <= 0:
                why = "every encode peer that is linked drains" if self.peers.linked else self.peers.why_none
                self._fail(key, "unreachable", why)
                return
            self.unplaced[key] = action.avoid
            if (again_s := held_s or patience_s) < math.inf:
                self._place_again(now + again_s)
            return
        self.unplaced.pop(key, None)
        peer = self.placing.asked(key, placement, now)
        self._watch_overdue()
        for sharer in self.sharing.sharers(key):
            self.traces.placed(sharer, peer.name, hedge=bool(errand.avoid))
        self.driver.feed(Placed(key, peer.incarnation))

    def _refuse(self, key: ItemKey, errand: Errand) -> None:
        """The item is poison: nobody is asked for it any more."""
        logger.error("item %s: %s is poison: encoders died of it", key, errand.spec.digest)
        self._fail(key, "poison", "encoders died while they encoded it")

    def _fail(self, key: ItemKey, code: str, why: str) -> None:
        self._drop(key)
        self.sharing.failed(Fail(key, code, why, ()))

    def _forget(self, key: ItemKey, *, complete: bool = False) -> None:
        self.placing.over(key, complete=complete)
        self.unplaced.pop(key, None)
        self._prune()

    def _place_again(self, due: float) -> None:
        """Places what waits, at the latest then."""
        if self._again is None or due < self._again_due:
            if self._again is not None:
                self._again.cancel()
            self._again, self._again_due = asyncio.get_running_loop().call_at(due, self._retry), due

    def _retry(self) -> None:
        self._again = None
        self._place_waiting()

    def _deliver(self, take: Take, data: memoryview | DeviceBytes) -> None:
        """On a taker's thread, or on the loop for small chunks."""
        self.sharing.deliver(take.key, take.chunk.start, data)

    def _taken(self, event: RowsTaken | RowsRefused) -> None:
        if isinstance(event, RowsTaken):
            self.sharing.taken(event.key)
            self.placing.arrived(event.key, event.chunk.stop - event.chunk.start, self._now())
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
            *self.sharing.metrics(),
            *self.placing.metrics(),
        ]
