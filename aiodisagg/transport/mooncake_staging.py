"""Memory of our own that is registered with an engine, for sources that are not.

RDMA reads from slots, so that a transfer which never ends (its target is dead) keeps a slot and not the caller's
memory. All peers of an engine share them, hence two rules: one peer holds less than half, and large pieces leave the
last ones to small pieces. Two peers that die at once leave room for the others until that is noticed.
"""

from __future__ import annotations

import logging

from aiodisagg.errors import TransportUnavailable
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.mooncake_engine import Engine

log = logging.getLogger(__name__)


class Staging:
    """Slots; see the module's text. Used by the pump's thread once there are enough of them.

    A slot that a piece may keep for ever is *lost*; another is made in its place. If it comes back after all, there is
    one more than wanted, and the next loss needs none.
    """

    def __init__(self, engine: Engine, slot_bytes: int, most_lost: int) -> None:
        self.slot_bytes = slot_bytes
        self._engine, self._most_lost = engine, most_lost
        self._wanted = self._lost = 0
        self._arenas: list[Arena] = []
        self._free: list[int] = []

    def add(self) -> None:
        """One more slot. Raises TransportUnavailable."""
        self._make()
        self._wanted += 1

    def _make(self) -> None:
        arena = Arena(self.slot_bytes)
        try:
            self._engine.register(arena.address, arena.size_bytes)
        except BaseException:
            arena.close()
            raise
        self._arenas.append(arena)
        self._free.append(arena.address)

    @property
    def _usable(self) -> int:
        return len(self._arenas) - self._lost

    def take(self, held: int, *, large: bool) -> int | None:
        """A slot for a large or small piece to a peer that holds so many; None: not now."""
        if held >= max(1, self._usable * 3 // 8) or len(self._free) <= large * (self._usable // 8):
            return None
        return self._free.pop()

    def give(self, slot: int) -> None:
        self._free.append(slot)

    def lose(self) -> None:
        """A slot that was taken may never come back: makes another, up to a bound and while there is memory."""
        self._lost += 1
        if self._usable < self._wanted and self._lost <= self._most_lost:
            try:
                self._make()
            except (OSError, TransportUnavailable) as error:
                log.warning("a staging slot is lost and cannot be replaced: %s", error)

    def find(self, slot: int) -> None:
        """A lost one came back."""
        self._lost -= 1
        self._free.append(slot)

    def unregister(self) -> None:
        for arena in self._arenas:
            self._engine.unregister(arena.address)

    def close(self) -> None:
        """Only after the engine is gone."""
        for arena in self._arenas:
            arena.close()
