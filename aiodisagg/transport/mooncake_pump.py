"""The thread that submits pieces to the engine and asks how they stand.

At first it asks every 50 us, then more rarely: an end is noticed late by a 32nd part of what the piece took. Each time
costs the processor on which the engine copies, and the GIL, which the loop has to wait for when this thread has it and
has lost its processor.

A write (:class:`~aiodisagg.transport.mooncake_job.Job`) is cut into pieces. Each is one ``transfer_submit_write``,
because only a transfer of its own has an end of its own: a batch says -1 at its first failure while the rest is still
being read from memory.

A TCP transfer always ends (the engine's progress time-out sees to it). An RDMA transfer to a dead process may stay
pending for ever; so RDMA reads from staging slots that belong to the pump, and a slot that never comes back costs
memory (a metric) and not the caller's source. Sources inside memory that is registered anyway are read in place. A
piece is *given up* when it is overdue or its peer is lost: its write fails, its slot is replaced, and it stays leased.

Fairness: a peer has at most ``depth`` pieces under way (the engine has four lanes per peer on TCP). Large ones leave
the last of them free, one write has only a part of them, and writes take turns. TCP pieces are hardly cut at all: one
connection at a time is the fastest (parallel ones share one thread of the engine), and it has the fewest gaps.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from aiodisagg.errors import PeerGone, TransportClosed, TransportError, WriteFailed
from aiodisagg.transport.mooncake_engine import DONE, FAILED, OVERDUE, PENDING, Engine
from aiodisagg.transport.mooncake_job import Job, Lane
from aiodisagg.transport.mooncake_staging import Staging

log = logging.getLogger(__name__)

LARGE_BYTES = 1 << 20
_TICK_S, _LONG_TICK_S, _TICK_OF_AGE = 50e-6, 1e-3, 1 / 32
_SLOW_TICK_S = 0.05


class _Flight:
    __slots__ = ("given_up", "job", "since_s", "size_bytes", "slot", "transfer")

    def __init__(self, transfer: int, job: Job, size_bytes: int, slot: int | None) -> None:
        self.transfer, self.job, self.size_bytes, self.slot = transfer, job, size_bytes, slot
        self.since_s = time.monotonic()
        self.given_up = False


class Pump:
    """See the module's text.

    Args:
        depth: pieces under way per peer. large_per_job: large ones of one write.
        staging: None: sources are read in place (TCP).
        direct: ranges ``(start, stop)`` that are registered and need no staging.
        overdue_s: where there is staging, a piece that is pending for longer is given up.
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

    def give_up(self, lane: Lane, error: PeerGone) -> None:
        """Its peer is lost, and a piece under way may never end: others get its slot's place now, and not when it is
        overdue. TCP pieces hold no slots and end by themselves."""

        def give_up() -> None:
            for flight in self._flights:
                if flight.job.lane is lane and not flight.given_up:
                    self._give_up(flight, error)

        if self._staging is not None:
            self.call(give_up)

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
            for flight in self._flights:
                flight.job.failed = True
            for job in {flight.job for flight in self._flights}.union(*(lane.jobs for lane in self._lanes)):
                job.error = job.error or TransportClosed(self._name, "closed in mid-write", peer=job.lane.peer)
                job.tell(job.over)

    def _turn(self) -> None:
        while self._calls:
            self._calls.popleft()()
        if self._finish_at is None:
            for lane in self._lanes:
                self._fill(lane)
        self._lanes = [lane for lane in self._lanes if lane.jobs]
        if self._flights and self._poll():
            return  # there is room now
        if all(flight.given_up for flight in self._flights):
            pause_s = _SLOW_TICK_S if self._flights or self._lanes or self._finish_at else None
        else:
            youngest_s = max(flight.since_s for flight in self._flights if not flight.given_up)
            pause_s = min(_TICK_OF_AGE * (time.monotonic() - youngest_s), _LONG_TICK_S)
        if pause_s is not None and pause_s <= _TICK_S:
            time.sleep(_TICK_S)  # a third of what a wait for an event costs
        else:
            self._wake.wait(pause_s)
            self._wake.clear()

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
        job.lane.staged += change * (flight.slot is not None)

    def _submit(self, job: Job) -> bool:
        """One piece; False if there is no slot for it."""
        source, destination, size = job.pieces[0]
        slot = None
        if self._staging is not None and not any(lo <= source and source + size <= hi for lo, hi in self._direct):
            slot = self._staging.take(job.lane.staged, large=size > LARGE_BYTES)
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
            if not flight.given_up and (overdue or status != PENDING):
                late.append(flight)
        self._flights = left  # before anybody is told
        for flight, done in landed:
            self._landed(flight, done)
        for flight in late:
            text = f"no end of a transfer in {self._overdue_s:g} s"
            self._give_up(flight, WriteFailed(self._name, text, peer=flight.job.lane.peer))
        return bool(landed)

    def _status(self, flight: _Flight) -> int:
        try:
            return self._engine.status(flight.transfer)
        except Exception:
            if not flight.given_up:
                log.exception("%s: nothing is known of a transfer to %s", self._name, flight.job.lane.peer)
            return OVERDUE

    def _landed(self, flight: _Flight, done: bool) -> None:
        job = flight.job
        job.under_way -= 1
        job.in_place -= flight.slot is None
        if not flight.given_up:
            self._count(flight, -1)
        if flight.slot is not None and self._staging is not None:
            (self._staging.find if flight.given_up else self._staging.give)(flight.slot)
        if not done:
            job.failed = True
            self._stop(job, WriteFailed(self._name, "the engine reports a failure", peer=job.lane.peer))
        self._end_if_over(job)

    def _give_up(self, flight: _Flight, error: TransportError) -> None:
        job = flight.job
        flight.given_up = True
        self._count(flight, -1)
        if flight.slot is not None and self._staging is not None:
            self._staging.lose()
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
            job.tell(job.over)
        elif not job.in_place:
            job.tell(job.freed)  # every piece has been copied into its slot
