"""A link: control messages between two peers that have proved who they are. ``dial`` opens one."""

from __future__ import annotations

import asyncio
import secrets
import ssl as tls
from collections.abc import Callable
from typing import NoReturn

from aiodisagg.errors import AuthenticationFailed, ConfigError, LinkError
from aiodisagg.link.address import TcpAddress, UnixAddress, check_user, connect_unix, is_loopback, parse, resolve
from aiodisagg.link.config import LinkConfig
from aiodisagg.link.connection import Connection
from aiodisagg.link.hello import NONCE_BYTES, Handshake, Hello, check_secret
from aiodisagg.link.room import SMALL_BYTES
from aiodisagg.protocol.messages import Message


class Link:
    """An open control link. Made by :func:`dial` and by :class:`~aiodisagg.link.server.LinkServer`.

    Messages of one side arrive in the order of its ``send`` and ``send_nowait`` calls, each once, or the link is
    closed. Any number of tasks may send; one task at a time receives. All methods belong to the loop's thread.
    """

    def __init__(self, connection: Connection) -> None:
        assert connection.handshake.remote is not None
        self.local: Hello = connection.handshake.local
        self.remote: Hello = connection.handshake.remote
        self._connection = connection

    async def send(self, message: Message) -> None:
        """Hands the message over to be sent; waits while more than ``high_water_bytes`` are under way.

        Returning does not mean that the peer has it. Cancelled while it waits, the message is not sent; it is never
        sent in part.

        Raises:
            LinkClosed: the link is, or becomes, closed.
            MessageTooLarge: for this side's ``max_frame_bytes`` or the other's; the link stays open.
        """
        await self._connection.send(message)

    def send_nowait(self, message: Message) -> None:
        """``send`` without waiting, for small words. Past ``max_unsent_bytes`` in waiting it closes the link.

        Raises: as ``send``.
        """
        self._connection.send_nowait(message)

    async def deliver(self, handle: Callable[[Message], None]) -> NoReturn:
        """Calls ``handle`` with every message, in order and right where the socket is read, until the link is closed:
        there and back that saves two wake-ups of a task. ``handle`` must not block, and may send.

        Cancelling loses none: later messages are kept for the next ``deliver`` or ``recv``.

        Raises:
            LinkClosed: as ``recv``, after the last message. And whatever ``handle`` raises, which ends the delivery.
            RuntimeError: another task is already receiving.
        """
        await self._connection.deliver(handle)

    async def recv(self) -> Message:
        """The next message. Cancelling loses none.

        Raises:
            LinkClosed: the link is closed and every message that came before its end was taken. ``__cause__`` is the
                RemoteProtocolError if the peer broke the protocol.
            RuntimeError: another task is already receiving.
        """
        return await self._connection.recv()

    @property
    def closed(self) -> bool:
        """Nothing more can be sent. Messages that already came may still be taken."""
        return self._connection.reason is not None

    @property
    def parted(self) -> bool:
        """The peer closed it on purpose and said goodbye: it did not die."""
        return self._connection.parted

    @property
    def quiet(self) -> bool:
        """Nothing was heard of the peer for two heartbeats or longer: perhaps it is gone."""
        return self._connection.quiet

    @property
    def far_host(self) -> str:
        """Literal address of the other end, if the link is over TCP; else empty."""
        return self._connection.far_host

    @property
    def bytes_sent(self) -> int:
        """Bytes written to the socket so far, framing included."""
        return self._connection.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes read from the socket so far, framing included."""
        return self._connection.bytes_received

    async def wait_closed(self) -> None:
        """Returns when the link is closed, by whomever, and its socket is gone."""
        await self._connection.lost.wait()

    async def aclose(self) -> None:
        """Says goodbye and closes; tries for ``close_timeout_s`` to get out what was sent. Idempotent.

        Messages not yet taken are dropped; who waits in ``recv`` or ``send`` gets LinkClosed.
        """
        self._connection.fail("closed", "closed here")
        self._connection.drop_received()
        try:
            await self._connection.lost.wait()
        except asyncio.CancelledError:
            self._connection.abort()
            raise

    def abort(self) -> None:
        """Cuts the connection now, without a word to the peer; for a link that is known to be useless."""
        self._connection.abort()

    def __repr__(self) -> str:
        reason = self._connection.reason
        return f"<Link {self.local.name} - {self._connection.peer} {'open' if reason is None else reason}>"


async def dial(
    address: str,
    hello: Hello,
    *,
    secret: bytes | None = None,
    config: LinkConfig | None = None,
    ssl: tls.SSLContext | None = None,
) -> Link:
    """Opens a link to the peer that listens at ``address``.

    Args:
        address: ``unix:@name``, ``unix:/path`` or ``tcp:host:port``.
        hello: what this side says of itself.
        secret: shared by all peers, at least 16 bytes; None is possible on this host only.
        ssl: TLS for a ``tcp:`` address.

    Raises:
        ConfigError: ``address`` is none, or leaves this host without a secret.
        LinkError: nobody listens there, or no handshake within ``handshake_timeout_s``. Trying again may help.
        AuthenticationFailed: one of the two does not know the other's secret.
        RemoteProtocolError: something else listens there, or another version.
    """
    config = config or LinkConfig()
    check_secret(secret)
    target = parse(address)
    connection: Connection | None = None
    ends = isinstance(target, UnixAddress)
    """Whether the connection is told of its end: uvloop tells none that was in the making when it was given up."""

    def protocol() -> Connection:
        nonlocal connection
        handshake = Handshake(
            dialling=True,
            hello=hello.accepting(min(config.max_frame_bytes, SMALL_BYTES)),
            secret=secret,
            nonce=secrets.token_bytes(NONCE_BYTES),
            peer=address,
        )
        connection = Connection(handshake, config, peer=address)
        return connection

    try:
        async with asyncio.timeout(config.handshake_timeout_s):
            if isinstance(target, UnixAddress):
                await _connect_unix(protocol, target, same_user=secret is None)
            else:
                hosts = await _resolve_trusted(target, secret)
                await _connect_tcp(protocol, target, hosts, ssl, config.handshake_timeout_s)
                ends = True
            assert connection is not None
            await connection.ready
        return Link(connection)
    except BaseException as error:
        if connection is not None:
            connection.abort()
            if ends:
                await connection.lost.wait()  # the loop's next turn: the caller gets an error and no open socket
        if isinstance(error, TimeoutError):
            raise LinkError(address, f"no handshake within {config.handshake_timeout_s:g} s") from error
        if isinstance(error, OSError):
            raise LinkError(address, f"cannot connect: {error.strerror or error}") from error
        raise


async def _connect_unix(protocol: Callable[[], Connection], target: UnixAddress, *, same_user: bool) -> None:
    sock = connect_unix(target)
    if same_user:
        try:
            check_user(sock, str(target))
        except AuthenticationFailed:
            sock.close()
            raise
    loop = asyncio.get_running_loop()
    opening = loop.create_task(loop.create_unix_connection(protocol, sock=sock))
    try:
        # Two turns of the loop, no I/O. Not to be cancelled: uvloop would close the descriptor and leave it to be
        # closed once more by the socket object, when it may belong to somebody else.
        await asyncio.shield(opening)
    except asyncio.CancelledError:
        await asyncio.wait({opening})
        raise


async def _resolve_trusted(target: TcpAddress, secret: bytes | None) -> list[str]:
    """Literal addresses to try; checked after the look-up, so a name cannot lead elsewhere."""
    hosts = await resolve(target)
    if secret is None and not all(is_loopback(host) for host in hosts):
        text = f"{target} is not on this host; links to other hosts need a shared secret (--secret-file)"
        raise ConfigError("secret", text)
    return hosts


async def _connect_tcp(
    protocol: Callable[[], Connection], target: TcpAddress, hosts: list[str], ssl: tls.SSLContext | None,
    timeout_s: float,
) -> None:  # fmt: skip
    """Each address has its part of the time: one that swallows packets does not keep the others from being tried."""
    loop = asyncio.get_running_loop()
    server_name = target.host if ssl is not None else None
    for host in hosts[:-1]:
        try:
            async with asyncio.timeout(timeout_s / len(hosts)):
                await loop.create_connection(protocol, host, target.port, ssl=ssl, server_hostname=server_name)
            return
        except OSError:
            continue
    await loop.create_connection(protocol, hosts[-1], target.port, ssl=ssl, server_hostname=server_name)
