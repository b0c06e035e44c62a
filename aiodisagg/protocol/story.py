"""What happened to one item, for people: short, bounded, printed with its error."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

LINES = 24
"""So much is remembered; the oldest goes first."""


@dataclass(slots=True)
class Story:
    """``born``: when the item was asked for; lines say how long after that."""

    born: float
    _told: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=LINES))

    def tell(self, now: float, what: str) -> None:
        self._told.append((now, what))

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(f"{now - self.born:.3f}s {what}" for now, what in self._told)
