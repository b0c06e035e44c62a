"""Words and bytes on a TCP stream, received without a copy: words into a small buffer, payloads where they belong.

A frame is one word (:mod:`aiodisagg.transport.chunks`) behind its length, padded to at least 64 bytes, so that the
usual header is read with one exact ``recv`` and the next one already lands in the pool. A ``Chunk`` is followed by
its payload. A stream that breaks these rules is ended; there is no way to find the next frame.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol, cast

from aiodisagg.transport import chunks
from aiodisagg.transport.chunks import Chunk, Word

FRAME_BYTES = 64
_LENGTH_BYTES = 2
_READ_BYTES = 2 << 20
"""Most that one turn of the loop takes from a socket: 0.2 to 1 ms of copying in the kernel."""
_LARGE_BYTES = 1 << 20


def frame(word: Word) -> bytes:
    body = chunks.encode(word)
    return (len(body).to_bytes(_LENGTH_BYTES, "big") + body).ljust(FRAME_BYTES, b"\0")


def watch_hosts(sock: socket.socket, timeout_s: float) -> None:
    """A connection, or what is accepted there, ends when its host has answered nothing for about ``timeout_s``. A
    process that is stopped is no such case: its kernel answers. (On Linux connections have the options of who accepted
    them.)"""
    probe_s = min(max(1, int(timeout_s / 4)), 32_767)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", probe_s),
        ("TCP_KEEPINTVL", probe_s),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", min(max(1000, int(timeout_s * 1000)), 2**31 - 1)),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Side(Protocol):
    """Who is told what a wire reads. Nothing here may raise."""

    def heard(self, wire: Wire, word: Word) -> None: ...

    def place(self, chunk: Chunk, start: int) -> memoryview | None:
        """Where the rest of a payload goes, from byte ``start`` of it; None: nowhere, it is read and dropped.
        Asked before every read, so that a lease that ends in mid-chunk is respected."""

    def landed(self, wire: Wire, chunk: Chunk, whole: bool) -> None:
        """The payload has been read; ``whole``: none of it was dropped."""

    def lost(self, wire: Wire) -> None:
        """Exactly once, the last call."""


class Wire(asyncio.BufferedProtocol):
    """One connection, on either side."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._transport: asyncio.Transport | None = None
        self._head = bytearray(_LENGTH_BYTES + chunks.MAX_HEADER)
        self._head_view = memoryview(self._head)
        self._scrap: memoryview | None = None
        self._need, self._got = FRAME_BYTES, 0
        self._chunk: Chunk | None = None
        self._whole = True
        self._aborted = False
        self._room = True
        self._bulk = False
        self._feeder: Callable[[], None] | None = None
        self._fed_soon = False
        self._asked = 0
        self.broken = ""
        """Why this side ended the stream, if it did."""
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it
        if self._aborted:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._feeder = None
        self._side.lost(self)
        self.gave_up()

    def gave_up(self) -> None:
        """Who made the connection gave it up, perhaps without a word to this side: uvloop says none of one that was in
        the making."""
        if not self._ended.done():
            self._ended.set_result(None)

    async def end(self) -> None:
        """Aborts, and returns when the connection is no more. Of one that was never made nothing is left anyway."""
        self.abort()
        if self._transport is not None:
            await asyncio.shield(self._ended)

    def send(self, data: memoryview) -> None:
        """Bulk through asyncio's own buffers, for streams that have to be encrypted: while there is room, see ``feed``.
        The data must not change before the peer has answered or the connection is lost."""
        if self._transport is not None and not self._transport.is_closing():
            self._bulk = True
            self._transport.write(data)

    def feed(self, feeder: Callable[[], None] | None) -> None:
        """As a loop's ``add_writer``: called in each of its turns in which there is room to ``send``; None: no more."""
        self._feeder = feeder
        self._feed_soon()

    def _feed_soon(self) -> None:
        if self._feeder is not None and self._room and not self._fed_soon:
            self._fed_soon = True
            asyncio.get_running_loop().call_soon(self._feed)

    def _feed(self) -> None:
        self._fed_soon = False
        if self._feeder is not None and self._room:
            self._feeder()
            self._feed_soon()

    def say(self, word: Word) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(word))

    def abort(self, why: str = "") -> None:
        self.broken, self._aborted = self.broken or why, True
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        """A peer that does not read our answers is not read either; that it does not read our bulk is its right."""
        self._room = False
        if self._transport is not None and not self._bulk:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._room = True
        self._go_on()
        self._feed_soon()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._chunk is None:
            return self._head_view[self._got : self._need]
        left = min(self._chunk.size_bytes - self._got, _READ_BYTES)
        target = self._side.place(self._chunk, self._got) if self._whole else None
        if target is None:
            self._whole = False
            self._scrap = self._scrap or memoryview(bytearray(256 << 10))
            target = self._scrap
        self._asked = min(left, len(target))
        return target[: self._asked]

    def buffer_updated(self, nbytes: int) -> None:
        self._got += nbytes
        if self._chunk is not None:
            if nbytes == self._asked >= _LARGE_BYTES:
                self._take_breath()
            if self._got == self._chunk.size_bytes:
                self._end_payload()
            return None
        if self._got < self._need:
            return None
        length = _LENGTH_BYTES + int.from_bytes(self._head[:_LENGTH_BYTES], "big")
        if length > len(self._head):
            return self.abort("a word of more than 4 KiB")
        if length > self._need:
            self._need = length
            return None
        word = chunks.decode(self._head_view[_LENGTH_BYTES:length])
        self._need, self._got = FRAME_BYTES, 0
        if word is None or (isinstance(word, Chunk) and word.size_bytes < 0):
            return self.abort("not this protocol")
        self._side.heard(self, word)
        if isinstance(word, Chunk):
            self._chunk, self._whole = word, True
            if not word.size_bytes:
                self._end_payload()
        return None

    def _take_breath(self) -> None:
        """uvloop reads a socket up to 32 times in one turn, for as long as it fills the buffer. Once is enough."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing() and (self._bulk or self._room):
            self._transport.resume_reading()

    def _end_payload(self) -> None:
        assert self._chunk is not None
        chunk, self._chunk = self._chunk, None
        self._need, self._got = FRAME_BYTES, 0
        self._side.landed(self, chunk, self._whole)
