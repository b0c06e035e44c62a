"""What a row is: the five regions of an item, their sizes, and the model they belong to.

A row is what one visual token of an item needs. Its bf16 (or fp16, fp32) parts lie side by side in a block::

    [ input_embeddings: h | deepstack 0: h | deepstack 1: h | ... | deepstack k-1: h ]     one packed row

so a range of rows is one contiguous piece of memory and a block is the packed ``[n, (1+k)*h]`` tensor. The three
small int32 regions follow from the plan and the grid; a receiver that planned the prompt holds them before anything
is encoded, and what a ledger holds is not sent.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec

AUX_INTS = 16
"""int32 values of region 3: kind, t, h, w, rows, levels, placeholder id, the rest zero."""

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Region(enum.IntEnum):
    """The regions of an item; the numbers are the field's buffer indices."""

    INPUT = 0
    FILL_IDS = 1
    MROPE = 2
    AUX = 3
    DEEPSTACK = 4


class ModelFingerprint(msgspec.Struct, frozen=True, array_like=True):
    """Two peers may exchange rows only if all of this is equal; every offer is checked against it."""

    architecture: str
    """The checkpoint's architecture, e.g. ``Qwen3VLMoeForConditionalGeneration``."""
    hidden_size: int
    deepstack_levels: int
    dtype: str
    """Element type of packed rows: ``bfloat16``, ``float16`` or ``float32``."""
    weights: str
    """Digest of what determines the rows: the vision tower's tensors and the preprocessing settings."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Sizes of packed rows.

    Args:
        hidden_size: h, the text model's hidden size.
        deepstack_levels: k, any number of levels, 0 included.
        dtype: element type of the packed part.
    """

    hidden_size: int
    deepstack_levels: int
    dtype: str

    def __post_init__(self) -> None:
        if self.hidden_size <= 0 or self.deepstack_levels < 0 or self.dtype not in DTYPE_BYTES:
            raise ValueError(f"not a row layout: {self!r}")

    @classmethod
    def of(cls, model: ModelFingerprint) -> RowLayout:
        return cls(model.hidden_size, model.deepstack_levels, model.dtype)

    @property
    def width(self) -> int:
        """Elements of a packed row, (1+k)*h."""
        return (1 + self.deepstack_levels) * self.hidden_size

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row."""
        return self.width * DTYPE_BYTES[self.dtype]

    def region_bytes(self, region: Region) -> int:
        """Bytes of one row in ``region``; for AUX, of the whole item."""
        element = DTYPE_BYTES[self.dtype]
        match region:
            case Region.INPUT:
                return self.hidden_size * element
            case Region.DEEPSTACK:
                return self.deepstack_levels * self.hidden_size * element
            case Region.FILL_IDS:
                return 4
            case Region.MROPE:
                return 12
            case Region.AUX:
                return 4 * AUX_INTS
