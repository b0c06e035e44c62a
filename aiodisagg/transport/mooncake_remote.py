"""A connected pool as its writer sees it: what may be written, what is being written, and whether anybody is there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiodisagg.errors import PeerGone, TransportClosed, TransportError, WriteRefused
from aiodisagg.transport.attach import BarList
from aiodisagg.transport.base import Remote
from aiodisagg.transport.mooncake_pump import Job, Lane, Pump
from aiodisagg.transport.mooncake_side import Side

BARRED_PER_PEER = 4096


class MooncakeRemote(Remote):
    """A pool behind an engine."""

    def __init__(self, name: str, peer: str, size_bytes: int, pump: Pump, lane: Lane, barred: Sequence[int]) -> None:
        self.peer, self.size_bytes = peer, size_bytes
        self.closed = False
        self.pump, self.lane = pump, lane
        self.jobs: set[Job] = set()
        self.side: Side
        self._name = name
        self._barred = BarList(BARRED_PER_PEER)
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

    def stop(self, job: Job, error: TransportError) -> None:
        """Tells the write's caller now; what is under way goes on to its end."""
        job.fail(error)
        self.pump.stop(job, error)

    def bar(self, leases: frozenset[int]) -> list[Job]:
        """Jobs under these leases that have not ended."""
        self._barred.add(leases)
        return [job for job in self.jobs if not job.leases.isdisjoint(leases)]

    async def settled(self) -> None:
        """Returns when nothing of the jobs of now moves. A dead process's pool is no place to move to: once it has
        been gone for the quarantine, which may begin during this wait, it is enough that the sources are not read."""
        for job in list(self.jobs):
            await asyncio.wait((job.end, self.side.at_rest), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.shield(job.free)  # comes with the end, or before it
