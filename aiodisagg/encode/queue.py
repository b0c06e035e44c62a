"""Which patches the tower takes next: items in the order they are needed, cut where they may be cut. Pure.

Items are asked for in prompt order inside a request and first come, first served across requests; ``order`` keeps
that, whichever is prepared first. A batch is filled from the front and never with what does not fit, so nothing is
overtaken for ever. A video is cut between frame pairs, which do not see each other; one image is never cut, and one
with more patches than the budget goes alone.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Frame pairs ``[start, stop)`` of an item; an image has one. ``last``: nothing of it is left after this."""

    digest: str
    start: int
    stop: int
    patches: int
    last: bool


@dataclass(slots=True)
class _Entry:
    frames: int
    frame_patches: int
    begun: int = 0


class TowerQueue:
    """Prepared items. ``budget``: patches of a batch. Not thread-safe."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._order: list[tuple[int, str]] = []
        self._entries: dict[str, _Entry] = {}

    def __bool__(self) -> bool:
        return bool(self._order)

    def add(self, digest: str, order: int, frames: int, frame_patches: int) -> None:
        """``order``: what is lower goes first; unique."""
        self._entries[digest] = _Entry(frames, frame_patches)
        insort(self._order, (order, digest))

    def cancel(self, digest: str) -> int:
        """Takes the rest of an item out, and says how many patches that was; 0 if there was nothing left of it."""
        entry = self._entries.pop(digest, None)
        if entry is None:
            return 0
        self._order = [(order, name) for order, name in self._order if name != digest]
        return (entry.frames - entry.begun) * entry.frame_patches

    def take(self) -> list[Piece]:
        """The next batch; empty if nothing waits."""
        batch: list[Piece] = []
        room = self.budget
        while self._order:
            digest = self._order[0][1]
            entry = self._entries[digest]
            fits = room // entry.frame_patches
            if fits < 1 and batch:
                break
            start, entry.begun = entry.begun, min(entry.frames, entry.begun + max(1, fits))
            patches = (entry.begun - start) * entry.frame_patches
            last = entry.begun == entry.frames
            batch.append(Piece(digest, start, entry.begun, patches, last))
            if last:
                del self._entries[digest]
                self._order.pop(0)
            room -= patches
            if room <= 0 or not last:
                break
        return batch
