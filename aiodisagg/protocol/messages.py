"""The words on a control link: msgspec tagged unions, one encoder, one decoder.

The language peer (receiver) speaks ``Want``, ``Grant``, ``Release``, ``Cancel``; the encode peer (sender) speaks
``Offer``, ``Progress``, ``Commit``, ``Fenced``, ``Refuse``. Every message names the item and the epoch. Nothing a
peer sends is used before :func:`decode` checked its form and the machines checked its meaning; the only error that
malformed bytes can raise is :class:`~aiodisagg.errors.RemoteProtocolError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec

from aiodisagg.errors import RemoteProtocolError
from aiodisagg.protocol.ranges import MOST_SPANS
from aiodisagg.protocol.rows import ModelFingerprint

Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
"""Finite: one not-a-number among timers would stop all of them."""
FOREVER_S = 9e8
"""More than this is this, where a time is to be said: what is left of it is rounded."""
Span = tuple[Count, Count]
"""A half-open row range."""
Held = Annotated[tuple[Span, ...], msgspec.Meta(max_length=MOST_SPANS)]
MOST_LENDS = 1024
"""Of an item that are open at a time."""
MOST_WRITTEN = 4096
"""Chunks that are restated; rows of others are sent again."""
MOST_FILES = 1 << 16
"""Of an item: frames of a video."""


class ItemKey(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One item of one request: the room both sides meet in, and the item's index in the prompt."""

    room: Count
    index: Count

    def __str__(self) -> str:
        return f"{self.room:x}.{self.index}"


class Lend(msgspec.Struct, frozen=True, array_like=True):
    """One block lent for the rows ``[start, stop)``; row ``start`` goes to byte ``offset`` of the receiver's pool."""

    lease: Count
    offset: Count
    start: Count
    stop: Count


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Rows ``[start, stop)`` written under ``lease``; ``checksum``: xxh3-64 of the packed bytes, 0 if switched off."""

    lease: Count
    start: Count
    stop: Count
    checksum: Annotated[int, msgspec.Meta(ge=0)]
    on_device: bool = False
    """They lie in the pool's twin in device memory. There is no checksum: no host has seen the bytes."""


class Meta(msgspec.Struct, frozen=True, array_like=True):
    """The small regions of the rows ``[start, stop)``, each present only if it was wanted."""

    start: Count
    stop: Count
    fill_ids: bytes | None
    mrope: bytes | None
    """Row-major int32 [stop - start, 3]: a range of rows is a range of bytes, so windows cannot mix axes."""
    aux: bytes | None


class Urgency(msgspec.Struct, frozen=True, array_like=True):
    """What an item's request can say for its place at an encode peer, by the rule of :mod:`aiodisagg.scheduler.order`.

    Who says nothing is due at once, and goes by arrival.
    """

    due_s: Seconds = 0.0
    """From now until it goes before all that are not due."""
    priority: int = 0
    """Lower goes first."""
    work: Count = 0
    """Patches that the request needs from towers, this item's included."""

    def later(self, seconds: float) -> Urgency:
        """The same, after so many seconds."""
        return Urgency(max(0.0, self.due_s - seconds), self.priority, self.work)

    def before(self, other: Urgency) -> bool:
        """Whether who says this goes first, of two that come at once."""
        mine, theirs = ((one.due_s > 0, one.priority, one.work, one.due_s) for one in (self, other))
        return mine < theirs


ARRIVAL = Urgency()
"""First come, first served."""


class Want(msgspec.Struct, frozen=True, tag="want", array_like=True):
    """Receiver: I need this item; I hold these rows; this is epoch ``epoch``. Also how every resume begins."""

    key: ItemKey
    epoch: Count
    digest: Annotated[str, msgspec.Meta(max_length=64)]
    kind: Annotated[str, msgspec.Meta(max_length=16)]
    grid_thw: tuple[Count, Count, Count]
    rows: Count
    fps: Seconds
    held: Held
    """Packed rows already in the ledger."""
    meta: Annotated[tuple[Count, ...], msgspec.Meta(max_length=16)]
    """Small regions (their numbers) that the receiver lacks; empty when it planned the prompt itself."""
    model: ModelFingerprint
    timeout_s: Seconds
    """Time left to the item's deadline when this was sent."""
    media: Annotated[tuple[bytes, ...], msgspec.Meta(max_length=MOST_FILES)] | None
    """The encoded file(s); None if the sender should still have them or the rows."""
    urgency: Urgency = ARRIVAL
    """Older peers neither say nor read it, nor what follows."""
    alone: bool = False
    """Perhaps encoders die of it: nothing else shall be in the tower with it."""


class Grant(msgspec.Struct, frozen=True, tag="grant", array_like=True):
    """Receiver: these rows are held; these blocks are yours to fill."""

    key: ItemKey
    epoch: Count
    lends: Annotated[tuple[Lend, ...], msgspec.Meta(max_length=MOST_LENDS)]
    held: Held


class Release(msgspec.Struct, frozen=True, tag="release", array_like=True):
    """Receiver: every row is held; your source is no longer mine to need."""

    key: ItemKey
    epoch: Count


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    """Receiver: stop; answer ``Fenced`` when no write of mine can move any more."""

    key: ItemKey
    epoch: Count


class Offer(msgspec.Struct, frozen=True, tag="offer", array_like=True):
    """Sender: I will provide this item. Nothing of an older epoch moves any more.

    ``written`` restates chunks of older epochs whose writes finished but whose commits may have been lost with a
    link, so that only what was in flight is sent again. ``needs_media``: send the files in another ``Want``.
    """

    key: ItemKey
    epoch: Count
    rows: Count
    model: ModelFingerprint
    needs_media: bool
    ready: Count
    written: Annotated[tuple[tuple[Chunk, Meta | None], ...], msgspec.Meta(max_length=MOST_WRITTEN)]
    writing: bool = False
    """A write of this epoch is under way; when it has failed is for its transport to say. Older peers neither say nor
    read it."""


class Progress(msgspec.Struct, frozen=True, tag="progress", array_like=True):
    """Sender: ``ready`` rows exist, and the item entered ``stage``.

    Stages are ``preparing``, ``prepared``, ``encoding`` and ``encoded``. The first two are left out if they are over
    before they could be said; ``encoding`` then tells what preparing took.
    ``ready`` counts the contiguous front of rows that can be written now, so blocks can be lent where they are used.
    It grows batch by batch of the tower, ``encoding`` being said again with each.
    """

    key: ItemKey
    epoch: Count
    stage: Annotated[str, msgspec.Meta(max_length=32)]
    elapsed_s: Seconds
    """Seconds that the stage before this one took."""
    ready: Count
    waiting_patches: Count | None = None
    """Of all items that the sender has not encoded yet, for whomever. Older peers neither say nor read it."""


class Commit(msgspec.Struct, frozen=True, tag="commit", array_like=True):
    """Sender: this chunk is written; its small regions come along where wanted."""

    key: ItemKey
    epoch: Count
    chunk: Chunk
    meta: Meta | None


class Fenced(msgspec.Struct, frozen=True, tag="fenced", array_like=True):
    """Sender: no write of this item under ``epoch`` or an older one can move any more."""

    key: ItemKey
    epoch: Count
    reason: Text = ""
    """Why it stopped unasked, e.g. the error of the write that failed. Older peers neither say nor read it."""


class Refuse(msgspec.Struct, frozen=True, tag="refuse", array_like=True):
    """Sender: I cannot provide this item. ``retryable``: another peer may. Nothing of it moves any more."""

    key: ItemKey
    epoch: Count
    code: Annotated[str, msgspec.Meta(max_length=64)]
    message: Text
    retryable: bool


FromReceiver = Want | Grant | Release | Cancel
FromSender = Offer | Progress | Commit | Fenced | Refuse
Message = FromReceiver | FromSender

_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


encode: Callable[[Message], bytes] = msgspec.msgpack.Encoder().encode
"""The message as one frame's payload."""


def decode(data: bytes | bytearray | memoryview, peer: str) -> Message:
    """The message in one frame's payload. Raises RemoteProtocolError, whatever the bytes are."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(peer, f"not a message: {error}") from error
