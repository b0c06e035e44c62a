"""The words beside the data: who writes into a pool, that both live, and when a writer has stopped.

An engine says nothing about its peer: a write into a stopped process succeeds over RDMA, one into a dead process may
stay pending for ever, and a receiver never sees who writes. So each connected writer keeps one small TCP connection to
the receiver, apart from the control link, because a promise about memory must not depend on how links are restarted::

    writer    Attach(token, who I am, whom I expect)
    receiver  Attached(size, address, the engine's port, a place of 8 bytes, barred leases)   or  Refused(why), the end
    writer    writes 8 random bytes to that place through the engine, then  Check(them)
    receiver  Checked(are they there?)        the data plane really leads to this life of this process
    writer    Ping()                          every heartbeat;  receiver  Pong()
    receiver  Bar(ticket, leases)             writer: stop, wait for the pieces under way, then  Barred(ticket, late?)
    receiver  Closing()                       writer: stop, wait, then  Goodbye(late?)
    writer    Goodbye(late?)                  sent only after its last byte; then the end

One ``Bar`` is under way at a time, from ``Attached`` on. A connection that ends without ``Goodbye`` means that the
writer's process is dead (its kernel ended the connection) or its host cut off for three minutes, after which ours gives
up; what it sent before may still sit in a socket's buffer, so its leases stay quarantined for twice the progress
time-out. Silence alone proves nothing: a stopped process goes on where it stopped. Its leases are held until it speaks
or dies.

``late`` says that a write under these leases failed with bytes in the kernels' buffers. The writer cannot know when
they have landed, and how long ago it was says nothing to a receiver that was stopped: it may read this word before
them. So it counts the quarantine itself, from the word on. Who does not know that field takes the word at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated

import msgspec

from aiodisagg.errors import PeerGone
from aiodisagg.transport.wire import watch_hosts

MAX_MESSAGE = 64 << 10
LEASES_PER_MESSAGE = 1024
MISSED_BEATS = 5
VANISHED_S = 180.0
"""A host that has answered nothing for so long is given up, also while words to it are unacknowledged: then the kernel
sends no keepalives, and would repeat the words for 15 minutes."""
PLACE_BYTES = 8

Positive = Annotated[int, msgspec.Meta(gt=0)]
"""The engine's own words take no other addresses: they raise."""


class Attach(msgspec.Struct, frozen=True, array_like=True, tag="attach"):
    token: bytes
    writer: str
    expected: str


class Attached(msgspec.Struct, frozen=True, array_like=True, tag="attached"):
    size_bytes: Positive
    address: Positive
    engine_port: Positive
    place: Positive
    barred: list[int]

    @property
    def fits(self) -> bool:
        """Into an address space, and the numbers into the engine's."""
        return max(self.address + self.size_bytes, self.place + PLACE_BYTES) <= 2**64


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    message: str


class Check(msgspec.Struct, frozen=True, array_like=True, tag="check"):
    nonce: bytes


class Checked(msgspec.Struct, frozen=True, array_like=True, tag="checked"):
    right: bool


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    pass


class Pong(msgspec.Struct, frozen=True, array_like=True, tag="pong"):
    pass


class Bar(msgspec.Struct, frozen=True, array_like=True, tag="bar"):
    ticket: int
    leases: list[int]


class Barred(msgspec.Struct, frozen=True, array_like=True, tag="barred"):
    ticket: int
    late: bool = False


class Closing(msgspec.Struct, frozen=True, array_like=True, tag="closing"):
    pass


class Goodbye(msgspec.Struct, frozen=True, array_like=True, tag="goodbye"):
    late: bool = False


Message = Attach | Attached | Refused | Check | Checked | Ping | Pong | Bar | Barred | Closing | Goodbye
_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Message)


class Wire:
    """Framed messages over one TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        sock: socket.socket | None = writer.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            watch_hosts(sock, VANISHED_S)

    def say(self, message: Message) -> None:
        """Never more than a few messages wait unread at the other end; see the module's text."""
        body = _encode(message)
        if not self._writer.is_closing():
            self._writer.write(len(body).to_bytes(4, "big") + body)

    async def drain(self) -> None:
        with contextlib.suppress(OSError):
            await self._writer.drain()

    async def hear(self) -> Message | None:
        """The next message; None at the end of the connection and for anything that is not a message."""
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            if not 0 < size <= MAX_MESSAGE:
                return None
            message: Message = _decoder.decode(await self._reader.readexactly(size))
        except (OSError, asyncio.IncompleteReadError, msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return None
        return message

    def abort(self, why: str) -> None:
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


class Quarantine:
    """Calls ``over`` after ``seconds`` in which this process ran. One that is stopped (or whose host is) takes no bytes
    from its sockets meanwhile; when it goes on, all clocks say that it is late, and the bytes come then. So it counts
    steps: a stop shortens one of them."""

    STEPS = 10

    def __init__(self, seconds: float, over: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._step_s, self._left, self._over = seconds / self.STEPS, self.STEPS, over
        self._timer = self._loop.call_later(self._step_s, self._step)

    def _step(self) -> None:
        self._left -= 1
        if self._left:
            self._timer = self._loop.call_later(self._step_s, self._step)
        else:
            self._over()

    def cancel(self) -> None:
        self._timer.cancel()


class Attachment:
    """Receiver's side of one writer. It ends with the writer's goodbye, or a quarantine after its connection or after
    words that are late."""

    def __init__(self, wire: Wire, peer: str, quarantine_s: float, on_end: Callable[[Attachment], None]) -> None:
        self.peer = peer
        self._wire, self._quarantine_s, self._on_end = wire, quarantine_s, on_end
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Bar, asyncio.Future[None]]] = deque()
        """Not answered yet; the first one was said."""
        self._held: dict[asyncio.Future[None], int] = {}
        """Leases of those and of what was answered late."""
        self._tickets = 0
        self._timer: Quarantine | None = None
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def bar(self, leases: Sequence[int]) -> list[asyncio.Future[None]]:
        """Ends when this writer writes under none of these leases any more, by its word or by its end."""
        futures: list[asyncio.Future[None]] = []
        if not self.ended.done():
            for start in range(0, len(leases), LEASES_PER_MESSAGE):
                self._tickets += 1
                future: asyncio.Future[None] = self._loop.create_future()
                future.add_done_callback(self._held.pop)
                futures.append(future)
                asked = list(leases[start : start + LEASES_PER_MESSAGE])
                self._held[future] = len(asked)
                self._waiting.append((Bar(self._tickets, asked), future))
                if len(self._waiting) == 1:
                    self._wire.say(self._waiting[0][0])
        return futures

    @property
    def held(self) -> int:
        """Leases whose revocation waits for this writer."""
        return sum(self._held.values())

    def closing(self) -> None:
        self._wire.say(Closing())

    async def serve(self, check: Callable[[bytes], bool]) -> None:
        """Listens until the connection ends. If not by a goodbye that is not late, the quarantine begins."""
        try:
            await self._listen(check)
        finally:
            if not self.ended.done():
                self._timer = Quarantine(self._quarantine_s, self.end)

    async def _listen(self, check: Callable[[bytes], bool]) -> None:
        while True:
            message = await self._wire.hear()
            match message:
                case Ping():
                    self._wire.say(Pong())
                case Check(nonce):
                    self._wire.say(Checked(check(nonce)))
                case Barred(ticket, late) if self._waiting and self._waiting[0][0].ticket == ticket:
                    _, future = self._waiting.popleft()
                    if late:
                        Quarantine(self._quarantine_s, partial(_settle, future))
                    else:
                        _settle(future)
                    if self._waiting:
                        self._wire.say(self._waiting[0][0])
                case Goodbye(late=False):
                    self.end()
                    return
                case _:  # the end, or nonsense, after which its promises are worth nothing
                    return
            await self._wire.drain()

    def end(self) -> None:
        """Nothing of this writer lands any more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        if self.ended.done():
            return
        self.ended.set_result(None)
        self._waiting.clear()
        for future in self._held:
            _settle(future)
        self._on_end(self)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Side:
    """Writer's side: beats, answers, and knows whether the receiver lives.

    Args:
        quarantine_s: as the receiver's own for its writers.
        on_bar: called with leases; returns when nothing moves under them any more, and whether that is late.
        on_lost: called once, with why: the receiver closes, its connection ended, or it is silent.
    """

    def __init__(
        self,
        name: str,
        peer: str,
        wire: Wire,
        heartbeat_s: float,
        quarantine_s: float,
        on_bar: Callable[[frozenset[int]], Awaitable[bool]],
        on_lost: Callable[[PeerGone], None],
    ) -> None:
        self.lost: PeerGone | None = None
        self.gone = False
        """Lost because its connection ended, not because it is silent."""
        self._name, self._peer, self._wire = name, peer, wire
        self._heartbeat_s, self._quarantine_s = heartbeat_s, quarantine_s
        self._on_bar, self._on_lost = on_bar, on_lost
        self._loop = asyncio.get_running_loop()
        self.at_rest: asyncio.Future[None] = self._loop.create_future()
        """Gone for as long as the quarantine lasts: a reset of this connection alone does not stop an RDMA write."""
        self._missed = 0
        self._news = asyncio.Event()
        self._tasks = [self._loop.create_task(step(), name=f"{name} {peer}") for step in (self._listen, self._beat)]
        self._bar: asyncio.Task[None] | None = None

    async def alive(self) -> bool:
        """Asks the receiver and waits for its next word, or until it counts as lost or this side closes."""
        self._news.clear()
        if self.lost is None:
            self._wire.say(Ping())
            await self._news.wait()
        return self.lost is None

    async def close(self, *, goodbye: Goodbye | None) -> None:
        """A goodbye promises that nothing moves any more. Idempotent."""
        self.lost = self.lost or PeerGone(self._name, "disconnected", peer=self._peer)
        self._news.set()  # nobody listens any more: who asks whether the receiver lives would wait for ever
        if goodbye is not None:
            self._wire.say(goodbye)
        tasks = [*self._tasks, *([self._bar] if self._bar is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._wire.close()

    async def _listen(self) -> None:
        while (message := await self._wire.hear()) is not None:
            self._missed = 0
            match message:
                case Pong():
                    self._news.set()
                case Bar(ticket, leases) if self._bar is None or self._bar.done():
                    self._bar = self._loop.create_task(self._answer(ticket, frozenset(leases)))
                case Closing():
                    self._lose("closes", gone=True)
                case _:
                    break
        self._lose("ended", gone=True)

    async def _answer(self, ticket: int, leases: frozenset[int]) -> None:
        self._wire.say(Barred(ticket, await self._on_bar(leases)))

    async def _beat(self) -> None:
        while not self.gone:
            self._wire.say(Ping())
            await asyncio.sleep(self._heartbeat_s)
            self._missed += 1  # and not the clock: after a stop of this process, the answers are still unread
            if self._missed > MISSED_BEATS:
                self._lose(f"silent for {MISSED_BEATS} heartbeats of {self._heartbeat_s:g} s", gone=False)

    def _lose(self, why: str, *, gone: bool) -> None:
        if gone and not self.gone:
            self.gone = True
            self._loop.call_later(self._quarantine_s, self._rest)
        self._news.set()
        if self.lost is None:
            self.lost = PeerGone(self._name, why, peer=self._peer)
            self._on_lost(self.lost)

    def _rest(self) -> None:
        if not self.at_rest.done():
            self.at_rest.set_result(None)
