"""The words between an ipc receiver and a writer that maps its pool, and the receiver's side of one such writer.

They travel over an abstract unix socket (SOCK_SEQPACKET: one message is one packet), apart from the control link,
because a promise about memory must not depend on how links are restarted::

    writer    Attach(who I am, whom I expect)
    receiver  Attached(size, barred leases) + the pool's descriptor          or  Refused(why), then the end
    receiver  Bar(ticket, leases)      writer: stop, wait for copies and views under them, then  Barred(ticket)
    writer    Goodbye()                sent only after its last byte; then the end

One ``Bar`` is under way at a time and each is small, so no send on this socket ever finds it full. If the socket ends
without ``Goodbye``, only the end of the writer's process (its pidfd) proves that nothing lands any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

import msgspec

from aiodisagg.errors import TransportClosed

MAX_MESSAGE = 64 << 10
LEASES_PER_MESSAGE = 1024
MAX_LEASE = 2**62


class Attach(msgspec.Struct, frozen=True, array_like=True, tag="attach"):
    writer: str
    expected: str


class Attached(msgspec.Struct, frozen=True, array_like=True, tag="attached"):
    size_bytes: int
    barred: list[int]


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    gone: bool
    message: str


class Bar(msgspec.Struct, frozen=True, array_like=True, tag="bar"):
    ticket: int
    leases: list[int]


class Barred(msgspec.Struct, frozen=True, array_like=True, tag="barred"):
    ticket: int


class Goodbye(msgspec.Struct, frozen=True, array_like=True, tag="goodbye"):
    pass


Message = Attach | Attached | Refused | Bar | Barred | Goodbye
encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Message)


def decode(packet: bytes) -> Message | None:
    """One packet; None for anything that is not one of the messages."""
    try:
        message: Message = _decoder.decode(packet)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return message


def same_user(sock: socket.socket) -> bool:
    """Does the process at the other end run as our user? Told by the kernel, not by the peer."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(uid == os.geteuid())


def open_pidfd(sock: socket.socket) -> int:
    """A descriptor that becomes readable when the process at the other end has ended. Raises OSError."""
    so_peerpidfd = 77  # Linux 6.5: names the very process that connected, even if its number was given away since
    try:
        return sock.getsockopt(socket.SOL_SOCKET, so_peerpidfd)
    except OSError:
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return os.pidfd_open(pid)


class BarList:
    """Leases that must never be written under again, newest last. At its bound the oldest are forgotten: a grant
    that is still held by its writer after so many later revocations does not exist."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._leases: OrderedDict[int, None] = OrderedDict()

    def add(self, leases: Iterable[int]) -> None:
        for lease in leases:
            self._leases[lease] = None
        while len(self._leases) > self._bound:
            self._leases.popitem(last=False)

    def __contains__(self, lease: int) -> bool:
        return lease in self._leases

    def newest(self, count: int) -> list[int]:
        return list(self._leases)[-count:]


class Attachment:
    """Receiver's side of one writer that maps the pool. It ends with the writer's goodbye or its process."""

    def __init__(self, sock: socket.socket, pidfd: int, peer: str, on_end: Callable[[Attachment], None]) -> None:
        self.peer = peer
        self._sock: socket.socket | None = sock
        self._pidfd = pidfd
        self._on_end = on_end
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Bar, asyncio.Future[None]]] = deque()
        self._tickets = 0
        self._loop.add_reader(sock.fileno(), self._on_message)
        self._loop.add_reader(pidfd, self.end)

    def bar(self, leases: list[int]) -> list[asyncio.Future[None]]:
        """Ends when this writer writes under none of these leases any more, by its word or by its end."""
        futures: list[asyncio.Future[None]] = []
        if not self._ended:
            for start in range(0, len(leases), LEASES_PER_MESSAGE):
                self._tickets += 1
                future: asyncio.Future[None] = self._loop.create_future()
                future.add_done_callback(lambda done: done.exception())  # whoever asked may have left
                futures.append(future)
                self._waiting.append((Bar(self._tickets, leases[start : start + LEASES_PER_MESSAGE]), future))
                if len(self._waiting) == 1:
                    self._ask()
        return futures

    def _ask(self) -> None:
        if self._waiting and self._sock is not None:
            # If the writer has just left, its goodbye may still wait to be read: the reader finds out, not this.
            with contextlib.suppress(OSError):
                self._sock.send(encode(self._waiting[0][0]))

    def _on_message(self) -> None:
        left = False
        while self._sock is not None:
            try:
                packet = self._sock.recv(MAX_MESSAGE)
            except BlockingIOError:
                return
            except ConnectionResetError:
                # It left with our question unread. What it said before is still to be read, all of it and now: uvloop
                # calls nobody a second time for a socket that has had an error.
                left = True
                continue
            except OSError:
                packet = b""
            self._hear(packet)
            if not left:
                return

    def _hear(self, packet: bytes) -> None:
        match decode(packet):
            case Barred(ticket) if self._waiting and self._waiting[0][0].ticket == ticket:
                _, future = self._waiting.popleft()
                if not future.done():
                    future.set_result(None)
                self._ask()
            case Goodbye():
                self.end()
            case _:  # the end, or nonsense: from here on only the end of the process counts
                self._drop_socket()

    def _drop_socket(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def end(self, error: TransportClosed | None = None) -> None:
        """Nothing lands through this attachment any more; with ``error``: nobody will ever know, so waits fail."""
        if self._ended:
            return
        self._ended = True
        self._drop_socket()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        for _, future in self._waiting:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
        self._waiting.clear()
        self._on_end(self)
