"""The one interface behind which bytes move: ``await transport.write(remote, slices)``.

The exchange above it is the same on every transport. The receiver owns one pool (an :class:`Arena`), registers it
once and lends ranges of it; a lend is named by a *lease* number that is never used twice. The sender pushes bytes
into lent ranges and then says so on the control link. A transport knows nothing of items, rows or messages.

Who may touch memory, and when
------------------------------
* ``write`` returning normally means: every byte is in the receiver's pool.
* ``write`` raising, or being cancelled, means nothing: bytes may still be read from the sources and may still land
  in the destination. *Failed does not mean free.*
* The **sender** may reuse the sources of a failed write after ``fence(remote)`` returned.
* The **receiver** may reuse a lent range after a successful write was reported to it, or after
  ``revoke(peer, leases)`` returned. How long that takes depends on :class:`FenceKind`: a transport whose receiving
  side places the bytes itself (memory, zmq, stream) refuses old leases at once; a one-sided one (ipc, RDMA) has to
  wait for the writer's word or its death.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from aiodisagg.errors import WriteRefused
from aiodisagg.transport.arena import Arena

Admit = Callable[[int, int, int], bool]
"""``admit(offset, size_bytes, lease)``: does a range that is lent under this lease right now contain this one?

Called from any thread, several times per write, and never for a range outside the pool. Must not block."""


class FenceKind(enum.Enum):
    RECEIVER = "receiver"
    """The receiving side places every byte and checks its lease; ``revoke`` only waits for a copy in progress."""
    WRITER = "writer"
    """The writer places bytes; only its ``fence`` or the end of its process proves that nothing lands any more."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a transport promises; declared by its class, never guessed by its users."""

    one_sided: bool
    fence: FenceKind
    device_memory: bool
    """Source and destination may be accelerator memory."""
    integrity: bool
    """Bytes cannot change on the way; a checksum per chunk may be left out."""
    zero_copy: bool = False
    """``Remote.view`` gives a writable view of a lent range: the producer may write there and skip ``write``."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One contiguous piece of a write."""

    source: memoryview
    """Bytes to send, C-contiguous, format ``B``; owned by the caller, unchanged until the write is done or fenced."""
    offset: int
    """Destination, in bytes from the start of the remote pool."""
    lease: int
    """The lease under which the receiver lent that range."""


class Remote(ABC):
    """A connected peer's pool, as the writer sees it. Made by ``Transport.connect``."""

    peer: str
    """Name of the peer's incarnation, for logs and errors."""
    size_bytes: int
    """Size of the remote pool."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.peer}, {self.size_bytes} bytes>"


def check_slices(transport: str, remote: Remote, slices: Sequence[Slice]) -> int:
    """The bytes of a write, after a look at every slice; what all transports check before they move anything.

    Raises:
        WriteRefused: a slice ends outside the remote pool.
        ValueError: a source is not contiguous bytes; the caller's mistake, nothing was written.
    """
    total = 0
    for piece in slices:
        source = piece.source
        if not source.c_contiguous or source.itemsize != 1 or source.ndim != 1:
            raise ValueError(f"a source must be one-dimensional contiguous bytes, not {source.format!r}{source.shape}")
        if piece.offset < 0 or piece.offset + source.nbytes > remote.size_bytes:
            text = f"[{piece.offset}, {piece.offset + source.nbytes}) is outside the pool of {remote.size_bytes} bytes"
            raise WriteRefused(transport, text, peer=remote.peer)
        total += source.nbytes
    return total


class Transport(ABC):
    """One data plane of one process: receives into its own pool, writes into the pools of others.

    All methods are called on the event loop's thread, and any number of writes may run concurrently. No method
    blocks the loop for longer than a millisecond; copies run on threads. A transport is used once:
    ``open`` -> any of the rest -> ``aclose``.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    @abstractmethod
    async def open(self, arena: Arena | None, admit: Admit, *, incarnation: str) -> None:
        """Registers the pool that others write into (None: this process only sends) and starts to listen.

        Args:
            arena: the pool; it must stay open until ``aclose`` returned.
            admit: asked before a byte is placed, where the receiving side places bytes.
            incarnation: this process's incarnation; part of the description, checked by those who connect.
        Raises:
            TransportUnavailable: the machine lacks what this transport needs.
        """

    @abstractmethod
    def describe(self) -> bytes:
        """The pool and how to reach it, for another process's ``connect``. At most 4 KiB. Valid until ``aclose``.

        Raises:
            TransportClosed: not open, or closed.
            TransportUnavailable: opened without a pool.
        """

    @abstractmethod
    async def connect(self, description: bytes, *, peer: str) -> Remote:
        """Opens a peer's pool for writing.

        Args:
            description: what the peer's ``describe`` returned; untrusted.
            peer: the incarnation expected there.
        Raises:
            PeerGone: nobody, or another incarnation, answers there.
            TransportUnavailable: reachable in principle, not from here (other host, other user).
        """

    @abstractmethod
    async def write(self, remote: Remote, slices: Sequence[Slice]) -> None:
        """Copies every slice into the remote pool; see the module's text for what the outcome means.

        Raises:
            WriteRefused: a destination is outside the pool, or its lease is not valid there.
            PeerGone: the peer ended.
            WriteFailed: anything else that leaves the outcome open.
            TransportClosed: this transport or the remote is closed.
        """

    @abstractmethod
    async def fence(self, remote: Remote) -> None:
        """Returns when no byte of any earlier write to ``remote``, whatever its outcome, can move any more."""

    @abstractmethod
    async def revoke(self, peer: str, leases: Sequence[int]) -> None:
        """Receiver's side: returns when nothing can land under these leases of ``peer`` any more.

        The caller has already made ``admit`` answer False for them. Where fencing needs the writer
        (``FenceKind.WRITER``) this may wait as long as the writer's process lives; the writer's own word, which
        travels on the control link, may come first, and the caller then cancels this wait.
        """

    @abstractmethod
    async def disconnect(self, remote: Remote) -> None:
        """Returns when nothing of this side is read any more, and forgets the peer; what it may still move is fenced
        later. Idempotent."""

    @abstractmethod
    async def aclose(self) -> None:
        """Ends every write with ``TransportClosed`` or its result, fences, and frees what ``open`` took. Idempotent."""
