"""Addresses: ``unix:@name`` (abstract), ``unix:/path``, ``tcp:host:port``; sockets that listen and connect there.

``unix:`` alone asks for a fresh abstract name. Abstract names need no file, no clean-up and no shared folder; they
belong to a network namespace, and anybody inside it may connect, so who connects is checked (``check_user``).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import secrets
import socket
import stat
import struct
from dataclasses import dataclass

from aiodisagg.errors import AuthenticationFailed, ConfigError, LinkError

BACKLOG = 1024
_UNIX_PATH_BYTES = 107


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: str
    """A file's path, or a name behind ``@``."""

    def __str__(self) -> str:
        return f"unix:{self.path}"

    @property
    def raw(self) -> str:
        return "\0" + self.path[1:] if self.path.startswith("@") else self.path


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


def parse(address: str) -> UnixAddress | TcpAddress:
    """The address in ``address``. Raises ConfigError if it is none."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        path = f"@aiodisagg-{secrets.token_hex(8)}" if rest in ("", "@") else rest
        if len(os.fsencode(path)) > _UNIX_PATH_BYTES or "\0" in path:
            raise ConfigError("address", f"{address!r}: a unix address has at most {_UNIX_PATH_BYTES} bytes")
        return UnixAddress(path)
    host, colon, port = rest.rpartition(":")
    if scheme == "tcp" and colon and host and port.isascii() and port.isdigit() and int(port) < 65536:
        return TcpAddress(host.removeprefix("[").removesuffix("]"), int(port))
    raise ConfigError("address", f"{address!r} is none of unix:@name, unix:/path, tcp:host:port")


def check_port(port: int, prefix: str = "") -> None:
    """Raises ConfigError, under ``prefix`` and ``port``: event loops may take a larger one modulo 65536."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"{prefix}port", f"must be between 0 and 65535, not {port}")


def cannot_listen(host: str, port: int, error: OSError | UnicodeError, prefix: str = "") -> ConfigError:
    """What has to be changed after ``error``."""
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return ConfigError(f"{prefix}port", f"{port} is in use on {host}")
    if code == errno.EACCES:
        return ConfigError(f"{prefix}port", f"{port} needs more rights than this process has")
    return ConfigError(f"{prefix}host", f"{host} cannot be listened on: {getattr(error, 'strerror', None) or error}")


async def check_bind(host: str, port: int, prefix: str = "") -> None:
    """Raises ConfigError if nobody could listen there now: for those who will, but have something slow to do first."""
    try:
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
    except (OSError, UnicodeError) as error:
        raise cannot_listen(host, port, error, prefix) from error
    server.close()


def is_loopback(host: str) -> bool:
    """Whether the literal address ``host`` is this host's own."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def far_host(name: object) -> str:
    """The literal address in a socket's peer name; empty for that of a unix socket."""
    if not isinstance(name, tuple):
        return ""
    host = ipaddress.ip_address(name[0])
    return str(getattr(host, "ipv4_mapped", None) or host)


def far_side(sock: socket.socket) -> str:
    """Who is at the other end of a unix socket; empty for other sockets."""
    if sock.family != socket.AF_UNIX:
        return ""
    pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return f"process {pid} of this host" if pid else "another container of this host"


async def resolve(address: TcpAddress) -> list[str]:
    """The literal addresses of a host name, at least one. Raises LinkError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LinkError(str(address), f"the name {address.host!r} cannot be resolved: {error}") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def reachable_host(host: str) -> str:
    """``host`` as others may use it: a listener on every interface is known by the address of the default route.

    Raises ConfigError where there is none: ``0.0.0.0`` is never given to anybody.
    """
    try:
        wildcard = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not wildcard.is_unspecified:
        return host
    family, elsewhere = (socket.AF_INET6, "2001:db8::1") if wildcard.version == 6 else (socket.AF_INET, "192.0.2.1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((elsewhere, 9))  # of a datagram socket: looks up the route, sends nothing
            return str(probe.getsockname()[0])
        except OSError as error:
            raise ConfigError("address", f"{host} is every interface; say which one others can reach") from error


def listen_unix(address: UnixAddress) -> socket.socket:
    """A bound socket; a file gets mode 0600, and one left by a process that ended is replaced. Raises ConfigError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.bind(address.raw)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(address):
                raise
            os.unlink(address.path)
            sock.bind(address.raw)
        if not address.path.startswith("@"):
            os.chmod(address.path, stat.S_IRUSR | stat.S_IWUSR)
    except OSError as error:
        sock.close()
        raise ConfigError("address", f"cannot listen on {address}: {error.strerror or error}") from error
    sock.setblocking(False)
    return sock


def _is_stale(address: UnixAddress) -> bool:
    """Whether a socket file has no listener. (asyncio would remove it even under a living one.)"""
    if address.path.startswith("@") or not stat.S_ISSOCK(os.stat(address.path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(address.path) == errno.ECONNREFUSED


def remove_unix(address: UnixAddress, inode: int | None) -> None:
    """Removes the socket file, unless another process has put its own there."""
    if inode is not None:
        with contextlib.suppress(FileNotFoundError):
            if os.stat(address.path).st_ino == inode:
                os.unlink(address.path)


def inode_of(address: UnixAddress) -> int | None:
    """The inode of a socket file; None for an abstract name."""
    return None if address.path.startswith("@") else os.stat(address.path).st_ino


def connect_unix(address: UnixAddress) -> socket.socket:
    """A connected socket. Never blocks: on unix sockets a connect succeeds or fails at once. Raises LinkError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.connect(address.raw)
    except BlockingIOError as error:
        sock.close()
        raise LinkError(str(address), "its queue of connections is full") from error
    except OSError as error:
        sock.close()
        raise LinkError(str(address), f"cannot connect: {error.strerror or error}") from error
    return sock


def check_user(sock: socket.socket, peer: str) -> None:
    """Refuses a unix socket whose other end runs as another user than this process, or root.

    Raises AuthenticationFailed. Sockets that are not unix sockets pass.
    """
    if sock.family != socket.AF_UNIX:
        return
    uid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    if uid not in (0, os.getuid()):
        raise AuthenticationFailed(peer, f"its process runs as another user ({uid}); configure a secret on both sides")


def tune_tcp(sock: socket.socket) -> None:
    """Small words leave at once. When a host has vanished is for the link's pulse to say: TCP_USER_TIMEOUT also ends a
    connection whose other side lives and does not read."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
