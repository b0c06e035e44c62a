"""The writer's side of an ipc pool: its mapping, the copies and views under way in it, and the promises about them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import mmap
import os
import socket
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np

from aiodisagg.errors import PeerGone, TransportClosed, WriteRefused
from aiodisagg.transport import attach
from aiodisagg.transport.arena import is_sealed, populate, unmap, want_huge_pages
from aiodisagg.transport.attach import Bar, BarList, Barred, Goodbye
from aiodisagg.transport.base import Remote, Slice
from aiodisagg.transport.copying import Copying, CopyThreads, copy_into, settle
from aiodisagg.transport.past_caches import copy_past_caches


async def map_pool(fd: int, size_bytes: int, threads: CopyThreads) -> mmap.mmap:
    """Maps a pool and its pages, on a thread. Raises OSError or ValueError for what is not an arena of that size.

    The mapping is not inherited by forked children: they could write after this process promised not to.
    """
    if not is_sealed(fd) or os.fstat(fd).st_size != size_bytes:
        raise ValueError("the descriptor is not a pool of the announced size")
    mapping = mmap.mmap(fd, size_bytes)
    mapping.madvise(mmap.MADV_DONTFORK)
    want_huge_pages(mapping)

    def touch(whole: mmap.mmap) -> None:
        populate(np.frombuffer(whole, np.uint8).ctypes.data, size_bytes)

    await asyncio.shield(threads.start(iter((mapping,)), touch).done)
    return mapping


class IpcRemote(Remote):
    """A mapped pool. Its socket ends with a goodbye, which is a promise: nothing is written through it any more.

    ``mapping`` and ``fd``, the file behind it, are its own from now on.
    """

    def __init__(
        self, transport: str, peer: str, sock: socket.socket, mapping: mmap.mmap, fd: int, barred: Iterable[int]
    ) -> None:
        self.peer, self.size_bytes = peer, len(mapping)
        self._bytes = memoryview(mapping)
        self.address = int(np.frombuffer(mapping, np.uint8).ctypes.data)
        """Where the pool is mapped: devices are told, and must have forgotten it before ``close``."""
        self.gone = False
        self.closed = False
        self._transport = transport
        self._mapping, self._fd = mapping, fd
        self._unmapping: asyncio.Future[None] | None = None
        self._sock: socket.socket | None = sock
        self._barred = BarList(1 << 16)
        self._barred.add(barred)
        self._bar: Bar | None = None
        self._running: set[Copying[Any]] = set()
        self._views: dict[int, tuple[int, asyncio.Future[None], weakref.ref[Any]]] = {}
        self._view_numbers = itertools.count()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._loop.add_reader(sock.fileno(), self._on_message)

    def check(self, leases: Iterable[int]) -> None:
        """Raises what forbids to write under these leases."""
        if self.closed:
            raise TransportClosed(self._transport, "disconnected", peer=self.peer)
        if self.gone:
            raise PeerGone(self._transport, "ended", peer=self.peer)
        for lease in leases:
            if lease in self._barred:
                raise WriteRefused(self._transport, f"lease {lease} was revoked", peer=self.peer)

    def view(self, offset: int, size_bytes: int, lease: int) -> memoryview:
        """``size_bytes`` writable bytes at ``offset`` of the peer's pool, for a producer that writes there itself.

        The bytes count as written when the producer says so. Until the last reference to the view, or to anything
        made from it (a slice, an array, a tensor), is gone, the lease cannot be revoked and ``fence`` waits.

        Raises:
            WriteRefused: outside the pool, or the lease was revoked.
            PeerGone, TransportClosed: as ``write``.
        """
        self.check((lease,))
        if offset < 0 or size_bytes <= 0 or offset + size_bytes > self.size_bytes:
            text = f"[{offset}, {offset + size_bytes}) is outside the pool of {self.size_bytes} bytes"
            raise WriteRefused(self._transport, text, peer=self.peer)
        number = next(self._view_numbers)
        base = np.frombuffer(self._mapping, np.uint8, size_bytes, offset)
        dropped = weakref.ref(base, lambda _: self._view_dropped(number))
        self._views[number] = lease, self._loop.create_future(), dropped
        return memoryview(base)  # type: ignore[arg-type]  # numpy's stubs do not say that arrays are buffers

    def place(self, piece: Slice) -> None:
        """One copy, here and now. On any thread, unless the remote is closed."""
        copy_into(self._range(piece), piece.source)

    def place_past_caches(self, piece: Slice) -> None:
        """The same for a piece of much."""
        copy_past_caches(self._range(piece), piece.source)

    def track(self, copying: Copying[Any]) -> None:
        self._running.add(copying)
        copying.done.add_done_callback(lambda _: self._copy_ended(copying))

    async def settled(self) -> None:
        """Returns when every copy and view that exists now has ended."""
        views = [future for _, future, _ in self._views.values()]
        await settle(self._running)
        if views:
            await asyncio.wait(views)

    async def close(self) -> None:
        """Waits for the copies, says goodbye after the last view, unmaps. Idempotent."""
        self.closed = True
        await settle(self._running)
        self._end()
        if self._unmapping is not None:
            await asyncio.shield(self._unmapping)

    def _range(self, piece: Slice) -> memoryview:
        return self._bytes[piece.offset : piece.offset + piece.source.nbytes]

    def _view_dropped(self, number: int) -> None:
        """On whichever thread dropped the last reference to a view; the loop's own need not be woken up."""
        soon = self._loop.call_soon if threading.get_ident() == self._thread else self._loop.call_soon_threadsafe
        with contextlib.suppress(RuntimeError):  # the loop is closed: the end of this process will have to do
            soon(self._view_ended, number)

    def _view_ended(self, number: int) -> None:
        _, future, _ = self._views.pop(number)
        if not future.done():
            future.set_result(None)
        self._answer()
        if self.closed:
            self._end()

    def _copy_ended(self, copying: Copying[Any]) -> None:
        self._running.discard(copying)
        self._answer()

    def _on_message(self) -> None:
        assert self._sock is not None
        try:
            packet = self._sock.recv(attach.MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        message = attach.decode(packet)
        if not isinstance(message, Bar):
            self._lose()
            return
        self._bar = message
        self._barred.add(message.leases)
        for copying in self._running:
            if not copying.leases.isdisjoint(message.leases):
                copying.stop(WriteRefused(self._transport, "its lease was revoked in mid-write", peer=self.peer))
        self._answer()

    def _answer(self) -> None:
        """The receiver's question is answered once nothing under its leases is being written."""
        if self._bar is None or self._sock is None:
            return
        leases = frozenset(self._bar.leases)
        if any(lease in leases for lease, _, _ in self._views.values()):
            return
        if any(not copying.leases.isdisjoint(leases) for copying in self._running):
            return
        try:
            self._sock.send(attach.encode(Barred(self._bar.ticket)))
        except OSError:
            self._lose()
        self._bar = None

    def _lose(self) -> None:
        """The receiver closed or died. What is still copied lands in pages that nobody reads."""
        self.gone = True
        for copying in self._running:
            copying.stop(PeerGone(self._transport, "ended in mid-write", peer=self.peer))
        self._close_socket()

    def _close_socket(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _end(self) -> None:
        under_way = any(not copying.done.done() for copying in self._running)  # the loop may still owe some their end
        if self._views or under_way or self._unmapping is not None:
            return
        if self._sock is not None:
            with contextlib.suppress(OSError):  # the receiver is gone; nobody needs the promise
                self._sock.send(attach.encode(Goodbye()))
            self._close_socket()
        self._bytes.release()
        self._unmapping = self._loop.run_in_executor(None, unmap, self._mapping, self._fd)
