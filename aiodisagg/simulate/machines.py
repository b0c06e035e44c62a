"""How rows get from the peer that encodes to the peer that computes: by the real protocol machines in virtual time.

Each encode peer runs a :class:`~aiodisagg.protocol.sending.Sender`, each language peer a
:class:`~aiodisagg.protocol.receiving.Receiver` with a pool of blocks; the shell between them is this file. Messages
take half a round trip, writes take their bytes at the link's rate, one at a time for each sender and receiver.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiodisagg.errors import AiodisaggError
from aiodisagg.protocol import events as ev
from aiodisagg.protocol.blocks import BlockPool
from aiodisagg.protocol.messages import Chunk, ItemKey
from aiodisagg.protocol.receiving import Receiver, ReceiverConfig
from aiodisagg.protocol.rows import ModelFingerprint
from aiodisagg.protocol.sending import Sender, SenderConfig
from aiodisagg.simulate.clock import Clock
from aiodisagg.simulate.request import Item
from aiodisagg.simulate.times import Costs
from aiodisagg.simulate.tower import Tower
from aiodisagg.simulate.wires import Arrived, TimedWires

POOL_BLOCKS, BLOCK_ROWS = 256, 256
SOURCE_BYTES = 1 << 31
PATIENCE_S = 1e6
"""No peer dies here, so waiting long is never a sign of anything."""


class _End:
    """A machine, and the timer it wants."""

    def __init__(self, name: str, machine: Receiver | Sender) -> None:
        self.name = name
        self.machine: Any = machine  # which of the two only its own actions and events know
        self.armed: float | None = None


class MachineWires(TimedWires):
    """Between two peers by machines: rows arrive chunk by chunk."""

    def __init__(self, clock: Clock, costs: Costs, arrived: Arrived) -> None:
        super().__init__(clock, costs, arrived)
        bytes_of_row = costs.times.row_bytes
        levels = 3 if bytes_of_row % 8 == 0 else 0
        hidden = bytes_of_row // 2 // (1 + levels)
        self._model = ModelFingerprint("simulated", hidden, levels, "bfloat16", "simulated")
        self.receivers: dict[str, _End] = {}
        self.senders: dict[str, _End] = {}
        self._towers: dict[str, Tower] = {}
        self._linked: set[tuple[str, str]] = set()
        self._items: dict[ItemKey, Item] = {}
        self._jobs: dict[tuple[str, str], Item] = {}

    def fetch(self, item: Item, tower: Tower, encoder: str, receiver: str) -> None:
        if encoder == receiver:
            super().fetch(item, tower, encoder, receiver)
            return
        to = self._receiver(receiver)
        self._sender(encoder, tower)
        if (receiver, encoder) not in self._linked:
            self._linked.add((receiver, encoder))
            self._feed(to, ev.LinkUp(encoder))
            self._feed(self.senders[encoder], ev.LinkUp(receiver))
        key = ItemKey(item.request.number, item.index)
        self._items[key] = item
        self._jobs.setdefault((encoder, str(item.identity)), item)
        spec = ev.ItemSpec(str(item.identity), "image", (1, 2, 2 * item.rows), item.rows, 0.0, (b"",))
        self._feed(to, ev.ItemRequested(key, spec, PATIENCE_S))

    def _receiver(self, name: str) -> _End:
        if name not in self.receivers:
            pool = BlockPool(POOL_BLOCKS, BLOCK_ROWS, self._costs.times.row_bytes)
            config = ReceiverConfig(stall_s=PATIENCE_S)
            self.receivers[name] = _End(name, Receiver(self._model, pool, config))
        return self.receivers[name]

    def _sender(self, name: str, tower: Tower) -> _End:
        if name not in self.senders:
            config = SenderConfig(retain_s=PATIENCE_S, capacity_bytes=SOURCE_BYTES)
            self.senders[name] = _End(name, Sender(self._model, config))
            self._towers[name] = tower
        return self.senders[name]

    # -- the shell -----------------------------------------------------------------------------------------------

    def _feed(self, end: _End, event: ev.ReceiverEvent | ev.SenderEvent) -> None:
        actions: Iterable[ev.ReceiverAction | ev.SenderAction] = end.machine.handle(event, self._clock.now)
        for action in actions:
            self._act(end, action)
        self._arm(end)

    def _arm(self, end: _End) -> None:
        due = end.machine.next_timer()
        if due is not None and (end.armed is None or due < end.armed) and self._items:
            end.armed = due
            self._clock.at(due, self._fire, end, due)

    def _fire(self, end: _End, due: float) -> None:
        if end.armed != due:
            return
        end.armed = None
        wanted = end.machine.next_timer()
        if wanted is not None and wanted <= self._clock.now:
            self._feed(end, ev.TimerFired())
        else:
            self._arm(end)

    def _act(self, end: _End, action: ev.ReceiverAction | ev.SenderAction) -> None:
        now = self._clock.now
        match action:
            case ev.Send(peer, message):
                others = self.senders if isinstance(end.machine, Receiver) else self.receivers
                arrives = now + self._costs.rtt_s / 2
                self._clock.at(arrives, self._feed, others[peer], ev.MessageReceived(end.name, message))
            case ev.Place(key):
                self._clock.at(now, self._feed, end, ev.Placed(key, self._items[key].encoder))
            case ev.Take(key, chunk):
                self._clock.at(now, self._taken, end, key, chunk)
            case ev.Finish(key):
                self._finished(key)
            case ev.StartEncode(digest):
                self._towers[end.name].submit(self._jobs[end.name, digest], lambda item: self._encoded(end, item))
            case ev.Write():
                self._write(end, action)
            case ev.Fence(peer, key):
                self._clock.at(now, self._feed, end, ev.WritesFenced(peer, key))
            case ev.Revoke(_, leases):
                self._clock.at(now, self._feed, end, ev.LeasesRevoked(leases))
            case ev.DropSource():
                pass
            case _:
                raise AiodisaggError(f"{end.name}: {action} has no place where nothing fails")

    def _encoded(self, end: _End, item: Item) -> None:
        self._jobs.pop((end.name, str(item.identity)), None)
        self._clock.at(self._clock.now, self._feed, end, ev.RowsReady(str(item.identity), item.rows))

    def _write(self, end: _End, write: ev.Write) -> None:
        ends = self._ways.ends(end.name, write.peer, self._costs.transfer_s(write.stop - write.start))
        chunk = Chunk(write.lease, write.start, write.stop, 0)
        self._clock.at(ends, self._feed, end, ev.ChunkWritten(write.peer, write.key, write.epoch, chunk))

    def _taken(self, end: _End, key: ItemKey, chunk: Chunk) -> None:
        item = self._items[key]
        self._feed(end, ev.RowsTaken(key, chunk))
        open_item = end.machine.items.get(key)
        spans = open_item.held.spans() if open_item is not None else ()
        if spans and spans[0][0] == 0 and spans[0][1] > item.arrived:
            item.arrived = spans[0][1]
            self._arrived(item)

    def _finished(self, key: ItemKey) -> None:
        self._here(self._items.pop(key))
