"""Frames: a length (u32, big endian), a kind (u8), the payload. No I/O.

:class:`FrameReader` hands out the memory that the socket is read into, so a small frame is never copied: its payload
is a view of that buffer. A frame larger than the buffer is gathered in a growing ``bytearray``; memory follows what
arrived, not what the header promised, and each byte is moved once (growth is amortised), however it was cut up.
"""

from __future__ import annotations

import struct
from typing import Final

from aiodisagg.errors import RemoteProtocolError

GREETING: Final = 1
HELLO: Final = 2
MESSAGE: Final = 3
PING: Final = 4
PONG: Final = 5
BYE: Final = 6

_HEADER: Final = struct.Struct(">IB")
HEADER_BYTES: Final = _HEADER.size
READ_BYTES: Final = 64 * 1024
"""Size of a reader's buffer, and so of the largest single read."""


def header(kind: int, size_bytes: int) -> bytes:
    """The header of a frame whose payload follows."""
    return _HEADER.pack(size_bytes, kind)


def frame(kind: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return _HEADER.pack(len(payload), kind) + payload


class FrameReader:
    """Cuts a byte stream into frames.

    Use: fill ``get_buffer()``, tell ``advance(n)``, then call ``next()`` until it returns None. A payload is valid
    until the next ``get_buffer()``.

    Args:
        peer: names the sender in errors.
        limit_bytes: largest payload; may be changed between frames.
    """

    def __init__(self, peer: str, limit_bytes: int, read_bytes: int = READ_BYTES) -> None:
        self.peer = peer
        self.limit_bytes = limit_bytes
        self._view = memoryview(bytearray(max(read_bytes, 2 * HEADER_BYTES)))
        self._start = self._end = 0
        # A frame that does not fit the buffer: what came of it, its size and its kind.
        self._large: bytearray | None = None
        self._large_bytes = self._large_kind = 0

    def get_buffer(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start and self._end > len(self._view) // 2:
            # What is left is the front of one frame, so each frame is moved at most once.
            left = self._end - self._start
            self._view[:left] = bytes(self._view[self._start : self._end])
            self._start, self._end = 0, left
        return self._view[self._end :]

    def advance(self, size_bytes: int) -> None:
        """``size_bytes`` bytes were put into the buffer."""
        self._end += size_bytes

    def next(self) -> tuple[int, memoryview] | None:
        """The next whole frame as (kind, payload), or None if more bytes are needed.

        Raises:
            RemoteProtocolError: the stream is not one of frames within the limit. Nothing can be read after that.
        """
        if self._large is not None:
            return self._gather()
        available = self._end - self._start
        if available < HEADER_BYTES:
            return None
        size, kind = _HEADER.unpack_from(self._view, self._start)
        if not GREETING <= kind <= BYE:
            raise RemoteProtocolError(self.peer, f"frame of unknown kind {kind}")
        if size > self.limit_bytes:
            raise RemoteProtocolError(self.peer, f"frame of {size} bytes, {self.limit_bytes} are allowed")
        if available >= HEADER_BYTES + size:
            begin = self._start + HEADER_BYTES
            self._start = begin + size
            return kind, self._view[begin : self._start]
        if HEADER_BYTES + size > len(self._view):
            self._start += HEADER_BYTES
            self._large, self._large_bytes, self._large_kind = bytearray(), size, kind
            return self._gather()
        return None

    def _gather(self) -> tuple[int, memoryview] | None:
        assert self._large is not None
        take = min(self._end - self._start, self._large_bytes - len(self._large))
        self._large += self._view[self._start : self._start + take]
        self._start += take
        if len(self._large) < self._large_bytes:
            return None
        whole, self._large = self._large, None
        return self._large_kind, memoryview(whole)
