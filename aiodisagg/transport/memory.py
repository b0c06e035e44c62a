"""The reference: pools of one process, found through a registry under a random name.

The writer's thread copies, but through the receiver's gate, so the receiver decides about every piece and ``revoke``
is a matter of one piece. Two transports may live on different loops in different threads.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import msgspec

from aiodisagg.errors import PeerGone, TransportClosed, TransportUnavailable, WriteFailed, WriteRefused
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.base import Admit, Capabilities, FenceKind, Remote, Slice, Transport, check_slices
from aiodisagg.transport.copying import INLINE_BYTES, Copying, CopyThreads, copy_into, pieces_of, result_of, settle
from aiodisagg.transport.description import pack, unpack
from aiodisagg.transport.landing import Landing

_PROCESS = secrets.token_hex(8)
_POOLS: dict[str, MemoryTransport] = {}


class _Pool(msgspec.Struct, frozen=True, array_like=True):
    process: str
    name: str
    incarnation: str


def _process() -> str:
    return f"{_PROCESS}-{os.getpid()}"  # a forked child has the token, but not the pools


class MemoryRemote(Remote):
    """A pool of this process. ``running``: copies into it that are not done yet."""

    def __init__(self, peer: str, landing: Landing) -> None:
        self.peer, self.size_bytes = peer, landing.size_bytes
        self.landing = landing
        self.running: set[Copying[Any]] = set()
        self.closed = False


class MemoryTransport(Transport):
    """Writes into pools of the same process; on threads above 256 KiB, on the loop's below."""

    name: ClassVar[str] = "memory"
    capabilities: ClassVar[Capabilities] = Capabilities(
        one_sided=False, fence=FenceKind.RECEIVER, device_memory=False, integrity=True
    )

    def __init__(self) -> None:
        self._threads = CopyThreads(self.name)
        self._pool_name = secrets.token_hex(8)
        self._incarnation = ""
        self._landing: Landing | None = None
        self._state = "new"

    async def open(self, arena: Arena | None, admit: Admit, *, incarnation: str) -> None:
        if self._state != "new":
            raise TransportClosed(self.name, f"opened when {self._state}")
        self._state, self._incarnation = "open", incarnation
        if arena is not None:
            self._landing = Landing(arena.view, admit)
            _POOLS[self._pool_name] = self

    def describe(self) -> bytes:
        self._check_open()
        if self._landing is None:
            raise TransportUnavailable(self.name, "opened without a pool")
        return pack(self.name, _Pool(_process(), self._pool_name, self._incarnation))

    async def connect(self, description: bytes, *, peer: str) -> MemoryRemote:
        self._check_open()
        pool = unpack(self.name, _Pool, description)
        if pool.process != _process():
            raise TransportUnavailable(self.name, "the pool belongs to another process", peer=peer)
        there = _POOLS.get(pool.name)
        if there is None or there._landing is None:
            raise PeerGone(self.name, "its pool was closed", peer=peer)
        if there._incarnation != peer:
            raise PeerGone(self.name, f"incarnation {there._incarnation} answers there", peer=peer)
        return MemoryRemote(peer, there._landing)

    async def write(self, remote: Remote, slices: Sequence[Slice]) -> None:
        pool = self._mine(remote)
        if pool.closed:
            raise TransportClosed(self.name, "disconnected", peer=remote.peer)
        total = check_slices(self.name, remote, slices)
        for one in slices:
            if not pool.landing.admits(one.offset, one.source.nbytes, one.lease):
                raise self._refusal(pool, one)
        if total <= INLINE_BYTES:
            for one in slices:
                self._place(pool, one)
            await asyncio.sleep(0)  # many small writes in a row still let the loop turn
            return
        copying = self._threads.start(pieces_of(slices), partial(self._place, pool))
        pool.running.add(copying)
        copying.done.add_done_callback(lambda _: pool.running.discard(copying))
        await result_of(copying, WriteFailed(self.name, "cancelled", peer=remote.peer))

    def _place(self, pool: MemoryRemote, piece: Slice) -> None:
        target = pool.landing.enter(piece.offset, piece.source.nbytes, piece.lease)
        if target is None:
            raise self._refusal(pool, piece)
        try:
            copy_into(target, piece.source)
        finally:
            del target
            pool.landing.leave(piece.lease)

    def _refusal(self, pool: MemoryRemote, one: Slice) -> PeerGone | WriteRefused:
        if pool.landing.closed:
            return PeerGone(self.name, "its pool was closed", peer=pool.peer)
        return WriteRefused(self.name, f"lease {one.lease} does not cover offset {one.offset}", peer=pool.peer)

    async def fence(self, remote: Remote) -> None:
        await settle(self._mine(remote, closing=True).running)

    async def revoke(self, peer: str, leases: Sequence[int]) -> None:
        self._check_open()
        if self._landing is not None:
            await self._landing.settled(leases)

    async def disconnect(self, remote: Remote) -> None:
        pool = self._mine(remote, closing=True)
        pool.closed = True
        await settle(pool.running)

    async def aclose(self) -> None:
        self._state = "closed"
        _POOLS.pop(self._pool_name, None)
        await self._threads.aclose(TransportClosed(self.name, "closed in mid-write"))
        if self._landing is not None:
            await self._landing.aclose()

    def _check_open(self) -> None:
        if self._state != "open":
            raise TransportClosed(self.name, f"used when {self._state}")

    def _mine(self, remote: Remote, *, closing: bool = False) -> MemoryRemote:
        if not closing:
            self._check_open()
        if not isinstance(remote, MemoryRemote):
            raise TypeError(f"{remote!r} was not made by this transport")
        return remote
