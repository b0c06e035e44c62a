"""Plain ZMQ over TCP: the conservative fallback that passes proxies and firewalls.

The receiver binds a ROUTER, each connected writer is a DEALER; one thread per transport owns them all
(:mod:`aiodisagg.transport.zmq_pump`). Bytes leave without a copy and arrive by ``recv_into`` in the lent range, after
``admit``. What is sent when, and when a write has ended: :mod:`aiodisagg.transport.chunks`.

Memory beyond the pools: a receiver buffers at most ``window + 4`` chunks per connection (12 MiB by default, and a
writer has two), honest or not, because of its high-water mark and its limit on a message's size; a writer buffers
nothing but its kernel sockets. A connection that is lost is not made again, because ZMQ would silently drop chunks and
might find another process at the address: the remote is gone, and the caller connects anew.

ZMQ has no way to end one connection of a ROUTER. Who does not begin with a greeting, or with CURVE does not know the
key, is sent away in ``connect_timeout_s``; any other stranger keeps a descriptor for as long as it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import msgspec

from aiodisagg.errors import ConfigError, PeerGone, TransportClosed, TransportError, TransportUnavailable, WriteFailed
from aiodisagg.transport import chunks
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.base import Admit, Capabilities, FenceKind, Remote, Slice, Transport, check_slices
from aiodisagg.transport.chunks import Outgoing
from aiodisagg.transport.description import pack, unpack
from aiodisagg.transport.landing import Landing
from aiodisagg.transport.zmq_pump import NAME, Link, Options, Pump, endpoint, has_curve

SMALL_BYTES = 1 << 20
_LINKS = 2


class _Pool(msgspec.Struct, frozen=True, array_like=True):
    host: str
    port: int
    incarnation: str
    token: bytes
    """Who does not say it first is not read from."""
    server_key: bytes
    """CURVE key of the receiver; empty without encryption."""


class ZmqRemote(Remote):
    """A pool behind two DEALERs: small writes have one of their own, so that they do not wait behind the chunks of a
    huge one that ZMQ has accepted. ``ends``: one future per write that has not ended."""

    def __init__(self, peer: str) -> None:
        self.peer, self.size_bytes = peer, 0
        self.closed = False
        self.lost: TransportError | None = None
        self.ends: set[asyncio.Future[None]] = set()
        self.links: tuple[Link, ...] = ()


class ZmqTransport(Transport):
    """See the module's text.

    Args:
        host: address (not a name) to listen on.
        port: 0 takes a free one.
        advertise: address under which others reach this host; needed when ``host`` is a wildcard.
        encrypt: CURVE. The key travels in the description: who cannot read that cannot connect.
        chunk_bytes: largest piece of a write; the same on both sides.
        window: unanswered chunks per connection.
        heartbeat_s: a peer that is silent for five times as long is gone.
        connect_timeout_s: for the connection and the peer's answer, and for ZMQ's handshake with those who connect.
        stall_s: a peer that answers no chunk for so long is given up, though its connection lives.
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
        encrypt: bool = False,
        chunk_bytes: int = chunks.CHUNK_BYTES,
        window: int = 2,
        heartbeat_s: float = 2.0,
        connect_timeout_s: float = 5.0,
        stall_s: float = 60.0,
    ) -> None:
        if chunk_bytes < 1 or window < 1:
            raise ConfigError("chunk_bytes" if chunk_bytes < 1 else "window", "must be positive")
        self._options = Options(
            _address("host", host), port, encrypt, chunk_bytes, window, max(0.05, heartbeat_s), stall_s,
            greet_s=connect_timeout_s,
        )  # fmt: skip
        self._advertise = _address("advertise", advertise or host)
        self._connect_timeout_s = connect_timeout_s
        self._state = "new"
        self._incarnation = ""
        self._port = 0
        self._landing: Landing | None = None
        self._pump: Pump | None = None

    async def open(self, arena: Arena | None, admit: Admit, *, incarnation: str) -> None:
        if self._state != "new":
            raise TransportClosed(NAME, f"opened when {self._state}")
        if arena is not None and ipaddress.ip_address(self._advertise).is_unspecified:
            raise ConfigError("advertise", f"others cannot connect to {self._advertise}; name an address")
        if self._options.encrypt and not has_curve():
            raise TransportUnavailable(NAME, "this libzmq has no CURVE")
        self._state, self._incarnation = "open", incarnation
        self._loop = asyncio.get_running_loop()
        if arena is not None:
            self._landing = Landing(arena.view, admit)
        bound: asyncio.Future[int] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._pump = Pump(
            self._options,
            self._landing,
            incarnation,
            started=lambda error, port: self._tell(_resolve, bound, error, port),
            ended=lambda: self._tell(_resolve, self._ended, None, None),
        )
        self._pump.start()
        try:
            self._port = await bound
        except BaseException:
            await self.aclose()
            raise

    def describe(self) -> bytes:
        pump = self._opened()
        if self._landing is None:
            raise TransportUnavailable(NAME, "opened without a pool")
        return pack(NAME, _Pool(self._advertise, self._port, self._incarnation, pump.token, pump.public_key))

    async def connect(self, description: bytes, *, peer: str) -> ZmqRemote:
        pump = self._opened()
        pool = unpack(NAME, _Pool, description)
        try:
            address = endpoint(_address("host", pool.host), pool.port)
        except ConfigError as error:
            raise TransportUnavailable(NAME, f"the peer's description: {error}", peer=peer) from error
        if bool(pool.server_key) != self._options.encrypt:
            text = "wants CURVE, and none is set up here" if pool.server_key else "has no CURVE, which is wanted"
            raise TransportUnavailable(NAME, f"the peer {text}", peer=peer)
        remote = ZmqRemote(peer)
        greetings = [self._link(pump, remote) for _ in range(_LINKS)]

        def dial() -> None:
            for link in remote.links:
                pump.dial(link, address, pool.server_key, pool.token)

        pump.call(dial)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                for greeting in greetings:
                    remote.size_bytes = await greeting
            if remote.lost is not None:
                raise PeerGone(NAME, str(remote.lost), peer=peer) from remote.lost
        except BaseException as error:
            for link in remote.links:
                pump.call(partial(pump.hang_up, link, PeerGone(NAME, "given up", peer=peer)))
            if isinstance(error, TimeoutError):
                raise PeerGone(NAME, f"no answer in {self._connect_timeout_s:g} s", peer=peer) from error
            raise
        return remote

    def _link(self, pump: Pump, remote: ZmqRemote) -> asyncio.Future[int]:
        """One more connection of a remote, not dialled; the pool's size once it is greeted. They are lost together."""
        greeted: asyncio.Future[int] = self._loop.create_future()
        greeted.add_done_callback(lambda done: done.cancelled() or done.exception())  # the other may fail first

        def lost(error: TransportError) -> None:
            for link in remote.links:
                pump.hang_up(link, error)
            self._tell(setattr, remote, "lost", error)

        greet = partial(self._tell, _resolve, greeted)
        remote.links += (Link(remote.peer, self._options.window, greeted=greet, lost=lost),)
        return greeted

    async def write(self, remote: Remote, slices: Sequence[Slice]) -> None:
        pool, pump = self._mine(remote), self._opened()
        if pool.closed:
            raise TransportClosed(NAME, "disconnected", peer=remote.peer)
        if pool.lost is not None:
            raise PeerGone(NAME, "the connection is lost", peer=remote.peer) from pool.lost
        total = check_slices(NAME, remote, slices)
        if not total:
            return
        end: asyncio.Future[None] = self._loop.create_future()
        end.add_done_callback(lambda done: done.exception())  # a cancelled writer asks for no result
        end.add_done_callback(pool.ends.discard)
        pool.ends.add(end)
        chunk_bytes = self._options.chunk_bytes
        write = Outgoing(slices, chunk_bytes, lambda error: self._tell(_resolve, end, error, None))
        pump.call(lambda: pump.send(pool.links[total > SMALL_BYTES], write))
        try:
            await asyncio.shield(end)
        except asyncio.CancelledError:
            pump.call(lambda: write.fail(WriteFailed(NAME, "cancelled", peer=remote.peer)))
            raise

    async def fence(self, remote: Remote) -> None:
        """A chunk in flight is waited for: until its answer, or until the connection counts as lost."""
        if ends := self._mine(remote).ends:
            await asyncio.wait(set(ends))

    async def revoke(self, peer: str, leases: Sequence[int]) -> None:
        self._opened()
        if self._landing is not None:
            await self._landing.settled(leases)

    async def disconnect(self, remote: Remote) -> None:
        pool = self._mine(remote)
        pool.closed = True
        await self.fence(pool)
        pump = self._pump
        if pump is not None and self._state == "open":
            pump.call(lambda: pump.hang_up(pool.links[0], TransportClosed(NAME, "disconnected", peer=pool.peer)))

    async def aclose(self) -> None:
        pump = self._pump
        if pump is not None:
            if self._state == "open":
                self._state = "closed"
                pump.call(pump.finish)
            await asyncio.shield(self._ended)
            pump.join()
        self._state = "closed"
        if self._landing is not None:
            await self._landing.aclose()

    def _opened(self) -> Pump:
        if self._state != "open" or self._pump is None:
            raise TransportClosed(NAME, f"used when {self._state}")
        return self._pump

    def _mine(self, remote: Remote) -> ZmqRemote:
        if not isinstance(remote, ZmqRemote):
            raise TypeError(f"{remote!r} was not made by this transport")
        return remote

    def _tell(self, callback: Callable[..., object], *args: object) -> None:
        """From the pump's thread to the loop's."""
        with contextlib.suppress(RuntimeError):  # the loop was closed under us: nobody waits any more
            self._loop.call_soon_threadsafe(callback, *args)


def _resolve(future: asyncio.Future[object], error: Exception | None, result: object) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _address(key: str, text: str) -> str:
    """An address and never a name: a look-up would block ZMQ's own thread, and names in descriptions are untrusted."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise ConfigError(key, f"{text!r} is not an IP address") from error
