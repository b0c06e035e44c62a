"""Plain TCP: bytes go from the source into the socket and from the socket into the lent range, on the loop's thread.

The fast path between hosts without RDMA, on asyncio and uvloop alike. The receiver asks ``admit`` before each
``recv``; a lease that is withdrawn ends a chunk in its middle, the rest is read and dropped. Since all of this happens
in single turns of one loop, ``revoke`` has nothing to wait for. The sender gives slices of the sources to ``send`` on
a socket of its own beside the one that asyncio reads answers from: asyncio's transports would copy
(:mod:`aiodisagg.transport.stream_line`; with TLS they have to). What is sent when, and when a write has ended:
:mod:`aiodisagg.transport.chunks`.

The network is open to strangers: who has not said the pool's token (it travels in the description, and that on the
control link) is not read from, and sent away after ``connect_timeout_s``, or after a second when 64 others came later
and have not said it either. With TLS a connection is not ours before its handshake, which has nothing but that time.
Hosts that vanish are noticed by the kernel.

Memory beyond the pools: nothing but kernel sockets, 4 KiB per connection, and 256 KiB where bytes were dropped.
A lost connection is not made again: the remote is gone, and the caller connects anew.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import secrets
import socket
import ssl
import weakref
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from aiodisagg.errors import (
    ConfigError,
    PeerGone,
    TransportClosed,
    TransportError,
    TransportUnavailable,
    WriteFailed,
)
from aiodisagg.strangers import Strangers
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.base import Admit, Capabilities, FenceKind, Remote, Slice, Transport, check_slices
from aiodisagg.transport.chunks import Chunk, Gone, Hello, Outgoing, Placed, Rejected, Welcome, Word
from aiodisagg.transport.description import pack, unpack
from aiodisagg.transport.stream_line import Line
from aiodisagg.transport.wire import Wire, watch_hosts

log = logging.getLogger(__name__)

NAME = "stream"
CHUNK_BYTES = 16 << 20
SMALL_BYTES = 1 << 20
_LINES = 2


class _Pool(msgspec.Struct, frozen=True, array_like=True):
    host: str
    port: int
    incarnation: str
    token: bytes
    tls: bool = False


class _Receiving:
    """The receiver's side of all its connections."""

    def __init__(self, arena: Arena, admit: Admit, incarnation: str, greet_s: float) -> None:
        self._arena, self._admit, self._incarnation = arena, admit, incarnation
        self._session, self.token = secrets.randbits(62), secrets.token_bytes(16)
        self.greeting: Strangers[Wire] = Strangers(greet_s, Wire.abort)
        self.wires: weakref.WeakSet[Wire] = weakref.WeakSet()  # of one whose TLS handshake fails we never hear again

    def heard(self, wire: Wire, word: Word) -> None:
        match word:
            case Hello(_, expected, token) if expected == self._incarnation and hmac.compare_digest(token, self.token):
                self.greeting.discard(wire)
                wire.say(Welcome(self._session, self._arena.size_bytes))
            case Hello():
                wire.say(Gone("another incarnation answers there"))
            case Chunk() if wire not in self.greeting:
                pass
            case _:
                wire.abort("not what a writer says")

    def place(self, chunk: Chunk, start: int) -> memoryview | None:
        offset, stop = chunk.offset + start, chunk.offset + chunk.size_bytes
        if chunk.session != self._session or offset < 0 or stop > self._arena.size_bytes:
            return None
        try:
            admitted = self._admit(offset, stop - offset, chunk.lease)
        except Exception:
            log.exception("admit failed for lease %d; refused", chunk.lease)
            return None
        return self._arena.view[offset:stop] if admitted else None

    def landed(self, wire: Wire, chunk: Chunk, whole: bool) -> None:
        if whole:
            wire.say(Placed(chunk.number))
        elif chunk.session != self._session:
            wire.say(Rejected(chunk.number, True, "the session is another incarnation's"))
        else:
            wire.say(Rejected(chunk.number, False, f"lease {chunk.lease} does not cover offset {chunk.offset}"))

    def made(self) -> Wire:
        wire = Wire(self)
        self.wires.add(wire)
        self.greeting.add(wire)
        return wire

    def lost(self, wire: Wire) -> None:
        self.greeting.discard(wire)
        self.wires.discard(wire)


class StreamRemote(Remote):
    """A pool behind two TCP connections: small writes have one of their own, so that they do not wait behind the
    megabytes of a huge one that the kernel has accepted. ``ends``: one future per write that has not ended."""

    def __init__(self, peer: str) -> None:
        self.peer, self.size_bytes = peer, 0
        self.closed = False
        self.gone: TransportError | None = None
        self.ends: set[asyncio.Future[None]] = set()
        self.lines: list[Line] = []

    def add(self, write: Outgoing, size_bytes: int) -> None:
        self.lines[size_bytes > SMALL_BYTES].add(write)

    def lose(self, error: TransportError) -> None:
        """Ends both connections; the first reason stays."""
        self.gone = self.gone or error
        for line in self.lines:
            line.lose(error)

    async def end(self) -> None:
        """After ``lose``: returns when nothing of the connections is left."""
        for line in self.lines:
            await line.end()


class StreamTransport(Transport):
    """See the module's text.

    Args:
        host: address (not a name) to listen on.
        port: 0 takes a free one.
        advertise: address under which others reach this host; needed when ``host`` is a wildcard.
        chunk_bytes: largest piece of a write; how long one of more than 1 MiB waits for a huge one.
        window: unanswered chunks per connection.
        connect_timeout_s: for the connection and the peer's answer, and for the greeting of those who connect.
        tls: for those who connect, and for connecting to others: everything is encrypted, and peers prove themselves
            as the contexts demand. The address must be in a peer's certificate if its name is checked.
        stall_s: a peer that takes no bytes and answers no chunk for so long is given up, though its connection lives;
            and a writer whose host answers nothing.
    """

    name: ClassVar[str] = NAME
    capabilities: ClassVar[Capabilities] = Capabilities(
        one_sided=False, fence=FenceKind.RECEIVER, device_memory=False, integrity=False
    )

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        window: int = 4,
        connect_timeout_s: float = 5.0,
        stall_s: float = 30.0,
    ) -> None:
        if chunk_bytes < 1 or window < 1:
            raise ConfigError("chunk_bytes" if chunk_bytes < 1 else "window", "must be positive")
        self._host, self._advertise = _address("host", host), _address("advertise", advertise or host)
        self._port, self._chunk_bytes, self._window = port, chunk_bytes, window
        self._server_tls = tls[0] if tls is not None else None
        self._client_tls = tls[1] if tls is not None else None
        self._connect_timeout_s, self._stall_s = connect_timeout_s, stall_s
        self._state = "new"
        self._incarnation = ""
        self._receiving: _Receiving | None = None
        self._server: asyncio.Server | None = None
        self._remotes: set[StreamRemote] = set()

    async def open(self, arena: Arena | None, admit: Admit, *, incarnation: str) -> None:
        if self._state != "new":
            raise TransportClosed(NAME, f"opened when {self._state}")
        if arena is not None and ipaddress.ip_address(self._advertise).is_unspecified:
            raise ConfigError("advertise", f"others cannot connect to {self._advertise}; name an address")
        self._state, self._incarnation = "open", incarnation
        if arena is None:
            return
        self._receiving = _Receiving(arena, admit, incarnation, self._connect_timeout_s)
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._receiving.made, self._host, self._port, reuse_address=True, ssl=self._server_tls,
                ssl_handshake_timeout=None if self._server_tls is None else self._connect_timeout_s,
            )  # fmt: skip
        except OSError as error:
            self._state = "closed"
            raise TransportUnavailable(NAME, f"cannot listen on {self._host}:{self._port}: {error}") from error
        (listening,) = self._server.sockets
        watch_hosts(listening, self._stall_s)
        self._port = listening.getsockname()[1]

    def describe(self) -> bytes:
        self._check_open()
        if self._receiving is None:
            raise TransportUnavailable(NAME, "opened without a pool")
        token, tls = self._receiving.token, self._server_tls is not None
        return pack(NAME, _Pool(self._advertise, self._port, self._incarnation, token, tls))

    async def connect(self, description: bytes, *, peer: str) -> StreamRemote:
        self._check_open()
        pool = unpack(NAME, _Pool, description)
        try:
            host = _address("host", pool.host)
        except ConfigError as error:
            raise TransportUnavailable(NAME, f"the peer's description: {error}", peer=peer) from error
        if pool.tls != (self._client_tls is not None):
            text = "the peer wants TLS, and none is set up here" if pool.tls else "the peer has no TLS, which is wanted"
            raise TransportUnavailable(NAME, text, peer=peer)
        remote = StreamRemote(peer)
        self._remotes.add(remote)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                for _ in range(_LINES):
                    remote.size_bytes = (await self._dial(remote, host, pool)).size_bytes
            self._check_open()
            if remote.gone is not None:
                raise PeerGone(NAME, str(remote.gone), peer=peer) from remote.gone
        except BaseException as error:
            self._remotes.discard(remote)
            remote.lose(PeerGone(NAME, "given up", peer=peer))
            await remote.end()
            if isinstance(error, TimeoutError):
                raise PeerGone(NAME, f"no answer in {self._connect_timeout_s:g} s", peer=peer) from error
            if isinstance(error, (OSError, OverflowError)):
                raise PeerGone(NAME, f"cannot connect to {host}:{pool.port}: {error}", peer=peer) from error
            raise
        return remote

    async def _dial(self, remote: StreamRemote, host: str, pool: _Pool) -> Welcome:
        """One more line of a remote, which is told of its loss from then on."""
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, (host, pool.port))
            tls = self._client_tls
            own = sock.dup() if tls is None else None
            line = Line(NAME, remote.peer, own, self._window, self._stall_s, remote.lose)
            remote.lines.append(line)
            try:
                await loop.create_connection(
                    lambda: line.wire, sock=sock, ssl=tls, server_hostname=host if tls is not None else None
                )
            except BaseException:
                line.wire.gave_up()
                raise
        except BaseException:
            sock.close()
            raise
        line.start(self._incarnation, pool.token)  # the socket is asyncio's now
        return await line.welcome

    async def write(self, remote: Remote, slices: Sequence[Slice]) -> None:
        pool = self._mine(remote)
        self._check_open()
        if pool.closed:
            raise TransportClosed(NAME, "disconnected", peer=remote.peer)
        if pool.gone is not None:
            raise PeerGone(NAME, "the connection is lost", peer=remote.peer) from pool.gone
        total = check_slices(NAME, remote, slices)
        if not total:
            return
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        end.add_done_callback(lambda done: done.exception())  # a cancelled writer asks for no result
        end.add_done_callback(pool.ends.discard)
        pool.ends.add(end)

        def ended(error: Exception | None) -> None:
            if error is None:
                end.set_result(None)
            else:
                end.set_exception(error)

        write = Outgoing(slices, self._chunk_bytes, ended)
        pool.add(write, total)
        try:
            await asyncio.shield(end)
        except asyncio.CancelledError:
            write.fail(WriteFailed(NAME, "cancelled", peer=remote.peer))
            raise

    async def fence(self, remote: Remote) -> None:
        """A chunk in flight is waited for: until its answer, or until the connection counts as lost."""
        if ends := self._mine(remote).ends:
            await asyncio.wait(set(ends))

    async def revoke(self, peer: str, leases: Sequence[int]) -> None:
        self._check_open()

    async def disconnect(self, remote: Remote) -> None:
        pool = self._mine(remote)
        pool.closed = True
        await self.fence(pool)
        self._remotes.discard(pool)
        pool.lose(TransportClosed(NAME, "disconnected", peer=pool.peer))
        await pool.end()

    async def aclose(self) -> None:
        self._state = "closed"
        if self._server is not None:
            self._server.close()
        if self._receiving is not None:
            self._receiving.greeting.close()
            for wire in list(self._receiving.wires):
                await wire.end()
        for remote in list(self._remotes):
            remote.lose(TransportClosed(NAME, "closed in mid-write", peer=remote.peer))
            await self.disconnect(remote)
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    def _check_open(self) -> None:
        if self._state != "open":
            raise TransportClosed(NAME, f"used when {self._state}")

    def _mine(self, remote: Remote) -> StreamRemote:
        if not isinstance(remote, StreamRemote):
            raise TypeError(f"{remote!r} was not made by this transport")
        return remote


def _address(key: str, text: str) -> str:
    """An address and never a name: names in descriptions are untrusted, and a look-up takes as long as it likes."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise ConfigError(key, f"{text!r} is not an IP address") from error
