"""Which patches the tower takes next: items in the order they are needed, cut where they may be cut. Pure.

Across requests the order is the one of :mod:`aiodisagg.scheduler.order`, by arrival within a class: threads prepare the
shortest request first, and a tower that did so as well would let the last picture of many wait for all requests of one,
with the KV pages of its prompt held (simulated at high load: 1.11 of the mean time to a first token, and twice its
p99). Inside a request items are asked for in prompt order, and go in it, whichever is prepared first. A batch is
filled from the front and never with what does not fit, so nothing is overtaken for ever. A video is cut between frame
pairs, which do not see each other; one image is never cut, and one with more patches than the budget goes alone.
What is to be alone shares no batch, and once it has begun nothing else is taken until all of it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from aiodisagg.scheduler.order import Claim, Order, Queue


@dataclass(frozen=True, slots=True)
class Piece:
    """Frame pairs ``[start, stop)`` of an item; an image has one. ``last``: nothing of it is left after this.
    ``alone``: nothing else shall be in the tower with it."""

    digest: str
    start: int
    stop: int
    patches: int
    last: bool
    alone: bool = False


@dataclass(slots=True)
class _Entry:
    frames: int
    frame_patches: int
    alone: bool
    begun: int = 0


class TowerQueue:
    """Prepared items. ``budget``: patches of a batch. Not thread-safe."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._line: Queue[str] = Queue(Order.FIRST_COME)
        self._entries: dict[str, _Entry] = {}
        self._begun_alone: str | None = None

    def __bool__(self) -> bool:
        return bool(self._entries)

    def add(self, digest: str, claim: Claim, frames: int, frame_patches: int, *, alone: bool = False) -> None:
        """``claim``: its request's, but ``arrived``, which is the item's own."""
        self._entries[digest] = _Entry(frames, frame_patches, alone)
        self._line.add(digest, claim)

    def change(self, digest: str, claim: Claim, *, alone: bool) -> None:
        """From now on this counts for the rest of an item, if there is one."""
        if (entry := self._entries.get(digest)) is not None:
            entry.alone = alone
            self._line.remove(digest)
            self._line.add(digest, claim)

    def cancel(self, digest: str) -> None:
        """Takes the rest of an item out, if there is one."""
        if self._entries.pop(digest, None) is not None:
            self._line.remove(digest)
        if digest == self._begun_alone:
            self._begun_alone = None

    def first(self, now: float) -> str | None:
        """What the next batch begins with; None if nothing waits. ``now``: on the clock of the claims, as in ``take``;
        it does not go back."""
        return self._begun_alone or self._line.first(now)

    def alone(self, now: float) -> bool:
        """Whether the next batch is of an item that is to be alone."""
        digest = self.first(now)
        return digest is not None and self._entries[digest].alone

    def take(self, now: float) -> list[Piece]:
        """The next batch; empty if nothing waits."""
        batch: list[Piece] = []
        room = self.budget
        while (digest := self.first(now)) is not None:
            entry = self._entries[digest]
            fits = room // entry.frame_patches
            if batch and (fits < 1 or entry.alone):
                break
            start, entry.begun = entry.begun, min(entry.frames, entry.begun + max(1, fits))
            patches = (entry.begun - start) * entry.frame_patches
            last = entry.begun == entry.frames
            batch.append(Piece(digest, start, entry.begun, patches, last, entry.alone))
            self._begun_alone = digest if entry.alone and not last else None
            if last:
                del self._entries[digest]
                self._line.remove(digest)
            room -= patches
            if room <= 0 or not last or entry.alone:
                break
        return batch
