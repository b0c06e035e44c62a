"""What happens to the machines (events, past tense) and what they ask for (actions, imperative).

A shell feeds events to ``handle(event, now)`` and carries out the returned actions in order; every action that takes
time ends in exactly one event, success or failure. ``now`` is any monotonic clock in seconds. A *peer* is named by
its incarnation: a restarted process is another peer.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from aiodisagg.protocol.messages import ARRIVAL, Chunk, ItemKey, Message, Meta, Urgency
from aiodisagg.protocol.rows import Region


class State(enum.Enum):
    """Public states of one side of one item; the names are the field's."""

    BOOTSTRAPPING = "Bootstrapping"
    """Receiver: no offer in this epoch yet. Sender: wanted, the media or a fence is still missing."""
    WAITING_FOR_INPUT = "WaitingForInput"
    """Offered; no row has been granted or written yet."""
    TRANSFERRING = "Transferring"
    """Rows are under way; covers partial arrival and resume."""
    SUCCESS = "Success"
    FAILED = "Failed"

    @property
    def final(self) -> bool:
        return self in (State.SUCCESS, State.FAILED)


@dataclass(frozen=True, slots=True)
class ItemSpec:
    """What a receiver asks for."""

    digest: str
    kind: str
    grid_thw: tuple[int, int, int]
    rows: int
    fps: float
    media: tuple[bytes, ...] = field(repr=False)
    meta: frozenset[Region] = frozenset()
    """Small regions to be sent along; empty when the receiver's own plan holds them."""
    urgency: Urgency = ARRIVAL
    """As it is when the item is requested."""


# -- events both sides know -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """Arrived over the link to ``peer``: after its LinkUp and never between its LinkLost and the next LinkUp."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A link to this incarnation is open (again)."""

    peer: str


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The link is down. ``gone``: the process is known to have ended, so waiting for it is pointless."""

    peer: str
    gone: bool = False


@dataclass(frozen=True, slots=True)
class TimerFired:
    """``next_timer()`` was reached."""


# -- receiver ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ItemRequested:
    key: ItemKey
    spec: ItemSpec
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Placed:
    """Answer to Place: this peer shall encode the item; its link is up."""

    key: ItemKey
    peer: str


@dataclass(frozen=True, slots=True)
class ItemCancelled:
    key: ItemKey


@dataclass(frozen=True, slots=True)
class ItemHurried:
    """Somebody else waits for the item as well; ``urgency``: as it is now."""

    key: ItemKey
    urgency: Urgency


@dataclass(frozen=True, slots=True)
class RowsTaken:
    """Answer to Take: the rows left the block intact and belong to the item."""

    key: ItemKey
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class RowsRefused:
    """Answer to Take: the rows are as if they had never come. ``why``: they could not be delivered; empty: the checksum
    is wrong."""

    key: ItemKey
    chunk: Chunk
    why: str = ""
    peer: str = ""
    """Whose rows they were, as the Receiver fills in: by now the item may be another peer's."""


@dataclass(frozen=True, slots=True)
class LeasesRevoked:
    """Answer to Revoke: nothing can land under these leases any more."""

    leases: tuple[int, ...]


ReceiverEvent = (
    MessageReceived
    | LinkUp
    | LinkLost
    | TimerFired
    | ItemRequested
    | Placed
    | ItemCancelled
    | ItemHurried
    | RowsTaken
    | RowsRefused
    | LeasesRevoked
)


@dataclass(frozen=True, slots=True)
class Send:
    """Put the message on the link to ``peer``; if that link is down, drop it."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Place:
    """Choose a peer with a link for this item, not one of ``avoid`` if there is another; ends in Placed or never."""

    key: ItemKey
    avoid: frozenset[str]


@dataclass(frozen=True, slots=True)
class Take:
    """Check the chunk's bytes, which lie in the block at ``offset``, and copy them to the item; then RowsTaken."""

    key: ItemKey
    chunk: Chunk
    offset: int
    """Byte of the pool where row ``chunk.start`` lies."""
    size_bytes: int
    meta: Meta | None


@dataclass(frozen=True, slots=True)
class Revoke:
    """Have the transport end what may still land under these leases; then LeasesRevoked."""

    peer: str
    """Empty: its writer is fenced already, and only copies of this side, of planes that copy here, are waited for."""
    leases: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The item is complete and forgotten."""

    key: ItemKey


@dataclass(frozen=True, slots=True)
class Fail:
    """The item failed and is forgotten. ``code``: ``deadline``, ``cancelled``, ``corrupt``, ``undelivered`` (rows came
    and could not be taken), ``unreachable`` (no peer can write here; ``message`` says why) or that of a refusal."""

    key: ItemKey
    code: str
    message: str
    story: tuple[str, ...]


ReceiverAction = Send | Place | Take | Revoke | Finish | Fail


# -- sender -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StageEntered:
    """The encode job entered ``stage``; the one before took ``elapsed_s``. ``waiting_patches``: of all jobs that are
    not done, filled in by the Sender for what it tells receivers."""

    digest: str
    stage: str
    elapsed_s: float
    waiting_patches: int | None = None


@dataclass(frozen=True, slots=True)
class RowsReady:
    """Rows ``[0, stop)`` of the source exist now. With all of them the job is done: ``encoding`` took ``elapsed_s``."""

    digest: str
    stop: int
    elapsed_s: float = 0.0
    waiting_patches: int | None = None
    """As of StageEntered."""


@dataclass(frozen=True, slots=True)
class EncodeStopped:
    """The encode job ended without rows: an error, or CancelEncode."""

    digest: str
    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class ChunkWritten:
    """Answer to Write: the bytes are in the receiver's block."""

    peer: str
    key: ItemKey
    epoch: int
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class WriteFailed:
    """Answer to Write: the bytes may or may not be there, and may still move."""

    peer: str
    key: ItemKey
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class WritesFenced:
    """Answer to Fence: no write of this item begun before can move any more."""

    peer: str
    key: ItemKey


@dataclass(frozen=True, slots=True)
class DrainBegan:
    """From now on new items are refused, for other peers to take; those that are open go on. Ends in Drained."""


SenderEvent = (
    MessageReceived
    | LinkUp
    | LinkLost
    | TimerFired
    | DrainBegan
    | StageEntered
    | RowsReady
    | EncodeStopped
    | ChunkWritten
    | WriteFailed
    | WritesFenced
)


@dataclass(frozen=True, slots=True)
class StartEncode:
    """Encode this item; report StageEntered, RowsReady (growing) and at last all rows, or EncodeStopped."""

    digest: str
    kind: str
    grid_thw: tuple[int, int, int]
    rows: int
    fps: float
    media: tuple[bytes, ...] = field(repr=False)
    urgency: Urgency = ARRIVAL
    """The best of those that wanted it before it was started."""
    alone: bool = False
    """Nothing else shall be in the tower with it."""


@dataclass(frozen=True, slots=True)
class ChangeEncode:
    """What was started is wanted sooner, or alone: that counts as far as it is not in the tower yet."""

    digest: str
    urgency: Urgency
    alone: bool


@dataclass(frozen=True, slots=True)
class CancelEncode:
    """Nobody wants this item any more; ends in EncodeStopped unless its rows are complete already."""

    digest: str


@dataclass(frozen=True, slots=True)
class Write:
    """Write rows ``[start, stop)`` of the source into the peer's pool; then ChunkWritten or WriteFailed."""

    peer: str
    key: ItemKey
    epoch: int
    digest: str
    lease: int
    offset: int
    """Destination byte in the peer's pool."""
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Fence:
    """End this item's write in progress (its answer still comes, before the fence's) and fence; then WritesFenced."""

    peer: str
    key: ItemKey


@dataclass(frozen=True, slots=True)
class DropSource:
    """The rows of this source are not needed any more; free them."""

    digest: str


@dataclass(frozen=True, slots=True)
class Drained:
    """No receiver with a link has an open item any more."""


SenderAction = Send | StartEncode | ChangeEncode | CancelEncode | Write | Fence | DropSource | Drained
