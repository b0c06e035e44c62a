"""Memory that requests hold: their bodies and media, all requests together within one bound.

Bounds on one request do not bound many: 256 bodies of 64 MiB are more than most machines have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aiodisagg.errors import Overloaded


class Budget:
    """Bytes that may be held at once. Belongs to one loop."""

    def __init__(self, max_bytes: int) -> None:
        self.left = max_bytes

    @contextmanager
    def share(self) -> Iterator[Share]:
        """What one request holds; given back when it is left."""
        share = Share(self)
        try:
            yield share
        finally:
            share.give_back(share.held)


class Share:
    """The bytes of one request."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.held = 0

    def take(self, size_bytes: int) -> None:
        """Raises Overloaded if all requests together would hold too much."""
        if size_bytes > self._budget.left:
            raise Overloaded(1.0, "the requests that are being answered hold too much memory")
        self._budget.left -= size_bytes
        self.held += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self.held -= size_bytes
        self._budget.left += size_bytes
