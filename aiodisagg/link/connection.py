"""The protocol object behind a :class:`~aiodisagg.link.link.Link`: handshake, frames, heartbeat, two bounded queues.

Life: ``connection_made`` -> handshake -> ``ready`` -> messages -> ``fail``, ``abort`` or the peer's end ->
``connection_lost``.

* Received messages are decoded at once, in the read callback. There they go to ``deliver``'s handler, or into a queue
  for ``recv``: waking a task costs another turn of the loop, a fifth of a round trip. A full queue stops reading the
  socket; it never stops heartbeats, which are answered in the read callback and sent by a timer.
* Messages leave in the order of the calls. Above the high-water mark they wait in ``_outbox``, not yet encoded, so a
  hundred large messages that wait cost their references only. A cancelled ``send`` that still waits is taken out.
* A large frame that comes to a server waits for room (:mod:`aiodisagg.link.room`); its socket is read little meanwhile.
* Every end goes through ``_end``: the first reason stays and is what ``recv`` and ``send`` report.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NoReturn, cast

from aiodisagg.errors import (
    AiodisaggError,
    AuthenticationFailed,
    LinkClosed,
    LinkError,
    MessageTooLarge,
    RemoteProtocolError,
)
from aiodisagg.link import framing
from aiodisagg.link.address import check_user, far_host, far_side, tune_tcp
from aiodisagg.link.config import LinkConfig
from aiodisagg.link.framing import frame
from aiodisagg.link.gather import Gather
from aiodisagg.link.hello import MAX_HANDSHAKE_FRAME_BYTES, WRONG_SECRET, Handshake, Hello, bye, decode_bye
from aiodisagg.link.pulse import Beat, Pulse
from aiodisagg.link.room import Place, Room
from aiodisagg.protocol.messages import Message, decode, encode

logger = logging.getLogger(__name__)

_COPY_BELOW = 16 * 1024
"""Header and payload of smaller frames are joined: one write beats one copy."""


class Connection(asyncio.Protocol):
    """One connection of one link, on either side.

    Args:
        handshake: not started.
        peer: the address, until the peer has said its name.
        same_user: refuse other users' processes at the other end of a unix socket.
        room: for large frames, shared with other connections.
    """

    def __init__(
        self, handshake: Handshake, config: LinkConfig, *, peer: str, same_user: bool = False, room: Room | None = None
    ) -> None:
        self.peer, self.handshake = peer, handshake
        self._config, self._same_user = config, same_user
        self._place = None if room is None else Place(room, self._read_or_not)
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        """Done when messages may be exchanged; else LinkError, AuthenticationFailed or RemoteProtocolError."""
        self.lost = asyncio.Event()
        """The socket is gone."""
        self.bytes_sent = self.bytes_received = 0
        """Through the socket: handshake, headers and heartbeats included. With TLS, before encryption."""
        self.reason: str | None = None
        """Why this connection ends; None while it lives."""
        self.far_host = self.far_side = ""
        self._cause: BaseException | None = None
        self._transport: asyncio.Transport | None = None
        self._gather = Gather()
        self._reader = framing.FrameReader(peer, MAX_HANDSHAKE_FRAME_BYTES)
        self._max_sent_bytes = config.max_frame_bytes
        self._pulse = Pulse(config.heartbeat_s, config.timeout_s)
        self._timer: asyncio.TimerHandle | None = None
        self._heard = self._said = True
        self._inbox: deque[tuple[Message, int]] = deque()
        self._inbox_bytes = 0
        self._reading, self._queue_full = True, False
        self._receiver: asyncio.Future[None] | None = None
        self._handler: Callable[[Message], None] | None = None
        self._outbox: OrderedDict[asyncio.Future[None] | object, Message | bytes] = OrderedDict()
        self._nowait_bytes = 0
        self._writing, self.parted = True, False

    @property
    def quiet(self) -> bool:
        """Nothing was heard for two heartbeats."""
        return self._pulse.quiet and not self._heard

    # -- called by the event loop -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the methods of asyncio.Transport, not its type.
        self._transport = transport = cast(asyncio.Transport, transport)
        if self.reason is not None:  # given up before it began: the server closed, or TLS took too long
            transport.abort()
            return
        self._gather.open(transport.write)
        transport.set_write_buffer_limits(high=self._config.high_water_bytes)
        sock = transport.get_extra_info("socket")
        self.far_host = far_host(transport.get_extra_info("peername"))
        self.far_side = self.far_host or far_side(sock)
        if self._same_user:
            try:
                check_user(sock, self.peer)
            except AuthenticationFailed as error:
                self.fail("auth", "runs as another user; configure a secret on both sides", error)
                return
        tune_tcp(sock)
        self._put(self.handshake.greeting)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self.bytes_received += len(data)
        reader = self._reader
        reader.feed(data)
        self._gather.hold()
        try:
            while self.reason is None and (whole := reader.next()) is not None:
                kind, payload = whole
                if kind != framing.MESSAGE or self.handshake.remote is None:
                    self._control(kind, payload)
                elif self._handler is None:
                    self._queue(decode(payload, self.peer), len(payload))
                else:
                    message = decode(payload, self.peer)
                    try:
                        self._handler(message)
                    except Exception as error:  # it belongs to the caller of ``deliver``, not to the loop
                        self._end_delivery(error)
                self._leave_room()
            if self._place is not None:
                self._place.gather(reader.part_bytes)
        except AuthenticationFailed as error:
            self.fail("auth", WRONG_SECRET, error)
        except RemoteProtocolError as error:
            self.fail("protocol", str(error), error)
        self._gather.release()

    def eof_received(self) -> None:
        self._close("the peer ended the connection without a word")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"connection lost: {exc}" if exc else "connection lost", exc)
        if self._timer is not None:
            self._timer.cancel()
        self.lost.set()

    def pause_writing(self) -> None:
        self._writing = False

    def resume_writing(self) -> None:
        self._writing = True
        while self._outbox and self._writing and self.reason is None:
            key, item = self._outbox.popitem(last=False)
            if isinstance(item, bytes):
                self._nowait_bytes -= len(item)
                self._write(item)
                continue
            assert isinstance(key, asyncio.Future)
            if key.done():  # cancelled, and its task has not run since
                continue
            try:
                self._write(self._encode(item))
            except Exception as error:  # it belongs to the caller of that send, not to the loop
                key.set_exception(error)
            else:
                key.set_result(None)

    # -- messages -----------------------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        self._check_open()
        if self._writing and not self._outbox:
            self._write(self._encode(message))
            return
        waiter = self._loop.create_future()
        self._outbox[waiter] = message
        try:
            await waiter
        finally:
            self._outbox.pop(waiter, None)

    def send_nowait(self, message: Message) -> None:
        if self.reason is not None:
            raise self._closed()
        payload = self._encode(message)
        if self._writing and not self._outbox:
            self._write(payload)
            return
        self._nowait_bytes += len(payload)
        self._outbox[object()] = payload
        if self._nowait_bytes > self._config.max_unsent_bytes:
            self.fail("timeout", f"{self._nowait_bytes} bytes wait to be sent and the peer does not read")
            raise self._closed()

    async def recv(self) -> Message:
        if self._receiver is not None:
            raise RuntimeError("another task already receives")
        while not self._inbox:
            self._check_open()
            self._receiver = self._loop.create_future()
            try:
                await self._receiver
            finally:
                self._receiver = None
        message, size = self._inbox.popleft()
        self._inbox_bytes -= size
        if self._queue_full and not self._full(half=True):
            self._queue_full = False
            self._read_or_not()
        return message

    async def deliver(self, handle: Callable[[Message], None]) -> NoReturn:
        while self._inbox:
            handle(await self.recv())
        self._check_open()
        if self._receiver is not None:
            raise RuntimeError("another task already receives")
        self._receiver, self._handler = self._loop.create_future(), handle
        try:
            await self._receiver
        finally:
            self._receiver = self._handler = None
        raise self._closed()

    def _end_delivery(self, error: Exception) -> None:
        self._handler = None
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_exception(error)

    def drop_received(self) -> None:
        """Forgets what was received and not taken."""
        self._inbox.clear()
        self._inbox_bytes = 0

    # -- the end ------------------------------------------------------------------------------------------------

    def fail(self, code: str, reason: str, cause: BaseException | None = None) -> None:
        """Ends the connection and tells the peer why. The first call wins."""
        if self.reason is None and self._transport is not None:
            self._put(bye(code, reason))
        self._close(reason, cause)

    def abort(self, reason: str = "closed here") -> None:
        """Cuts the connection now."""
        self._end(reason)
        if self._transport is not None:
            self._transport.abort()
        else:
            self.lost.set()

    def _close(self, reason: str, cause: BaseException | None = None) -> None:
        """Ends the connection; what was written gets ``close_timeout_s`` to leave."""
        if self.reason is not None:
            return
        self._gather.release()
        self._end(reason, cause)
        if self._transport is not None:
            self._transport.close()
            self._timer = self._loop.call_later(self._config.close_timeout_s, self._transport.abort)

    def _end(self, reason: str, cause: BaseException | None = None) -> None:
        """The first reason is kept; everybody who waits is woken."""
        if self.reason is not None:
            return
        self.reason, self._cause = reason, cause
        self._gather.drop()
        self._leave_room()
        self._place = None  # it refers to this object, and this one to what has come of a frame
        if self._timer is not None:
            self._timer.cancel()
        if not self.ready.done():
            error = cause if isinstance(cause, AiodisaggError) else LinkError(self.peer, reason)
            self.ready.set_exception(error)
            self.ready.exception()  # nobody has to be waiting for it
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)
        outbox, self._outbox = self._outbox, OrderedDict()
        for key in outbox:
            if isinstance(key, asyncio.Future) and not key.done():
                key.set_exception(self._closed())

    def _closed(self) -> LinkClosed:
        error = LinkClosed(self.peer, self.reason or "")
        error.__cause__ = self._cause
        return error

    def _check_open(self) -> None:
        if self.reason is not None:
            raise self._closed()

    # -- frames -------------------------------------------------------------------------------------------------

    def _control(self, kind: int, payload: bytes | bytearray) -> None:
        assert self._transport is not None
        if kind == framing.BYE:
            self._bye(payload)
        elif not self.handshake.done:
            if (reply := self.handshake.receive(kind, payload)) is not None:
                self._put(reply)
            if self.handshake.remote is not None:
                self._open(self.handshake.remote)
        elif kind == framing.PING:
            # A peer that pings and does not read gets no pile of answers: bytes are on their way to it anyway.
            if self._writing:
                self._put(frame(framing.PONG))
        elif kind != framing.PONG:
            raise RemoteProtocolError(self.peer, f"frame of kind {kind} after the handshake")

    def _open(self, remote: Hello) -> None:
        self.peer = self._reader.peer = f"{remote.name} ({remote.incarnation})"
        self._reader.limit_bytes = self.handshake.local.max_frame_bytes
        own = self._config.max_frame_bytes
        self._max_sent_bytes = min(own, remote.max_frame_bytes or own)
        self._timer = self._loop.call_later(self._config.heartbeat_s, self._tick)
        if not self.ready.done():
            self.ready.set_result(None)

    def _bye(self, payload: bytes | bytearray) -> None:
        said = decode_bye(payload, self.peer)
        if said.code == "auth":
            self._close(said.reason, AuthenticationFailed(self.peer, f"refused by the peer: {said.reason}"))
        elif said.code == "protocol":
            self._close(said.reason, RemoteProtocolError(self.peer, f"refused by the peer: {said.reason}"))
        else:
            self.parted = said.code == "closed"
            self._close("closed by the peer" if said.code == "closed" else f"closed by the peer: {said.reason}")

    def _queue(self, message: Message, size_bytes: int) -> None:
        self._inbox.append((message, size_bytes))
        self._inbox_bytes += size_bytes
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)
        if not self._queue_full and self._full():
            self._queue_full = True
            self._read_or_not()

    def _read_or_not(self) -> None:
        reading = not self._queue_full and (self._place is None or self._place.read)
        if reading == self._reading or self.reason is not None:
            return
        self._reading = reading
        assert self._transport is not None
        if reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _leave_room(self) -> None:
        if self._place is not None:
            self._place.leave()

    def _full(self, *, half: bool = False) -> bool:
        share = 2 if half else 1
        return (
            len(self._inbox) * share >= self._config.max_queued_messages
            or self._inbox_bytes * share >= self._config.max_queued_bytes
        )

    def _encode(self, message: Message) -> bytes:
        payload = encode(message)
        if len(payload) > self._max_sent_bytes:
            raise MessageTooLarge(self.peer, len(payload), self._max_sent_bytes)
        return payload

    def _put(self, data: bytes) -> None:
        self.bytes_sent += len(data)
        self._gather.put(data)

    def _write(self, payload: bytes) -> None:
        self._said = True
        if len(payload) < _COPY_BELOW:
            self._put(frame(framing.MESSAGE, payload))
        else:
            self._put(framing.header(framing.MESSAGE, len(payload)))
            self._put(payload)

    def _tick(self) -> None:
        """Once a heartbeat."""
        assert self._transport is not None
        reading, reader = self._reading, self._reader
        in_time = self._place is None or self._place.beat(reader.come_bytes, self._config.heartbeat_s)
        beat = self._pulse.tick(heard=self._heard and in_time, said=self._said, reading=reading)
        self._heard = self._said = False
        if beat is Beat.LOST:
            reason = f"nothing was heard for {self._config.timeout_s:g} s"
            if not in_time:
                reason = f"{reader.come_bytes} of {reader.part_bytes} bytes came, too slowly while others wait"
            logger.warning("link to %s: %s", self.peer, reason)
            self.fail("timeout", reason)
            return
        if beat is Beat.PING and self._transport.get_write_buffer_size() == 0:
            self._put(frame(framing.PING))
        self._timer = self._loop.call_later(self._config.heartbeat_s, self._tick)
