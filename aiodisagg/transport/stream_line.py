"""The writer's side of one TCP connection: chunks out, answers in, and a watch on a peer that answers nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from aiodisagg.errors import PeerGone, TransportError, WriteFailed, WriteRefused
from aiodisagg.transport.chunks import Chunk, Gone, Hello, Lane, Outgoing, Placed, Rejected, Welcome, Word
from aiodisagg.transport.wire import Wire, frame

SEND_BYTES = 2 << 20
"""Most that one turn of the loop gives to a socket: 0.2 to 1 ms of copying in the kernel, twice as much when it also
carries the bytes to a receiver on this host. Twice as much is no faster; a quarter of it costs a tenth to a fifth."""
TLS_SEND_BYTES = 128 << 10
"""The same with TLS, whose encryption runs on the loop's thread: about 0.3 ms."""


class Line:
    """One connection to a receiver, and the writes that take turns on it.

    Args:
        name: of the transport, for errors.
        sock: a descriptor of its own, only sent on; asyncio reads the answers from another of the same connection.
            None: bytes have to be encrypted, and go through asyncio.
        lost: told why the connection ended, perhaps more than once.
    """

    def __init__(
        self,
        name: str,
        peer: str,
        sock: socket.socket | None,
        window: int,
        stall_s: float,
        lost: Callable[[TransportError], None],
    ) -> None:
        self.gone: TransportError | None = None
        self.wire = Wire(self)
        self.welcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._name, self._peer, self._sock = name, peer, sock
        self._tell_lost = lost
        self._session = 0
        self._lane = Lane(window)
        self._work = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self._stall_s, self._life_s = stall_s, 0.0
        self._stall: asyncio.TimerHandle | None = None

    # -- what the wire reads --------------------------------------------------------------------------------------

    def heard(self, wire: Wire, word: Word) -> None:
        known = False
        match word:
            case Welcome() if not self.welcome.done():
                self._session = word.session
                self.welcome.set_result(word)
                known = True
            case Gone(message):
                return self.lose(PeerGone(self._name, message, peer=self._peer))
            case Placed(number):
                known = self._lane.placed(number)
            case Rejected(number, gone, message):
                kind = PeerGone if gone else WriteRefused
                known = self._lane.rejected(number, kind(self._name, message, peer=self._peer))
        if not known:
            return self.lose(PeerGone(self._name, "it does not speak this protocol", peer=self._peer))
        self._work.set()
        self._lives()
        return None

    def place(self, chunk: Chunk, start: int) -> memoryview | None:
        return None

    def landed(self, wire: Wire, chunk: Chunk, whole: bool) -> None:
        pass  # heard() has ended the connection

    def lost(self, wire: Wire) -> None:
        self.lose(PeerGone(self._name, wire.broken or "the connection is lost", peer=self._peer))

    # -- sending --------------------------------------------------------------------------------------------------

    def start(self, incarnation: str, token: bytes) -> None:
        """The connection is made. It may have been lost since."""
        if self.gone is None:
            self._pump = asyncio.ensure_future(self._send())
            self._pump.add_done_callback(lambda _: self._hang_up())  # even if it is cancelled before its first step
            self.wire.say(Hello(incarnation, self._peer, token))

    def add(self, write: Outgoing) -> None:
        self._lane.add(write)
        self._work.set()

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close()

    async def _push(self, data: bytes | memoryview) -> None:
        if self._sock is None:
            return await self.wire.send(data)
        try:
            sent = self._sock.send(data)  # sock_sendall would do so, too, behind a future and a handle
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            await asyncio.get_running_loop().sock_sendall(self._sock, memoryview(data)[sent:])
        return None

    async def _send(self) -> None:
        step = TLS_SEND_BYTES if self._sock is None else SEND_BYTES
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                while (turn := self._lane.next()) is not None:
                    number, piece, write = turn
                    if len(self._lane) == 1:
                        self._lives()  # it owes an answer from now on
                    write.hold()
                    try:
                        size = piece.source.nbytes
                        head = Chunk(self._session, number, piece.offset, size, piece.lease)
                        await self._push(frame(head))
                        for start in range(0, size, step):
                            await self._push(piece.source[start : start + step])
                            self._lives()
                            await asyncio.sleep(0)  # while there is room, nothing above turns the loop
                    finally:
                        del piece, turn
                        write.drop()
        except OSError as error:
            self.lose(PeerGone(self._name, f"the connection is lost: {error}", peer=self._peer))

    def _lives(self) -> None:
        """The peer has shown life, or begins to owe an answer. Once per piece, hence no timer of its own for each."""
        loop = asyncio.get_running_loop()
        self._life_s = loop.time()
        if self._stall is None and self._lane.waiting:
            self._stall = loop.call_later(self._stall_s, self._look)

    def _look(self) -> None:
        self._stall = None
        if self._lane.waiting:
            loop = asyncio.get_running_loop()
            left_s = self._life_s + self._stall_s - loop.time()
            if left_s <= 0:
                self.lose(WriteFailed(self._name, f"no answer in {self._stall_s:g} s", peer=self._peer))
            else:
                self._stall = loop.call_later(left_s, self._look)

    def lose(self, error: TransportError) -> None:
        """Ends the connection; the first reason stays. A write ends when the pump has let go of its source."""
        if self.gone is not None:
            return
        self.gone = error
        if self._stall is not None:
            self._stall.cancel()
        if not self.welcome.done():
            self.welcome.set_exception(error)
            self.welcome.exception()  # nobody has to be waiting for it
        if self._pump is not None:
            self._pump.cancel()
        else:
            self._hang_up()
        self.wire.abort()
        self._lane.fail(error)
        self._tell_lost(error)

    async def end(self) -> None:
        """After ``lose``: returns when nothing of the connection is left."""
        if self._pump is not None:
            await asyncio.gather(self._pump, return_exceptions=True)
        await self.wire.end()
