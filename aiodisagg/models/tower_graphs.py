"""The tower under CUDA graphs, by how many patches a batch has.

A picture of 720p is computed in 11 ms of an H100, and launched from Python in 15 to 19; beside an engine in the same
process, which launches steps, in 40, and the steps take twice as long as well: each waits for Python's lock at every
launch. A graph is launched in less than one.

A graph is of sizes, not of pictures: what it reads (patches, positions, the bounds of segments) lies in buffers, and
batches of up to 6 % fewer patches, however many pictures they are, use the same one. What is behind the last patch
belongs to no segment: nobody attends to it, and its rows are dropped. A size that is met for the second time is
captured; the first time its kernels are compiled.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from aiodisagg.device.graphs import Capture, Captures

if TYPE_CHECKING:
    from aiodisagg.models.tower import FusedTower, Positions

logger = logging.getLogger(__name__)

MOST_PATCHES = 16384
"""Of a batch; larger ones are launched, which their computing hides."""
LEAST_STEP = 128
SLOTS = (1, 8, 64)
"""How many segments a graph has room for. An empty one costs next to nothing, but a picture alone is the usual case."""
KEPT = 48

AttendRanges = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(qkv [N, 3, heads, d], bounds int32 [slots + 1], longest): [N, heads*d]; from each bound to the next, patches attend
to each other. Equal bounds are empty segments; behind the last bound it may be anything."""


def room_for(patches: int) -> int:
    """The size of the graph for so many patches."""
    step = max(LEAST_STEP, 1 << max(0, (patches - 1).bit_length() - 5))
    return -(-patches // step) * step


class TowerGraphs:
    """Captured computations of one tower. Not for two threads at once, and all of its calls by one stream.

    Args:
        attend: may not wait for the device.
        merge: patches of a row. width: elements of a row. dtype, device: the tower's.
        capture: None: as a CUDA graph.
    """

    def __init__(
        self, tower: FusedTower, attend: AttendRanges, *, values: int, hidden: int, merge: int, width: int,
        dtype: torch.dtype, device: torch.device, most: int = MOST_PATCHES, capture: Capture | None = None,
    ) -> None:  # fmt: skip
        from aiodisagg.models.tower import Positions

        self._tower, self._attend, self._merge = tower, attend, merge
        self._most = most
        self._capture = capture or Captures(device)
        zeros = functools.partial(torch.zeros, dtype=dtype, device=device)
        cos, sin = zeros(2, most, tower.head_dim, dtype=torch.float32)
        self._patches, self._positions = zeros(most, values), Positions(zeros(most, hidden), cos, sin)
        self._bounds = zeros(max(SLOTS) + 1, dtype=torch.int32)
        self._rows: torch.Tensor = zeros(most // merge, width)
        self._graphs: OrderedDict[tuple[int, int], Callable[[], None] | None] = OrderedDict()
        self._works = True

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(patches, segments) of graphs, least recently used first."""
        return tuple(key for key, replay in self._graphs.items() if replay is not None)

    def __call__(
        self, patches: torch.Tensor, positions: Sequence[Positions], segments: Sequence[int]
    ) -> torch.Tensor | None:
        """Rows [N/merge, width] of patches [N, values], in memory of their own; None: there is no graph for this batch.

        ``positions``: of each picture. ``segments``: patches of each, in order.
        """
        count = patches.shape[0]
        slots = next((slots for slots in SLOTS if slots >= len(segments)), None)
        if not self._works or slots is None or count > self._most:
            return None
        key = min(room_for(count), self._most), slots
        self._fill(patches, positions, segments, slots)
        if not self._run(*key):
            return None
        self._graphs.move_to_end(key)
        if len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)
        return self._rows[: count // self._merge].clone()

    def _fill(
        self, patches: torch.Tensor, positions: Sequence[Positions], segments: Sequence[int], slots: int
    ) -> None:  # fmt: skip
        self._patches[: patches.shape[0]].copy_(patches)
        at = 0
        for of in positions:
            stop = at + of.cos.shape[0]
            self._positions.embeddings[at:stop].copy_(of.embeddings)
            self._positions.cos[at:stop].copy_(of.cos)
            self._positions.sin[at:stop].copy_(of.sin)
            at = stop
        bounds = np.full(slots + 1, at, dtype=np.int32)
        bounds[: len(segments)] = [0, *itertools.accumulate(segments[:-1])]
        self._bounds[: slots + 1].copy_(torch.from_numpy(bounds), non_blocking=True)

    def _run(self, size: int, slots: int) -> bool:
        def compute() -> None:
            positions, bounds = self._positions, self._bounds[: slots + 1]
            of_size = type(positions)(positions.embeddings[:size], positions.cos[:size], positions.sin[:size])
            self._tower.compute(
                self._patches[:size],
                of_size,
                lambda qkv: self._attend(qkv, bounds, size),
                self._rows[: size // self._merge],
            )

        key = size, slots
        if key not in self._graphs:
            self._graphs[key] = None
            compute()
            return True
        replay = self._graphs[key]
        if replay is None:
            began = time.perf_counter()
            try:
                replay = self._graphs[key] = self._capture(compute)
            except Exception as error:  # what a driver or a library raises
                logger.warning("the tower is launched from now on: %d patches could not be captured: %r", size, error)
                self._works = False
                self._graphs.clear()
                return False
            logger.debug("captured %d patches, %d segments in %.3f s", size, slots, time.perf_counter() - began)
        replay()
        return True
