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
        self._awake = self._watching = False
        """The loop will call ``_turn``; it does so in every turn in which the socket has room."""
        self._sending: Outgoing | None = None
        self._head, self._data = memoryview(b""), memoryview(b"")
        """What is left of the piece that is being sent, and of its header."""
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
        self._wake()
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
            self.wire.say(Hello(incarnation, self._peer, token))

    def add(self, write: Outgoing) -> None:
        self._lane.add(write)
        self._wake()

    def _wake(self) -> None:
        """There may be something to send. A callback of the loop does it: a task that waits for room, with a future and
        a handle for each wait, costs a tenth of what the kernel's copying does."""
        if not self._awake and self.gone is None and self._lane.ready:
            self._awake = True
            if self._sock is None:
                self.wire.feed(self._turn)
            else:
                asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """What one turn of the loop sends."""
        if self.gone is not None:
            return
        if self._sending is not None or self._take():
            try:
                self._push()
            except BlockingIOError:
                pass
            except OSError as error:
                self.lose(PeerGone(self._name, f"the connection is lost: {error}", peer=self._peer))
                return
        if self._sending is None and not self._lane.ready:
            self._sleep()
        elif self._sock is not None and not self._watching:
            self._watching = True
            asyncio.get_running_loop().add_writer(self._sock, self._turn)

    def _sleep(self) -> None:
        self._awake = False
        if self._sock is None:
            self.wire.feed(None)
        elif self._watching:
            self._watching = False
            asyncio.get_running_loop().remove_writer(self._sock)

    def _take(self) -> bool:
        """The lane's next piece, to be sent; False: there is none, or no credit."""
        if (turn := self._lane.next()) is None:
            return False
        number, piece, self._sending = turn
        self._sending.hold()
        head = Chunk(self._session, number, piece.offset, piece.source.nbytes, piece.lease)
        self._head, self._data = memoryview(frame(head)), piece.source
        if len(self._lane) == 1:
            self._lives()  # it owes an answer from now on
        return True

    def _push(self) -> None:
        """Gives away of the piece that is being sent what there is room for."""
        head, data = self._head, self._data
        if self._sock is not None:
            sent = self._sock.sendmsg((head, data[:SEND_BYTES]))
        else:
            data = data[:TLS_SEND_BYTES]
            for part in (head, data):
                if part:
                    self.wire.send(part)
            sent = len(head) + len(data)
        of_head = min(sent, len(head))
        self._head, self._data = head[of_head:], self._data[sent - of_head :]
        self._lives()
        if not self._data and not self._head:
            self._let_go()

    def _let_go(self) -> None:
        """Of the piece that is being sent: nothing refers to its source any more."""
        write, self._sending = self._sending, None
        self._head = self._data = memoryview(b"")
        if write is not None:
            write.drop()

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
        """Ends the connection; the first reason stays. A write ends when the loop has let go of its source."""
        if self.gone is not None:
            return
        self.gone = error
        if self._stall is not None:
            self._stall.cancel()
        if not self.welcome.done():
            self.welcome.set_exception(error)
            self.welcome.exception()  # nobody has to be waiting for it
        self._sleep()
        if self._sock is not None:
            self._sock.close()
        self.wire.abort()
        self._lane.fail(error)
        self._let_go()
        self._tell_lost(error)

    async def end(self) -> None:
        """After ``lose``: returns when nothing of the connection is left."""
        await self.wire.end()
