"""Frames: a length (u32, big endian), a kind (u8), the payload. No I/O.

A frame that came whole, as small ones do, is cut out of what was read. A part of one is gathered in a growing
``bytearray``; memory follows what arrived, not what the header promised, and each byte is moved once (growth is
amortised), however it was cut up.
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


def header(kind: int, size_bytes: int) -> bytes:
    """The header of a frame whose payload follows."""
    return _HEADER.pack(size_bytes, kind)


def frame(kind: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return _HEADER.pack(len(payload), kind) + payload


class FrameReader:
    """Cuts a byte stream into frames: ``feed`` what came, then call ``next`` until it returns None.

    Args:
        peer: names the sender in errors.
        limit_bytes: largest payload; may be changed between frames.
    """

    def __init__(self, peer: str, limit_bytes: int) -> None:
        self.peer = peer
        self.limit_bytes = limit_bytes
        self._data = b""
        self._start = self._end = 0
        # A frame of which a part came: that part, its size and its kind.
        self._part: bytearray | None = None
        self._size_bytes = self._kind = 0

    @property
    def part_bytes(self) -> int:
        """Size of the frame of which a part came; 0: there is none."""
        return 0 if self._part is None else self._size_bytes

    @property
    def come_bytes(self) -> int:
        """Size of that part."""
        return 0 if self._part is None else len(self._part)

    def feed(self, data: bytes) -> None:
        """The next bytes of the stream. ``next`` has returned None since the last."""
        if self._start != self._end:  # a part of a header, four bytes at most
            data = self._data[self._start :] + data
        self._data, self._start, self._end = data, 0, len(data)

    def next(self) -> tuple[int, bytes | bytearray] | None:
        """The next whole frame as (kind, payload), or None if more bytes are needed.

        Raises:
            RemoteProtocolError: the stream is not one of frames within the limit. Nothing can be read after that.
        """
        if self._part is not None:
            return self._gather(self._part)
        begin = self._start + HEADER_BYTES
        if begin > self._end:
            return None
        size, kind = _HEADER.unpack_from(self._data, self._start)
        if not GREETING <= kind <= BYE:
            raise RemoteProtocolError(self.peer, f"frame of unknown kind {kind}")
        if size > self.limit_bytes:
            raise RemoteProtocolError(self.peer, f"frame of {size} bytes, {self.limit_bytes} are allowed")
        stop = begin + size
        if stop <= self._end:
            self._start = stop
            return kind, self._data[begin:stop]
        self._start = begin
        self._part, self._size_bytes, self._kind = bytearray(), size, kind
        return self._gather(self._part)

    def _gather(self, part: bytearray) -> tuple[int, bytearray] | None:
        take = min(self._end - self._start, self._size_bytes - len(part))
        part += memoryview(self._data)[self._start : self._start + take]
        self._start += take
        if len(part) < self._size_bytes:
            return None
        self._part = None
        return self._kind, part
