"""Where an item is encoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """An encode peer that could take an item. ``rows``: visual tokens it was asked for and has not delivered."""

    peer: str
    rows: int


def place(candidates: Iterable[Candidate], avoid: frozenset[str]) -> str | None:
    """The peer that owes the fewest rows, one of ``avoid`` only if there is no other; None: there is no candidate.

    Rows stand for work: the tower's time and the bytes to move both grow with them. Ties go by name, so that equal
    inputs give equal answers.
    """
    best = min(candidates, key=lambda c: (c.peer in avoid, c.rows, c.peer), default=None)
    return best.peer if best is not None else None
