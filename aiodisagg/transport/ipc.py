"""Shared memory of one host and user: the writer maps the receiver's pool and copies once, or not at all.

The pool is a memfd, handed over a unix socket (see :mod:`aiodisagg.transport.attach`), so there is nothing in
``/dev/shm`` to leak and nobody without the descriptor can map it. The receiver does not see bytes arrive and cannot
refuse them: a lease is fenced by the writer (``FenceKind.WRITER``). ``revoke`` therefore asks every writer of that
peer to bar the leases and waits for its word, for its goodbye, or for the end of its process; a stopped process
holds ``revoke`` up until it runs again or dies. Leases revoked before a writer attaches are told to it then.

After ``aclose`` a writer that does not notice (a stopped one) may still write into the pool when it wakes up. The
arena must then be closed, not used again; the kernel keeps the pages for as long as that writer maps them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from aiodisagg.errors import PeerGone, TransportClosed, TransportUnavailable, WriteFailed
from aiodisagg.strangers import Strangers
from aiodisagg.transport import attach
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.attach import MAX_MESSAGE, Attach, Attached, Attachment, BarList, Goodbye, Refused
from aiodisagg.transport.base import Admit, Capabilities, FenceKind, Remote, Slice, Transport, check_slices
from aiodisagg.transport.copying import INLINE_BYTES, CopyThreads, pieces_of, result_of
from aiodisagg.transport.description import boot_id, pack, unpack
from aiodisagg.transport.mapping import IpcRemote, map_pool

log = logging.getLogger(__name__)

PAST_CACHES_BYTES = 8 << 20
"""From here on a write is more than a core's share of the caches, so its stores go past them."""
_BARRED_PER_PEER = 4096
_BARRED_PEERS = 1024


class _Pool(msgspec.Struct, frozen=True, array_like=True):
    address: str
    incarnation: str
    boot_id: str
    net_namespace: int
    size_bytes: int


class IpcTransport(Transport):
    """See the module's text. Copies run on threads above 256 KiB, on the loop's below."""

    name: ClassVar[str] = "ipc"
    capabilities: ClassVar[Capabilities] = Capabilities(
        one_sided=True, fence=FenceKind.WRITER, device_memory=False, integrity=True, zero_copy=True
    )

    def __init__(self, *, handshake_timeout_s: float = 5.0) -> None:
        self._threads = CopyThreads(self.name)
        self._timeout_s = handshake_timeout_s
        self._state = "new"
        self._incarnation = ""
        self._arena: Arena | None = None
        self._listener: socket.socket | None = None
        self._address = ""
        self._greeting: Strangers[socket.socket] = Strangers(handshake_timeout_s, _end)
        self._attachments: set[Attachment] = set()
        self._barred: OrderedDict[str, BarList] = OrderedDict()
        self._remotes: set[IpcRemote] = set()

    async def open(self, arena: Arena | None, admit: Admit, *, incarnation: str) -> None:
        if self._state != "new":
            raise TransportClosed(self.name, f"opened when {self._state}")
        if not hasattr(os, "pidfd_open") or not hasattr(os, "memfd_create"):
            raise TransportUnavailable(self.name, "needs Linux with pidfd and memfd")
        self._state, self._incarnation = "open", incarnation
        if arena is None:
            return
        self._arena = arena
        self._address = f"aiodisagg-{secrets.token_hex(16)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            listener.bind("\0" + self._address)
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise TransportUnavailable(self.name, f"cannot listen: {error}") from error
        self._listener = listener
        self._listen()

    def describe(self) -> bytes:
        self._check_open()
        if self._arena is None:
            raise TransportUnavailable(self.name, "opened without a pool")
        namespace = os.stat("/proc/self/ns/net").st_ino
        return pack(self.name, _Pool(self._address, self._incarnation, boot_id(), namespace, self._arena.size_bytes))

    # -- the receiver's side --------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors: the socket stays readable, so look away for a while
            log.warning("cannot accept a writer: %s", error)
            loop.remove_reader(self._listener.fileno())
            loop.call_later(1.0, self._listen)
            return
        if not attach.same_user(sock):
            sock.close()
            return
        sock.setblocking(False)
        self._greeting.add(sock)
        loop.add_reader(sock.fileno(), self._greet, sock)

    def _greet(self, sock: socket.socket) -> None:
        """Answers one ``Attach``; whatever is wrong with it ends this socket and nothing else."""
        assert self._arena is not None
        pidfd = -1
        try:
            asked = attach.decode(sock.recv(MAX_MESSAGE))
            if not isinstance(asked, Attach):
                raise ValueError("not an attach message")
            if asked.expected != self._incarnation:
                sock.send(attach.encode(Refused(True, f"incarnation {self._incarnation} answers there")))
                raise ValueError("another incarnation is expected")
            pidfd = attach.open_pidfd(sock)
            barred = self._barred.get(asked.writer)
            words = Attached(self._arena.size_bytes, barred.newest(_BARRED_PER_PEER) if barred else [])
            socket.send_fds(sock, [attach.encode(words)], [self._arena.fd])
        except BlockingIOError:
            return
        except (OSError, ValueError):
            if pidfd >= 0:
                os.close(pidfd)
            self._greeting.discard(sock)
            _end(sock)
            return
        self._greeting.discard(sock)
        asyncio.get_running_loop().remove_reader(sock.fileno())
        self._attachments.add(Attachment(sock, pidfd, asked.writer, self._attachments.discard))

    async def revoke(self, peer: str, leases: Sequence[int]) -> None:
        self._check_open()
        wanted = [lease for lease in leases if 0 <= lease < attach.MAX_LEASE]
        barred = self._barred.setdefault(peer, BarList(_BARRED_PER_PEER))
        self._barred.move_to_end(peer)
        if len(self._barred) > _BARRED_PEERS:
            self._barred.popitem(last=False)
        barred.add(wanted)
        if words := [word for one in self._attachments if one.peer == peer for word in one.bar(wanted)]:
            await asyncio.wait(words)
            for word in words:
                word.result()

    # -- the writer's side ----------------------------------------------------------------------------------------

    async def connect(self, description: bytes, *, peer: str) -> IpcRemote:
        self._check_open()
        pool = unpack(self.name, _Pool, description)
        if pool.boot_id != boot_id():
            raise TransportUnavailable(self.name, "the pool is on another machine", peer=peer)
        if pool.net_namespace != os.stat("/proc/self/ns/net").st_ino:
            raise TransportUnavailable(self.name, "the pool is in another network namespace", peer=peer)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        fds: list[int] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                await _connect(sock, "\0" + pool.address)
                if not attach.same_user(sock):
                    raise TransportUnavailable(self.name, "the pool belongs to another user", peer=peer)
                sock.send(attach.encode(Attach(self._incarnation, peer)))
                words = await _receive(sock, fds)
            self._check_open()
            if isinstance(words, Refused):
                raise PeerGone(self.name, words.message, peer=peer)
            if not isinstance(words, Attached) or len(fds) != 1 or words.size_bytes != pool.size_bytes:
                raise PeerGone(self.name, "something else answers there", peer=peer)
            mapped = await map_pool(fds[0], words.size_bytes, self._threads)
            self._check_open()
            remote = IpcRemote(self.name, peer, sock, mapped, fds.pop(), words.barred)
            sock = None  # type: ignore[assignment]  # it is the remote's now
        except TimeoutError as error:
            raise PeerGone(self.name, f"no answer in {self._timeout_s:g} s", peer=peer) from error
        except (OSError, ValueError) as error:
            raise PeerGone(self.name, f"cannot attach: {error}", peer=peer) from error
        finally:
            for fd in fds:
                os.close(fd)
            if sock is not None:
                with contextlib.suppress(OSError):  # else a receiver that has attached us waits for our process's end
                    sock.send(attach.encode(Goodbye()))
                sock.close()
        self._remotes.add(remote)
        return remote

    async def write(self, remote: Remote, slices: Sequence[Slice]) -> None:
        pool = self._mine(remote)
        self._check_open()
        total = check_slices(self.name, remote, slices)
        pool.check({one.lease for one in slices})
        if total <= INLINE_BYTES:
            for one in slices:
                pool.place(one)
            await asyncio.sleep(0)  # many small writes in a row still let the loop turn
        else:
            place = pool.place_past_caches if total >= PAST_CACHES_BYTES else pool.place
            copying = self._threads.start(pieces_of(slices), place, (one.lease for one in slices))
            pool.track(copying)
            await result_of(copying, WriteFailed(self.name, "cancelled", peer=remote.peer))
        if pool.gone:
            raise PeerGone(self.name, "ended in mid-write", peer=remote.peer)

    async def fence(self, remote: Remote) -> None:
        """Also waits for the views that were handed out before: drop them first."""
        await self._mine(remote).settled()

    async def disconnect(self, remote: Remote) -> None:
        """While views are still held, the goodbye waits for the last of them; this call does not."""
        pool = self._mine(remote)
        self._remotes.discard(pool)
        await pool.close()

    async def aclose(self) -> None:
        self._state = "closed"
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        self._greeting.close()
        for attachment in list(self._attachments):
            attachment.end(TransportClosed(self.name, "closed before the writer was fenced", peer=attachment.peer))
        await self._threads.aclose(TransportClosed(self.name, "closed in mid-write"))
        for remote in list(self._remotes):
            await self.disconnect(remote)

    def _check_open(self) -> None:
        if self._state != "open":
            raise TransportClosed(self.name, f"used when {self._state}")

    def _mine(self, remote: Remote) -> IpcRemote:
        if not isinstance(remote, IpcRemote):
            raise TypeError(f"{remote!r} was not made by this transport")
        return remote


def _end(sock: socket.socket, why: str = "") -> None:
    asyncio.get_running_loop().remove_reader(sock.fileno())
    sock.close()


async def _connect(sock: socket.socket, address: str) -> None:
    """asyncio's own sock_connect takes a full backlog (EAGAIN) for a connection."""
    while True:
        try:
            sock.connect(address)
            return
        except BlockingIOError:
            await asyncio.sleep(0.01)  # the kernel offers no event for room in a unix backlog


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _receive(sock: socket.socket, fds: list[int]) -> attach.Message | None:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock.fileno(), _set, readable)
    try:
        await readable
    finally:
        loop.remove_reader(sock.fileno())
    packet, got, _, _ = socket.recv_fds(sock, MAX_MESSAGE, 4, socket.MSG_CMSG_CLOEXEC)
    fds.extend(got)
    return attach.decode(packet)
