"""A receiver and up to three senders in virtual time, with memory, a network and crashes: the shells of a real pair.

Every action is carried out after a delay drawn from the plan's seed; every write lands row part by row part, perhaps
after it failed, and only a fence, the writer's death or (where the receiver places bytes) the pool's gate stops it.
``checks`` looks at everything after each step; ``run`` ends when nothing is left to happen.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from random import Random
from typing import Any

from aiodisagg.errors import InvalidTransition, RemoteProtocolError
from aiodisagg.protocol import events as ev
from aiodisagg.protocol.blocks import BlockPool
from aiodisagg.protocol.incoming import NOBODY
from aiodisagg.protocol.messages import ItemKey, Urgency, decode, encode
from aiodisagg.protocol.receiving import Receiver, ReceiverConfig
from aiodisagg.protocol.rows import Region
from aiodisagg.protocol.sending import Sender, SenderConfig

from . import checks, truth
from .checks import Violation
from .network import Network, Process
from .plans import FAULT_TIME_S, PATIENT_S, STRICT, Fault, Plan
from .writes import Writes, checksum

LINGER_S = 0.4
"""How long writes of a dead process may still land."""


class World:
    """See the module's text. ``cut_at``: cut the link when the message with this number would be delivered.
    ``hurried``: others want the same items, sooner."""

    def __init__(
        self, plan: Plan, *, cut_at: int | None = None, pause_s: float = 0.2, hurried: bool = False
    ) -> None:  # fmt: skip
        self.plan, self.random, self.hurried = plan, Random(plan.seed), hurried
        self.now, self.steps, self.messages = 0.0, 0, 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._seq = 0
        self.network = Network(self)
        self.cut_at, self.pause_s = cut_at, pause_s
        self.rooms = 0
        self.asked: dict[ItemKey, tuple[int, float]] = {}
        self.arrived: dict[ItemKey, truth.Arrived] = {}
        self.ended: dict[ItemKey, str] = {}
        self.owed: set[int] = set(range(len(plan.asked)))
        self.landings = Writes(self)
        self.refusals: dict[ItemKey, int] = {}
        self.struck: set[str] = set()
        self.corrupt_next = 0
        self.corrupted = 0
        self.quarantined = self.windows = 0
        self.writes: Counter[tuple[ItemKey, int]] = Counter()
        self.history: dict[Any, Any] = {}
        self._revokes: dict[str, list[tuple[int, ...]]] = {}
        self._places: list[ev.Place] = []
        self.log: deque[tuple[float, str, str, object]] = deque(maxlen=60)
        self.receiver = self._new_receiver(1)
        self.senders = [self._new_sender(i, 1) for i in range(plan.senders)]
        for i, asked in enumerate(plan.asked):
            self.at(asked.at, lambda i=i: self._ask(i))
        for fault in plan.faults:
            self.at(fault.at, lambda fault=fault: self._strike(fault))

    # -- time ----------------------------------------------------------------------------------------------------

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._seq += 1
        heapq.heappush(self._heap, (when, self._seq, what))

    def soon(self, most_s: float, what: Callable[[], None]) -> None:
        self.at(self.now + self.random.uniform(0.0, most_s), what)

    def run(self, limit: int = 30_000) -> None:
        """Runs until nothing is left to happen; raises Violation where the protocol broke a promise."""
        try:
            while self._heap:
                self.now, _, what = heapq.heappop(self._heap)
                self.steps += 1
                if self.steps > limit:
                    raise Violation(f"still busy after {limit} steps: {self.receiver.machine!r}")
                what()
            checks.at_the_end(self)
        except (InvalidTransition, RemoteProtocolError, AssertionError, KeyError, ValueError, IndexError) as error:
            tail = "\n".join(f"{when:9.4f} {who} {way} {what}" for when, who, way, what in self.log)
            raise Violation(f"{type(error).__name__}: {error}\n{self.plan}\n{tail}") from error

    # -- processes -----------------------------------------------------------------------------------------------

    def _new_receiver(self, life: int) -> Process:
        plan = self.plan
        pool = BlockPool(plan.blocks, plan.rows_per_block, truth.ROW_BYTES)
        config = ReceiverConfig(window_blocks=plan.window_blocks)
        process = Process(f"L.{life}", Receiver(truth.MODEL, pool, config), life)
        process.memory = bytearray(pool.size_bytes)
        self._places.clear()
        for sender in getattr(self, "senders", ()):
            if sender.alive:
                self.network.connect(process, sender)
        return process

    def _new_sender(self, index: int, life: int) -> Process:
        config = SenderConfig(
            retain_s=30.0,
            capacity_bytes=self.plan.capacity_rows * truth.ROW_BYTES,
            file_bytes=self.plan.capacity_rows // 3,  # of the smallest: one file
            placeholders=truth.PLACEHOLDERS,
        )
        process = Process(f"E{index}.{life}", Sender(truth.MODEL, config), life)
        self.network.connect(self.receiver, process)
        return process

    def feed(self, process: Process, event: object) -> None:
        """One event to one machine, unless its process is dead; later, if it is stopped."""
        if not process.alive:
            return
        if process.frozen:
            process.backlog.append(event)
            return
        self.log.append((self.now, process.name, "<", event))
        before = checks.stale(process.machine, event)
        actions = process.machine.handle(event, self.now)
        if before is not None and checks.stale(process.machine, event) != before:
            raise Violation(f"a word of an epoch that is over changed something: {event}")
        for action in actions:
            self.log.append((self.now, process.name, ">", action))
            self._carry_out(process, action)
        if process is self.receiver:
            checks.receiver(self)
        else:
            checks.sender(self, process)
        due = process.machine.next_timer()
        if due is not None and due != process.timer:
            process.timer = due
            self.at(max(due, self.now), lambda: self._timer(process, due))

    def _timer(self, process: Process, due: float) -> None:
        if process.timer == due:
            process.timer = None
            self.feed(process, ev.TimerFired())

    # -- actions -------------------------------------------------------------------------------------------------

    def _carry_out(self, process: Process, action: object) -> None:
        match action:
            case ev.Send(peer, message):
                checks.sent(self, process, peer, message)
                assert decode(encode(message), peer) == message
                self.network.send(process, peer, message)
            case ev.Place():
                self._places.append(action)
                self.soon(0.01, self.place)
            case ev.Take():
                self.soon(0.01, lambda: self._take(process, action))
            case ev.Revoke():
                self._revoke(process, action)
            case ev.Finish(key):
                checks.finished(self, key)
                self._ended(key, "success")
            case ev.Fail(key, code):
                self._ended(key, code)
            case ev.StartEncode():
                self._start_encode(process, action)
            case ev.ChangeEncode(digest):  # its end may be on its way
                assert digest in process.store
            case ev.CancelEncode(digest):
                self._stop_encode(process, digest, "cancelled", True)
            case ev.Write():
                self.landings.begin(process, action)
            case ev.Fence():
                self.landings.fence(process, action)
            case ev.DropSource(digest):
                process.store.pop(digest)
                self.landings.dropped(process, digest)
            case _:
                raise Violation(f"unknown action {action}")

    def _ask(self, index: int) -> None:
        asked, left = self.plan.asked[index], self.plan.asked[index].timeout_s
        if not self.receiver.alive:
            self.soon(0.5, lambda: self._ask(index))
            return
        self.rooms += 1
        key = ItemKey(self.rooms, index)
        self.asked[key] = index, self.now + left
        spec = truth.spec(asked.number, asked.meta)
        self.arrived[key] = truth.Arrived(spec)
        self.feed(self.receiver, ev.ItemRequested(key, spec, left))
        for n in range(3 if self.hurried else 0):
            joined = ev.ItemHurried(key, Urgency(0.0, self.random.randrange(-9, 3)))
            self.soon(10.0**-n, lambda joined=joined: self.feed(self.receiver, joined))

    def _ended(self, key: ItemKey, how: str) -> None:
        if key in self.ended:
            raise Violation(f"{key} ended twice: {self.ended[key]}, {how}")
        self.ended[key] = how
        self.owed.discard(self.asked[key][0])
        self._places = [place for place in self._places if place.key != key]

    def place(self) -> None:
        """Answers what can be placed now; the rest waits for a link."""
        here = [s.name for s in self.senders if self.network.is_up(self.receiver, s.name)]
        if not here or self.receiver.frozen or not self.receiver.alive:
            return
        waiting, self._places = self._places, []
        for place in waiting:
            others = [name for name in here if name not in place.avoid]
            self.feed(self.receiver, ev.Placed(place.key, self.random.choice(others or here)))

    def _take(self, process: Process, take: ev.Take) -> None:
        if not process.alive:
            return
        data = bytes(process.memory[take.offset : take.offset + take.size_bytes])
        if checksum(data) != take.chunk.checksum:
            self.feed(process, ev.RowsRefused(take.key, take.chunk))
            return
        arrived = self.arrived[take.key]
        a = take.chunk.start * truth.ROW_BYTES
        arrived.packed[a : a + len(data)] = data
        if take.meta is not None:
            parts = ((Region.FILL_IDS, take.meta.fill_ids, 4), (Region.MROPE, take.meta.mrope, 12))
            for region, values, size in parts:
                if values is not None:
                    arrived.meta[region][take.meta.start * size : take.meta.stop * size] = values
            if take.meta.aux is not None:
                arrived.meta[Region.AUX][:] = take.meta.aux
        process.taken_rows += take.chunk.stop - take.chunk.start
        self.feed(process, ev.RowsTaken(take.key, take.chunk))

    def _revoke(self, process: Process, revoke: ev.Revoke) -> None:
        if not self.plan.one_sided or revoke.peer == NOBODY:
            self.soon(0.01, lambda: self._revoked(process, revoke))
            return
        writer = self.network.processes.get(revoke.peer)
        assert writer is not None
        if writer.alive:
            self._revokes.setdefault(revoke.peer, []).append(revoke.leases)
        else:
            when = max(self.now, writer.died_at + LINGER_S) + 0.01
            self.at(when, lambda: self.feed(process, ev.LeasesRevoked(revoke.leases)))

    def _revoked(self, process: Process, revoke: ev.Revoke) -> None:
        if any(self.landings.copying[lease] for lease in revoke.leases):
            self.soon(0.01, lambda: self._revoked(process, revoke))
        else:
            self.feed(process, ev.LeasesRevoked(revoke.leases))

    # -- encoding ------------------------------------------------------------------------------------------------

    def _start_encode(self, process: Process, job: ev.StartEncode) -> None:
        if job.digest in process.store:
            raise Violation(f"{process.name} encodes {job.digest} although it has it")
        process.store[job.digest] = 0
        token = process.jobs[job.digest] = object()
        when = self.now + self.random.uniform(0.0, 0.02)

        def stage(name: str) -> None:
            if process.jobs.get(job.digest) is token:
                self.feed(process, ev.StageEntered(job.digest, name, 0.01))

        def ready(stop: int) -> None:
            if process.jobs.get(job.digest) is not token or not process.alive:
                return
            process.store[job.digest] = stop
            if stop == job.rows:
                del process.jobs[job.digest]
            self.feed(process, ev.RowsReady(job.digest, stop))

        self.at(when, lambda: stage("preparing"))
        self.at(when, lambda: stage("encoding"))
        stops = sorted({*self.random.choices(range(1, job.rows + 1), k=self.random.randrange(3)), job.rows})
        for stop in stops:
            self.at(when + stop * self.plan.encode_row_s, lambda stop=stop: ready(stop))

    def _stop_encode(self, process: Process, digest: str, code: str, retryable: bool) -> None:
        def stop() -> None:
            if process.jobs.get(digest) is token and process.alive:
                del process.jobs[digest]
                self.feed(process, ev.EncodeStopped(digest, code, "stopped", retryable))

        token = process.jobs.get(digest)
        if token is not None:
            self.soon(0.2, stop)

    # -- faults --------------------------------------------------------------------------------------------------

    def _strike(self, fault: Fault) -> None:
        sender = self.senders[fault.who % len(self.senders)]
        self.struck.add(fault.kind)
        self.log.append((self.now, "", "-", fault))
        match fault.kind:
            case "cut":
                self.network.cut(self.receiver, sender, fault.lasts_s)
            case "crash":
                self._crash_sender(fault.who % len(self.senders), fault.lasts_s)
            case "crash_receiver":
                self._crash_receiver(fault.lasts_s)
            case "freeze":
                self._freeze(self.receiver if fault.who == 5 else sender, fault.lasts_s)
            case "corrupt":
                self.corrupt_next += 1
            case "write_fails":
                sender.fail_next += 1
            case "encode_fails":
                for digest in list(sender.jobs):
                    self._stop_encode(sender, digest, *self.random.choice((("oom", True), ("bad_media", False))))
            case "cancel":
                for key in [k for k in self.asked if k not in self.ended and k.index == fault.who]:
                    self.owed.discard(key.index)
                    self.feed(self.receiver, ev.ItemCancelled(key))
            case _ if fault.kind in STRICT:
                self.network.disturb(self.receiver, sender, fault.kind)
                # no honest link loses single messages; this one is found out and opened again
                self.at(FAULT_TIME_S + 45.0, lambda: self.network.cut_all(0.1))

    def _crash_sender(self, index: int, lasts_s: float) -> None:
        process = self.senders[index]
        if not process.alive:
            return
        process.alive, process.died_at = False, self.now
        self.landings.died(process, LINGER_S)
        self.network.died(process)
        for leases in self._revokes.pop(process.name, []):
            event, home = ev.LeasesRevoked(leases), self.receiver
            self.at(self.now + LINGER_S + 0.01, lambda home=home, event=event: self.feed(home, event))
        self.at(self.now + lasts_s + 0.05, lambda: self._revive_sender(index, process.life + 1))

    def _revive_sender(self, index: int, life: int) -> None:
        self.senders[index] = self._new_sender(index, life)

    def _crash_receiver(self, lasts_s: float) -> None:
        process = self.receiver
        if not process.alive:
            return
        process.alive, process.died_at = False, self.now
        self._revokes.clear()
        self.network.died(process)
        for key, (index, _) in self.asked.items():
            if key not in self.ended:
                self.ended[key] = "crashed"
                if index in self.owed:
                    self.at(self.now + lasts_s + 0.06, lambda index=index: self._ask(index))

        def revive() -> None:
            self.receiver = self._new_receiver(process.life + 1)
            for sender in self.senders:
                sender.fail_next = 0

        self.at(self.now + lasts_s + 0.05, revive)

    def _freeze(self, process: Process, lasts_s: float) -> None:
        if process.frozen or not process.alive or not lasts_s:
            return
        process.frozen, process.thaws_at = True, self.now + lasts_s
        if lasts_s > 1.0:  # heartbeats notice
            self.at(self.now + 1.0, lambda: self.network.cut_process(process, lasts_s))
        self.at(process.thaws_at, lambda: self._thaw(process))

    def _thaw(self, process: Process) -> None:
        process.frozen = False
        backlog, process.backlog = process.backlog, []
        for event in backlog:
            if callable(event):
                event()
            else:
                self.feed(process, event)
        self.place()

    def patient(self, key: ItemKey) -> bool:
        return self.plan.asked[self.asked[key][0]].timeout_s >= PATIENT_S
