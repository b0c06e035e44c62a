"""The listening side: accepts connections, lets them prove themselves, hands each link to one task."""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl as tls
from collections.abc import Awaitable, Callable
from types import TracebackType

from aiodisagg.errors import AiodisaggError, ConfigError, LinkClosed, LinkError
from aiodisagg.link.address import (
    BACKLOG,
    TcpAddress,
    UnixAddress,
    inode_of,
    is_loopback,
    listen_unix,
    parse,
    reachable_host,
    remove_unix,
    resolve,
)
from aiodisagg.link.config import LinkConfig
from aiodisagg.link.connection import Connection
from aiodisagg.link.hello import NONCE_BYTES, Handshake, Hello, check_secret
from aiodisagg.link.link import Link
from aiodisagg.link.room import Room
from aiodisagg.strangers import Strangers

logger = logging.getLogger(__name__)

REFUSED = 256
"""So many who dial without success are remembered, the last ones."""
LEAVE_S = 30.0
"""For what was begun for a link to end, when the server's context is left: longer than any write over TCP, but a fence
over RDMA may have no end before its transport is closed, and that comes later."""


class LinkServer:
    """Listens for links; an async context manager.

    ``on_link`` runs in a task of its own for each link; when it returns or raises, its link is closed and nothing
    else happens. Leaving the context stops listening, cancels these tasks, waits for them (and cancels them once more
    after ``LEAVE_S``) and closes every link.

    How many clients may be unproved at a time, and for how long, is the rule of :mod:`aiodisagg.strangers`.

    Args:
        address: ``unix:`` (a fresh abstract name), ``unix:@name``, ``unix:/path``, ``tcp:host:port`` (0: any port).
        make_hello: what to say of this side, asked anew for each connection.
        on_link: serves one link.
        secret: shared by all peers, at least 16 bytes; None is possible on this host only, and then a unix socket
            accepts processes of the same user (or root) only.
        ssl: TLS for a ``tcp:`` address.
        advertise_host: the host in ``.address``, if it is not the one listened on.
    """

    def __init__(
        self,
        address: str,
        make_hello: Callable[[], Hello],
        *,
        on_link: Callable[[Link], Awaitable[None]],
        secret: bytes | None = None,
        config: LinkConfig | None = None,
        ssl: tls.SSLContext | None = None,
        advertise_host: str | None = None,
    ) -> None:
        check_secret(secret)
        self._wanted = parse(address)
        self._make_hello, self._on_link, self._secret = make_hello, on_link, secret
        self._config, self._ssl, self._advertise_host = config or LinkConfig(), ssl, advertise_host
        self._actual: UnixAddress | TcpAddress | None = None
        self._inode: int | None = None
        self._server: asyncio.Server | None = None
        self._tasks: dict[asyncio.Task[None], Connection] = {}
        self._closing = False
        self._refused: dict[str, str] = {}
        """Why there was no link, by who dialled, as it was warned of. Whoever dials for ever is warned of once."""
        self._room = Room(self._config.max_frame_bytes)
        self._unproved: Strangers[Connection] = Strangers(self._config.handshake_timeout_s, _send_away)

    @property
    def address(self) -> str:
        """Where others dial: the real port, never a wildcard host. Valid inside the context."""
        if self._actual is None:
            raise RuntimeError("the server is not listening")
        return str(self._actual)

    @property
    def links(self) -> int:
        """Connections being served, handshakes included."""
        return len(self._tasks)

    async def __aenter__(self) -> LinkServer:
        """Raises ConfigError: address in use or not ours, or reachable by other hosts without a secret."""
        server = await self._bind()
        try:
            await (
                server.start_serving()
            )  # asyncio's lets the loop turn, so this may be cancelled, and somebody may dial
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def check(self) -> None:
        """Raises what entering would; for those who have something slow to do first. Nobody can connect meanwhile."""
        await self._bind()
        self._unbind()

    async def _bind(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        if isinstance(self._wanted, UnixAddress):
            sock = listen_unix(self._wanted)
            self._inode = inode_of(self._wanted)
            self._server = await loop.create_unix_server(
                self._accept, sock=sock, backlog=BACKLOG, start_serving=False
            )  # fmt: skip
            self._actual = self._wanted
            return self._server
        try:
            host = (await resolve(self._wanted))[0]
        except LinkError as error:
            raise ConfigError("address", f"cannot listen on {self._wanted}: {error.message}") from error
        if self._secret is None and not is_loopback(host):
            text = f"{self._wanted} can be reached by other hosts; links need a shared secret (--secret-file)"
            raise ConfigError("secret", text)
        advertised = self._advertise_host or reachable_host(host)
        try:
            self._server = await loop.create_server(
                self._accept, host, self._wanted.port, ssl=self._ssl, backlog=BACKLOG, start_serving=False,
                ssl_handshake_timeout=None if self._ssl is None else self._config.handshake_timeout_s,
            )  # fmt: skip
        except OSError as error:
            raise ConfigError("address", f"cannot listen on {self._wanted}: {error.strerror or error}") from error
        self._actual = TcpAddress(advertised, self._server.sockets[0].getsockname()[1])
        return self._server

    def _unbind(self) -> None:
        assert self._server is not None
        self._server.close()
        if isinstance(self._actual, UnixAddress):
            remove_unix(self._actual, self._inode)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._closing = True
        self._unbind()
        serving = dict(self._tasks)
        for task in serving:
            task.cancel()
        if serving:
            _, stuck = await asyncio.wait(serving, timeout=LEAVE_S)
            for task in stuck:
                logger.warning("a link to %s is left before all that was begun for it has ended", serving[task].peer)
                task.cancel()
            if stuck:
                await asyncio.wait(stuck)
        self._unproved.close()
        for connection in serving.values():
            connection.abort()  # a task that was cancelled before its first step has not done it
            await connection.lost.wait()
        await self._server.wait_closed()

    def cut(self) -> None:
        """Ends all links as the death of this process would: without a goodbye, and nobody listens any more. Inside the
        context, which is left as ever."""
        assert self._server is not None
        self._closing = True
        self._server.close()
        for connection in self._tasks.values():
            connection.abort()

    def _accept(self) -> Connection:
        handshake = Handshake(
            dialling=False,
            hello=self._make_hello().accepting(self._config.max_frame_bytes),
            secret=self._secret,
            nonce=secrets.token_bytes(NONCE_BYTES),
            peer=f"a client of {self._actual}",
        )
        connection = Connection(
            handshake, self._config, peer=f"a client of {self._actual}", same_user=self._secret is None, room=self._room
        )
        if self._closing:  # accepted by the loop before, handed over after the end
            connection.abort()
            return connection
        self._unproved.add(connection)
        task = asyncio.get_running_loop().create_task(self._serve(connection), name="link")
        self._tasks[task] = connection
        task.add_done_callback(self._tasks.pop)
        return connection

    async def _serve(self, connection: Connection) -> None:
        try:
            if await self._proved(connection):
                await self._use(Link(connection))
            else:
                await connection.lost.wait()
        finally:
            connection.abort()

    async def _proved(self, connection: Connection) -> bool:
        try:
            await connection.ready
        except AiodisaggError as error:
            self._warn(connection.far_side or "somebody who left at once", getattr(error, "message", str(error)))
            return False
        finally:
            self._unproved.discard(connection)
        self._refused.pop(connection.far_side, None)
        return True

    def _warn(self, who: str, why: str) -> None:
        level = logging.DEBUG if self._refused.pop(who, "") == why else logging.WARNING
        self._refused[who] = why
        if len(self._refused) > REFUSED:
            del self._refused[next(iter(self._refused))]
        logger.log(level, "no link from %s to %s: %s", who, self._actual, why)

    async def _use(self, link: Link) -> None:
        try:
            await self._on_link(link)
        except LinkClosed as error:
            logger.debug("%s", error)
        except Exception:
            logger.exception("%r: its handler failed", link)
        finally:
            await link.aclose()


def _send_away(connection: Connection, why: str) -> None:
    if not connection.ready.done():  # else its task is about to say so
        connection.abort(why)
