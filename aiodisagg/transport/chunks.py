"""Writes as chunks over an ordered connection: the words, fair turns, credit, and when a write has truly ended.

A write is cut in chunks; every chunk is answered by the receiver, placed or refused. At most ``window`` chunks of
one connection are unanswered, which bounds the memory on both sides, and all writes of a connection take turns,
so a small one never waits for the rest of a huge one. A write has *ended* when no byte of it can move any more:
every chunk that was sent has been answered, or its connection is gone, and its memory was let go by whoever sends
it. Failing or cancelling a write only stops further chunks; this is what makes ``fence`` a plain wait for the end.

No sockets, threads or clock here. A lane belongs to whichever thread sends for it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import msgspec

from aiodisagg.transport.base import Slice
from aiodisagg.transport.copying import pieces_of

CHUNK_BYTES = 2 << 20
MAX_HEADER = 4096


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """Writer, first: who I am, the incarnation I expect, and the token of its description. No chunk before."""

    writer: str
    expected: str
    token: bytes


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """Receiver: the pool's size, and its session, which every chunk must name. A restarted receiver has another."""

    session: int
    size_bytes: int


class Gone(msgspec.Struct, frozen=True, array_like=True, tag="gone"):
    """Receiver: not whom you expect."""

    message: str


class Chunk(msgspec.Struct, frozen=True, array_like=True, tag="chunk"):
    """Writer: the bytes that follow belong at ``offset``, under ``lease``."""

    session: int
    number: int
    offset: int
    size_bytes: int
    lease: int


class Placed(msgspec.Struct, frozen=True, array_like=True, tag="placed"):
    number: int


class Rejected(msgspec.Struct, frozen=True, array_like=True, tag="rejected"):
    """Not placed. ``gone``: the session is not this receiver's; else the range is not lent under that lease."""

    number: int
    gone: bool
    message: str


Word = Hello | Welcome | Gone | Chunk | Placed | Rejected
encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Word)


def decode(data: bytes | memoryview) -> Word | None:
    """One word; None for anything else."""
    try:
        word: Word = _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return word


class Outgoing:
    """One write. ``ended(error)`` is called exactly once, when no byte of it can move any more."""

    def __init__(self, slices: Sequence[Slice], chunk_bytes: int, ended: Callable[[Exception | None], None]) -> None:
        self._chunks: Iterator[Slice] = pieces_of(slices, chunk_bytes)
        self._ahead: Slice | None = next(self._chunks, None)
        self._awaited = 0
        self._ended: Callable[[Exception | None], None] | None = ended
        self.error: Exception | None = None

    @property
    def exhausted(self) -> bool:
        return self._ahead is None

    def take(self) -> Slice | None:
        piece, self._ahead = self._ahead, next(self._chunks, None)
        return piece

    def fail(self, error: Exception) -> None:
        """No further chunk; the first error stays."""
        self.error = self.error or error
        self._chunks, self._ahead = iter(()), None
        self._look()

    def hold(self) -> None:
        """One more thing to wait for: an answer, or memory to be let go."""
        self._awaited += 1

    def drop(self) -> None:
        self._awaited -= 1
        self._look()

    def _look(self) -> None:
        if self._ended is not None and self.exhausted and not self._awaited:
            ended, self._ended = self._ended, None
            ended(self.error)


class Lane:
    """The writes of one connection."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._turns: deque[Outgoing] = deque()
        self._numbers = itertools.count()
        self._unanswered: dict[int, Outgoing] = {}

    def __repr__(self) -> str:
        return f"<Lane {len(self._turns)} writes waiting, {len(self._unanswered)}/{self._window} chunks unanswered>"

    def __len__(self) -> int:
        """Chunks that the peer has not answered."""
        return len(self._unanswered)

    @property
    def waiting(self) -> bool:
        """Has the peer chunks to answer?"""
        return bool(self._unanswered)

    @property
    def ready(self) -> bool:
        """Is there credit, and perhaps a chunk for it?"""
        return bool(self._turns) and len(self._unanswered) < self._window

    def add(self, write: Outgoing) -> None:
        if not write.exhausted:
            self._turns.append(write)

    def next(self) -> tuple[int, Slice, Outgoing] | None:
        """The next chunk to send and its number; None: nothing to send, or no credit."""
        while self.ready:
            write = self._turns.popleft()
            piece = write.take()
            if piece is None:
                continue  # failed while it waited
            if not write.exhausted:
                self._turns.append(write)
            number = next(self._numbers)
            write.hold()
            self._unanswered[number] = write
            return number, piece, write
        return None

    def placed(self, number: int) -> bool:
        """False: no such chunk is unanswered; the peer makes it up."""
        write = self._unanswered.pop(number, None)
        if write is None:
            return False
        write.drop()
        return True

    def rejected(self, number: int, error: Exception) -> bool:
        write = self._unanswered.pop(number, None)
        if write is None:
            return False
        write.fail(error)
        write.drop()
        return True

    def fail(self, error: Exception) -> None:
        """The connection is gone: no answer will come, nothing more is sent."""
        turns, self._turns = self._turns, deque()
        unanswered, self._unanswered = self._unanswered, {}
        for write in (*turns, *unanswered.values()):
            write.fail(error)
        for write in unanswered.values():
            write.drop()
