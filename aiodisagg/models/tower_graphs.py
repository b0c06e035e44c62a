"""The tower under CUDA graphs, by how many patches a batch has.

A picture of 720p is computed in 11 ms of an H100, and launched from Python in 15 to 19; beside an engine in the same
process, which launches steps, in 40, and the steps take twice as long as well: each waits for Python's lock at every
launch. A graph is launched in one or two.

A graph is of a size, not of pictures: what it reads (patches, positions, the bounds of segments) lies in buffers, and
any batch that is not larger can use it. What is behind the last patch belongs to no segment: nobody attends to it, and
its rows are dropped. All sizes are captured at the start, when nothing else happens in the process.

FlashAttention 4 reads values in tiles, past the end of a segment, and multiplies them by 0, which makes NaN of what is
not finite. Such may be the values of a neighbour that overflows; and those behind the last patch from the second block
on, whatever the patches there are: nobody writes attention's outputs there, and memory that nobody wrote is anything.
So values that may lie behind a segment are made finite. Keys stay, and show what is wrong with a picture in its rows.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from aiodisagg.device.graphs import Capture

if TYPE_CHECKING:
    from aiodisagg.models.tower import FusedTower, Positions

logger = logging.getLogger(__name__)

PATCHES = (*range(128, 1024, 128), *range(1024, 4096, 256), *range(4096, 8192, 512), *range(8192, 16385, 1024))
"""Sizes; 720p and 1080p are 2 % and 0.4 % below one. Larger batches are launched, which their computing hides."""
SLOTS = {1: 16384, 8: 8192, 64: 8192}
"""How many segments there is room for, and up to which size. An empty one costs next to nothing."""

AttendRanges = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(qkv [N, 3, heads, d], bounds int32 [slots + 1], longest): [N, heads*d]; from each bound to the next, patches attend
to each other. Equal bounds are empty segments; behind the last bound outputs may be anything. What is not finite among
the values of a segment's neighbours, or behind the last bound, may spoil it."""


class TowerGraphs:
    """Captured computations of one tower. Not for two threads at once, and all of its calls by one stream.

    Args:
        attend: may not wait for the device.
        values: elements of a patch. hidden: of a position's embedding. merge: patches of a row. width: elements of a
        row. dtype, device: the tower's. sizes, slots: as ``PATCHES`` and ``SLOTS``.

    Raises what a driver or a library raises.
    """

    def __init__(
        self, tower: FusedTower, attend: AttendRanges, capture: Capture, *, values: int, hidden: int, merge: int,
        width: int, dtype: torch.dtype, device: torch.device, sizes: Sequence[int] = PATCHES,
        slots: dict[int, int] | None = None,
    ) -> None:  # fmt: skip
        from aiodisagg.models.tower import Positions

        self._attend, self._merge = attend, merge
        self._all_sizes = tuple(sizes)
        most, slots = max(sizes), slots or SLOTS
        zeros = functools.partial(torch.zeros, dtype=dtype, device=device)
        cos, sin = zeros(2, most, tower.head_dim, dtype=torch.float32)
        self._patches, self._positions = zeros(most, values), Positions(zeros(most, hidden), cos, sin)
        self._bounds = zeros(max(slots) + 1, dtype=torch.int32)
        self._rows: torch.Tensor = zeros(most // merge, width)
        self._replay: dict[tuple[int, int], Callable[[], None]] = {}
        self._filled: tuple[object, ...] = ()
        """What the buffers of positions and bounds hold."""
        began = time.perf_counter()
        for size in sorted(sizes, reverse=True):  # the memory of the largest serves all
            self._computing(tower, size, 1)()  # compiles, and lets libraries allocate what they keep
            for count in (count for count, limit in slots.items() if size <= limit):
                self._replay[count, size] = capture(self._computing(tower, size, count))
        self._sizes = sorted(self._replay)
        took = time.perf_counter() - began
        logger.info("captured the tower for %d sizes of up to %d patches in %.1f s", len(self._sizes), most, took)

    def __call__(
        self, patches: torch.Tensor, positions: Sequence[Positions], segments: Sequence[int]
    ) -> torch.Tensor | None:
        """Rows [N/merge, width] of patches [N, values], in memory of their own; None: there is no graph for this batch.

        ``positions``: of each picture. ``segments``: patches of each, in order.
        """
        count = patches.shape[0]
        found = next((key for key in self._sizes if key[0] >= len(segments) and key[1] >= count), None)
        if found is None:
            return None
        self._fill(patches, positions, segments, found[0])
        self._replay[found]()
        return self._rows[: count // self._merge].clone()

    def _fill(
        self, patches: torch.Tensor, positions: Sequence[Positions], segments: Sequence[int], slots: int
    ) -> None:  # fmt: skip
        self._patches[: patches.shape[0]].copy_(patches)
        wanted = (*positions, *segments, slots)
        if wanted == self._filled:  # pictures of one size follow each other, and each copy is a launch
            return
        self._filled, at = (), 0
        for of in positions:
            stop = at + of.cos.shape[0]
            self._positions.embeddings[at:stop].copy_(of.embeddings)
            self._positions.cos[at:stop].copy_(of.cos)
            self._positions.sin[at:stop].copy_(of.sin)
            at = stop
        bounds = np.full(slots + 1, at, dtype=np.int32)
        bounds[: len(segments)] = [0, *itertools.accumulate(segments[:-1])]
        self._bounds[: slots + 1].copy_(torch.from_numpy(bounds), non_blocking=True)
        self._filled = wanted

    def _computing(self, tower: FusedTower, size: int, slots: int) -> Callable[[], None]:
        """The tower, which has these graphs, is not kept here: in a cycle, both would keep their memory when nobody has
        them."""
        positions, bounds = self._positions, self._bounds[: slots + 1]
        of_size = type(positions)(positions.embeddings[:size], positions.cos[:size], positions.sin[:size])
        # What may lie behind a segment; where there is one, which fits no smaller size, only what is past that size.
        first = max((smaller for smaller in self._all_sizes if smaller < size), default=0) if slots == 1 else 0

        def attend(qkv: torch.Tensor) -> torch.Tensor:
            qkv[first:, 2].nan_to_num_()
            return self._attend(qkv, bounds, size)

        def compute() -> None:
            tower.compute(self._patches[:size], of_size, attend, self._rows[: size // self._merge])

        return compute
