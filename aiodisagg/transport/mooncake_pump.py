"""The thread that submits pieces to the engine and asks how they stand, every 50 us while any is under way.

A write is cut into pieces. Each is one ``transfer_submit_write``, because only a transfer of its own has an end of its
own: a batch says -1 at its first failure while the rest is still being read from memory. A piece belongs to the engine
from its submit until its end, whatever became of its write; :class:`Job` therefore ends twice:

* its **outcome** is what the caller is told: done, failed, cancelled, the peer is gone;
* its **end** is when no piece of it can move a byte any more. Between the two its memory is *leased*.

A TCP transfer always ends (the engine's progress time-out sees to it). An RDMA transfer to a dead process may stay
pending for ever; so RDMA reads from staging slots that belong to the pump, and a slot that never comes back costs
memory (a metric) and not the caller's source. Sources inside memory that is registered anyway are read in place.

Fairness: a peer has at most ``depth`` pieces under way (the engine has four lanes per peer on TCP). Large ones leave
the last of them free, one write has only a part of them, and writes take turns. TCP pieces are hardly cut at all: one
connection at a time is the fastest (parallel ones share one thread of the engine), and it has the fewest gaps.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from aiodisagg.errors import TransportClosed, TransportError, TransportUnavailable, WriteFailed
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.base import Slice
from aiodisagg.transport.mooncake_engine import DONE, FAILED, OVERDUE, PENDING, Engine

log = logging.getLogger(__name__)

LARGE_BYTES = 1 << 20
_TICK_S = 50e-6
_SLOW_TICK_S = 0.05


class Lane:
    """One peer: where its pool is, and the writes that have pieces to submit. Owned by the pump's thread."""

    def __init__(self, peer: str, segment: str, address: int) -> None:
        self.peer, self.segment, self.address = peer, segment, address
        self.jobs: deque[Job] = deque()
        self.under_way = self.large = 0


class Job:
    """One write. ``outcome``, ``free`` and ``end`` are futures of the loop; see the module's text.

    ``free``: the sources are not read any more. It comes with ``end``, or before it where pieces are staged.
    """

    def __init__(self, lane: Lane, slices: Sequence[Slice], chunk_bytes: int) -> None:
        loop = asyncio.get_running_loop()
        self.lane = lane
        self.leases = frozenset(one.lease for one in slices)
        self.outcome: asyncio.Future[None] = loop.create_future()
        self.outcome.add_done_callback(lambda done: done.exception())  # a cancelled writer asks for no result
        self.free: asyncio.Future[None] = loop.create_future()
        self.end: asyncio.Future[None] = loop.create_future()
        self.error: TransportError | None = None
        self.under_way = self.large = 0
        self.in_place = 0
        """Pieces under way that the engine reads from the caller's memory."""
        self.pieces: deque[tuple[int, int, int]] = deque()
        self._loop = loop
        self._sources: list[np.ndarray[Any, Any]] = []  # they only hold the buffers in place
        for one in slices:
            if one.source.nbytes:
                array = np.frombuffer(one.source, np.uint8)
                self._sources.append(array)
                base = array.ctypes.data
                for start in range(0, array.nbytes, chunk_bytes):
                    size = min(chunk_bytes, array.nbytes - start)
                    self.pieces.append((base + start, lane.address + one.offset + start, size))

    def fail(self, error: TransportError) -> None:
        """On the loop's thread: tells the caller now; the pieces under way go on to their end."""
        if not self.outcome.done():
            self.outcome.set_exception(error)

    def tell(self, what: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed under us: nobody waits any more
            self._loop.call_soon_threadsafe(what)

    def freed(self) -> None:
        self._sources.clear()
        if not self.free.done():
            self.free.set_result(None)

    def ended(self) -> None:
        self.freed()
        if not self.outcome.done():
            if self.error is None:
                self.outcome.set_result(None)
            else:
                self.outcome.set_exception(self.error)
        if not self.end.done():
            self.end.set_result(None)


class Staging:
    """Registered slots for sources that are not. Used by the pump's thread; a slot that is lost is replaced."""

    def __init__(self, engine: Engine, slot_bytes: int, most_lost: int) -> None:
        self.slot_bytes = slot_bytes
        self._engine, self._lost, self._most_lost = engine, 0, most_lost
        self._arenas: list[Arena] = []
        self._free: list[int] = []

    def add(self) -> None:
        """One more slot. Raises TransportUnavailable."""
        arena = Arena(self.slot_bytes)
        try:
            self._engine.register(arena.address, arena.size_bytes)
        except BaseException:
            arena.close()
            raise
        self._arenas.append(arena)
        self._free.append(arena.address)

    def take(self) -> int | None:
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        self._free.append(slot)

    def lose(self) -> None:
        """A slot that was taken may never come back: makes another, up to a bound and while there is memory."""
        if self._lost < self._most_lost:
            self._lost += 1
            try:
                self.add()
            except (OSError, TransportUnavailable) as error:
                log.warning("a staging slot is lost and cannot be replaced: %s", error)

    def unregister(self) -> None:
        for arena in self._arenas:
            self._engine.unregister(arena.address)

    def close(self) -> None:
        """Only after the engine is gone."""
        for arena in self._arenas:
            arena.close()


class _Flight:
    __slots__ = ("job", "overdue", "since_s", "size_bytes", "slot", "transfer")

    def __init__(self, transfer: int, job: Job, size_bytes: int, slot: int | None) -> None:
        self.transfer, self.job, self.size_bytes, self.slot = transfer, job, size_bytes, slot
        self.since_s = time.monotonic()
        self.overdue = False


class Pump:
    """See the module's text.

    Args:
        depth: pieces under way per peer. large_per_job: large ones of one write.
        staging: None: sources are read in place (TCP).
        direct: ranges ``(start, stop)`` that are registered and need no staging.
        overdue_s: a staged piece that is pending for longer fails its write; it stays leased.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        depth: int,
        large_per_job: int,
        staging: Staging | None,
        direct: Iterable[tuple[int, int]],
        overdue_s: float,
    ) -> None:
        self._name, self._engine, self._staging = name, engine, staging
        self._depth, self._large_per_job, self._direct = depth, large_per_job, tuple(direct)
        self._overdue_s = overdue_s
        self._lanes: list[Lane] = []
        self._flights: list[_Flight] = []
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._finish_at: float | None = None
        self.abandoned = False
        """Set by the end of the thread: some transfers never ended."""
        self._thread = threading.Thread(target=self._run, name=f"aiodisagg-{name}", daemon=True)
        self._thread.start()

    @property
    def leased_bytes(self) -> int:
        """Bytes that the engine may still read though their write is over."""
        return sum(flight.size_bytes for flight in list(self._flights) if flight.job.outcome.done())

    def call(self, action: Callable[[], None]) -> None:
        """From any thread: run this on the pump's thread soon."""
        self._calls.append(action)
        self._wake.set()

    def send(self, job: Job) -> None:
        def add() -> None:
            if not job.lane.jobs and job.lane not in self._lanes:
                self._lanes.append(job.lane)
            job.lane.jobs.append(job)

        self.call(add)

    def stop(self, job: Job, error: TransportError) -> None:
        """No further piece of this write is submitted."""
        self.call(lambda: self._stop(job, error))

    def finish(self, grace_s: float) -> None:
        """Submits nothing more, and ends the thread once nothing is under way, or after ``grace_s``."""

        def begin() -> None:
            self._finish_at = time.monotonic() + grace_s

        self.call(begin)

    def join(self, timeout_s: float | None = None) -> bool:
        """True if the thread has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- on the pump's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._finish_at is None or (self._flights and time.monotonic() <= self._finish_at):
                try:
                    self._turn()
                except Exception:  # a bug in one turn must not hold up every write and fence of this process
                    log.exception("%s: a turn failed", self._name)
                    time.sleep(_SLOW_TICK_S)
        finally:
            self.abandoned = bool(self._flights)
            for job in {flight.job for flight in self._flights}.union(*(lane.jobs for lane in self._lanes)):
                job.error = job.error or TransportClosed(self._name, "closed in mid-write", peer=job.lane.peer)
                job.tell(job.ended)

    def _turn(self) -> None:
        while self._calls:
            self._calls.popleft()()
        if self._finish_at is None:
            for lane in self._lanes:
                self._fill(lane)
        self._lanes = [lane for lane in self._lanes if lane.jobs]
        if self._flights and self._poll():
            return  # there is room now
        if all(flight.overdue for flight in self._flights):
            self._wake.wait(_SLOW_TICK_S if self._flights or self._lanes or self._finish_at else None)
            self._wake.clear()
        else:
            time.sleep(_TICK_S)

    def _fill(self, lane: Lane) -> None:
        waiting = len(lane.jobs)
        while lane.under_way < self._depth and waiting:
            job = lane.jobs.popleft()
            if not job.pieces:
                self._end_if_over(job)
                waiting -= 1
            elif not self._may_submit(job) or not self._submit(job):
                lane.jobs.append(job)
                waiting -= 1
            elif job.pieces:
                lane.jobs.append(job)
            else:
                waiting -= 1
                self._end_if_over(job)

    def _may_submit(self, job: Job) -> bool:
        small = job.pieces[0][2] <= LARGE_BYTES
        return small or (job.large < self._large_per_job and job.lane.large < self._depth - 1)

    def _count(self, flight: _Flight, change: int) -> None:
        """A piece that occupies its lane (1), or does not any more (-1)."""
        job, large = flight.job, change * (flight.size_bytes > LARGE_BYTES)
        job.large += large
        job.lane.large += large
        job.lane.under_way += change

    def _submit(self, job: Job) -> bool:
        """One piece; False if there is no slot for it."""
        source, destination, size = job.pieces[0]
        slot = None
        if self._staging is not None and not any(lo <= source and source + size <= hi for lo, hi in self._direct):
            slot = self._staging.take()
            if slot is None:
                return False
            ctypes.memmove(slot, source, size)  # releases the GIL
            source = slot
        job.pieces.popleft()
        try:
            transfer = self._engine.submit(job.lane.segment, source, destination, size)
        except Exception:
            log.exception("%s: a transfer to %s was not started", self._name, job.lane.peer)
            transfer = 0
        if not transfer:
            if slot is not None and self._staging is not None:
                self._staging.give(slot)
            self._stop(job, WriteFailed(self._name, "the engine refused a transfer", peer=job.lane.peer))
            return True
        job.under_way += 1
        job.in_place += slot is None
        flight = _Flight(transfer, job, size, slot)
        self._count(flight, 1)
        self._flights.append(flight)
        return True

    def _poll(self) -> bool:
        """True if any piece ended."""
        now = time.monotonic()
        left: list[_Flight] = []
        landed: list[tuple[_Flight, bool]] = []
        late: list[_Flight] = []
        for flight in self._flights:
            status = self._status(flight)
            if status in (DONE, FAILED):
                landed.append((flight, status == DONE))
                continue
            left.append(flight)
            overdue = self._staging is not None and now - flight.since_s > self._overdue_s
            if not flight.overdue and (overdue or status != PENDING):
                late.append(flight)
        self._flights = left  # before anybody is told
        for flight, done in landed:
            self._landed(flight, done)
        for flight in late:
            self._give_up(flight)
        return bool(landed)

    def _status(self, flight: _Flight) -> int:
        try:
            return self._engine.status(flight.transfer)
        except Exception:
            if not flight.overdue:
                log.exception("%s: nothing is known of a transfer to %s", self._name, flight.job.lane.peer)
            return OVERDUE

    def _landed(self, flight: _Flight, done: bool) -> None:
        job = flight.job
        job.under_way -= 1
        job.in_place -= flight.slot is None
        if not flight.overdue:
            self._count(flight, -1)
        if flight.slot is not None and self._staging is not None:
            self._staging.give(flight.slot)
        if not done:
            self._stop(job, WriteFailed(self._name, "the engine reports a failure", peer=job.lane.peer))
        self._end_if_over(job)

    def _give_up(self, flight: _Flight) -> None:
        job = flight.job
        flight.overdue = True
        self._count(flight, -1)
        if flight.slot is not None and self._staging is not None:
            self._staging.lose()
        error = WriteFailed(self._name, f"no end of a transfer in {self._overdue_s:g} s", peer=job.lane.peer)
        self._stop(job, error)
        job.tell(lambda: job.fail(error))

    def _stop(self, job: Job, error: TransportError) -> None:
        job.error = job.error or error
        job.pieces.clear()
        with contextlib.suppress(ValueError):
            job.lane.jobs.remove(job)
        self._end_if_over(job)

    def _end_if_over(self, job: Job) -> None:
        if job.pieces:
            return
        if not job.under_way:
            job.tell(job.ended)
        elif not job.in_place:
            job.tell(job.freed)  # every piece has been copied into its slot
