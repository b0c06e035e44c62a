"""What every model family provides, as types that need no torch: chat input, the prompt plan, the encode half.

``ItemKind``, ``Grid`` and digests name an item; :class:`PromptPlan` fixes everything about a prompt that is known
before a single patch is computed (gate A), so KV pages and blocks can be reserved first and vision work spent second.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from aiodisagg.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    import torch

    from aiodisagg.protocol.rows import ModelFingerprint, RowLayout


class ItemKind(enum.StrEnum):
    IMAGE = "image"
    VIDEO = "video"


# -- what a user sends ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of a message. The model's placeholders for images and videos may not be in it."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image of a message, in the place where the prompt has it."""

    data: bytes
    """The encoded file (JPEG, PNG, WebP ...), as received. InvalidRequest is raised for anything else, as a path."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", _file("ImagePart.data", self.data))


@dataclass(frozen=True, slots=True)
class VideoPart:
    """A video of a message, as its frames."""

    frames: tuple[bytes, ...]
    """Encoded images, all of one size, in order."""
    fps: float = 2.0
    """Frames per second; prompts carry the time of each frame pair."""

    def __post_init__(self) -> None:
        frames = tuple(_file(f"VideoPart.frames[{index}]", frame) for index, frame in enumerate(self.frames))
        object.__setattr__(self, "frames", frames)


def _file(param: str, data: object) -> bytes:
    """Other buffers are copied: nobody may change what a digest names."""
    if not isinstance(data, bytes | bytearray | memoryview):
        said = f"takes the bytes of an image file, such as Path(...).read_bytes(), not {type(data).__name__}"
        raise InvalidRequest(param, said)
    return bytes(data)


Part = TextPart | ImagePart | VideoPart


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat. ``role``: ``system``, ``user`` or ``assistant``."""

    role: str
    parts: tuple[Part, ...]


# -- what planning makes of it ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlannedItem:
    """One image or video of a prompt, or some consecutive frame pairs of a video, before it is decoded.

    ``digest`` is a blake2b-128 hex digest over kind, target grid, fps and the media bytes: equal digests give equal
    rows on equal models. ``media`` holds the encoded file(s), one for an image, one a frame for a video.
    """

    digest: str
    kind: ItemKind
    grid_thw: tuple[int, int, int]
    """Patches: temporal, vertical, horizontal (before the 2x2 merge)."""
    rows: int
    """Visual tokens: t * h * w / merge**2."""
    spans: tuple[tuple[int, int], ...]
    """Half-open prompt ranges that the item's rows fill, in row order; a video has one for each frame pair."""
    media: tuple[bytes, ...] = field(repr=False)
    fps: float = 0.0
    param: str = ""
    """Where the client named it, ``messages[i].content[j]``: what errors say. Empty: only its place among the items is
    known."""


def item_digest(kind: ItemKind, grid_thw: tuple[int, int, int], fps: float, media: Sequence[bytes]) -> str:
    """blake2b-128, in hex, of what determines an item's rows on a given model.

    Encode peers check it: what is computed in another way has to have another length, and they take it as it is.
    """
    total = hashlib.blake2b(f"{kind.value} {grid_thw} {fps!r} {[len(m) for m in media]}".encode(), digest_size=16)
    for data in media:
        total.update(data)
    return total.hexdigest()


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """Everything about a prompt that is fixed before vision compute.

    input_ids: int64 [T], placeholders at visual tokens. positions: int64 [3, T] (temporal, height, width).
    delta: add to T + j for the position of decode token j, all three rows. items: in prompt order.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    delta: int
    items: tuple[PlannedItem, ...]

    @property
    def tokens(self) -> int:
        return int(self.input_ids.shape[0])


class Planner(Protocol):
    """Tokenizes chats and plans items. Thread-safe; no weights; called on worker threads."""

    def plan(self, messages: Sequence[ChatMessage], *, limit: int | None = None) -> PromptPlan:
        """Raises InvalidRequest (unknown role, nothing to say), MediaError (not an image, truncated, too large) or,
        before anything of that size is made, PromptTooLong of a prompt of more than ``limit`` tokens."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""

    @property
    def eos_ids(self) -> frozenset[int]: ...


PATCH_BYTES = 3 * 2 * 16 * 16 * 4
"""Of a patch's values."""


@dataclass(frozen=True, slots=True)
class Patches:
    """A preprocessed item and its grid in patches.

    pixel_values: float32 [t*h*w, 3*2*16*16]; or, of an image for an encoder that resizes and cuts on its device, the
    decoded picture, uint8 [1, H, W, 3].
    """

    pixel_values: torch.Tensor
    grid_thw: tuple[int, int, int]

    @property
    def count(self) -> int:
        t, h, w = self.grid_thw
        return t * h * w

    @property
    def room(self) -> int:
        """What it counts where memory is bounded, in patches: a decoded picture may be much larger than its grid."""
        return max(self.count, -(-self.pixel_values.nbytes // PATCH_BYTES))

    def frame_pairs(self, start: int, stop: int) -> Patches:
        """Those of the frame pairs ``[start, stop)`` alone; nothing is copied."""
        t, h, w = self.grid_thw
        if (start, stop) == (0, t) or t == 1:
            return self
        return Patches(self.pixel_values[start * h * w : stop * h * w], (stop - start, h, w))


class VisionEncoder(Protocol):
    """The encode half. ``prepare`` is CPU work, thread-safe; ``encode`` is device work, one call at a time."""

    fingerprint: ModelFingerprint
    layout: RowLayout

    def prepare(self, kind: ItemKind, media: Sequence[bytes], grid_thw: tuple[int, int, int], fps: float) -> Patches:
        """Decodes and cuts into patches. Raises MediaError if the media do not give ``grid_thw``."""

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        """Runs the tower once over a batch: for each item packed rows [rows, (1+k)*h] of ``layout.dtype``.

        A video may come in pieces, some of its frame pairs each: together they must give the rows of the whole.
        """
