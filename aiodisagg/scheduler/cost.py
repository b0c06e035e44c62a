"""What an item costs on a peer: its size, and what an encode peer measured of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


@dataclass(frozen=True, slots=True)
class Size:
    """What the cost of an item depends on.

    ``squares``: the sum over frame pairs of the square of a frame pair's patches. ``size_bytes``: of its packed rows.
    """

    patches: int
    squares: int
    size_bytes: int = 0

    @classmethod
    def of(cls, grid_thw: tuple[int, int, int], size_bytes: int = 0) -> Size:
        """Of a grid in patches, before the merge."""
        t, h, w = grid_thw
        return cls(t * h * w, t * (h * w) ** 2, size_bytes)


class Timing(msgspec.Struct, frozen=True, array_like=True):
    """One measured run of a stage over ``patches`` patches; see :class:`Size`."""

    patches: Count
    squares: Count
    seconds: Seconds

    @classmethod
    def of(cls, grid_thw: tuple[int, int, int], seconds: float) -> Timing:
        size = Size.of(grid_thw)
        return cls(size.patches, size.squares, seconds)


class ServiceTimes(msgspec.Struct, frozen=True, array_like=True):
    """An encode peer's self-test: what it measured at its start, warm, one item at a time.

    Two sizes of each stage suffice: what they leave open is taken from the priors' proportions.
    """

    prepare: Annotated[tuple[Timing, ...], msgspec.Meta(max_length=8)] = ()
    tower: Annotated[tuple[Timing, ...], msgspec.Meta(max_length=8)] = ()
    prepare_threads: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    """How many items are prepared at once."""
