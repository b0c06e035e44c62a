"""A connected pool as its writer sees it: what may be written, what is being written, and whether anybody is there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiodisagg.errors import PeerGone, TransportClosed, TransportError, WriteRefused
from aiodisagg.transport.attach import BarList
from aiodisagg.transport.base import Remote
from aiodisagg.transport.mooncake_job import Job, Lane
from aiodisagg.transport.mooncake_pump import Pump
from aiodisagg.transport.mooncake_side import Goodbye, Side

BARRED_PER_PEER = 4096


class MooncakeRemote(Remote):
    """A pool behind an engine."""

    def __init__(self, name: str, peer: str, size_bytes: int, pump: Pump, lane: Lane, barred: Sequence[int]) -> None:
        self.peer, self.size_bytes = peer, size_bytes
        self.closed = False
        self.leaving = False
        """Somebody waits for the end of its jobs and says goodbye then."""
        self.pump, self.lane = pump, lane
        self.jobs: set[Job] = set()
        """Those that have not ended."""
        self.side: Side
        self._name = name
        self._barred, self._late = BarList(BARRED_PER_PEER), BarList(BARRED_PER_PEER)
        self._barred.add(barred)

    def check(self, leases: frozenset[int]) -> None:
        """Raises what forbids to write under these leases."""
        if self.closed:
            raise TransportClosed(self._name, "disconnected", peer=self.peer)
        if self.side.lost is not None:
            raise PeerGone(self._name, str(self.side.lost), peer=self.peer) from self.side.lost
        for lease in leases:
            if lease in self._barred:
                raise WriteRefused(self._name, f"lease {lease} was revoked", peer=self.peer)

    def send(self, job: Job) -> None:
        self.jobs.add(job)
        job.end.add_done_callback(lambda _: self._ended(job))
        self.pump.send(job)

    def _ended(self, job: Job) -> None:
        self.jobs.discard(job)
        if job.late:
            self._late.add(job.leases)

    def stop(self, job: Job, error: TransportError) -> None:
        """Tells the write's caller now; what is under way goes on to its end."""
        job.fail(error)
        self.pump.stop(job, error)

    async def bar(self, leases: frozenset[int]) -> bool:
        """Stops writes under these leases and waits for their ends. True: what they have sent may still land."""
        self._barred.add(leases)
        jobs = [job for job in self.jobs if not job.leases.isdisjoint(leases)]
        for job in jobs:
            self.stop(job, WriteRefused(self._name, "its lease was revoked in mid-write", peer=self.peer))
        for job in jobs:
            await asyncio.shield(job.end)
        return any(job.late for job in jobs) or any(lease in self._late for lease in leases)

    @property
    def goodbye(self) -> Goodbye:
        """To be said when nothing is sent any more."""
        return Goodbye(late=any(job.late for job in self.jobs) or bool(self._late.newest(1)))

    async def freed(self) -> None:
        """Returns when the sources of the jobs of now are not read any more."""
        for job in list(self.jobs):
            await asyncio.shield(job.free)

    async def settled(self) -> None:
        """Returns when nothing of the jobs of now moves. A dead process's pool is no place to move to: once it has
        been gone for the quarantine, which may begin during this wait, it is enough that the sources are not read."""
        for job in list(self.jobs):
            await asyncio.wait((job.end, self.side.at_rest), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.shield(job.free)  # comes with the end, or before it
