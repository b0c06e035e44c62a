"""Memory that requests hold: their bodies and media, all requests together within one bound.

Bounds on one request do not bound many: 256 bodies of 64 MiB are more than most machines have. And what is held cannot
be taken back: a body is on its way for a minute, and a picture in line for longer. So no tenant gets the last of it:
each holds at most ``_MOST`` times what it leaves to others, whether they are there or not. Alone it has nearly all, and
of many that want more each comes to have as much as the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from aiodisagg.errors import Overloaded

_MOST = 15
"""Alone a tenant has 15/16."""


def most_alone(max_bytes: int) -> int:
    """What one tenant may hold of so many bytes while there is no other."""
    return max_bytes * _MOST // (_MOST + 1)


class Budget:
    """Bytes that may be held at once. Belongs to one loop.

    ``known``: if some are given, all other tenants are one in this, since their names may be made up.
    """

    def __init__(self, max_bytes: int, known: Collection[str] = ()) -> None:
        self.left = max_bytes
        self._known = known
        self._held: Counter[str] = Counter()
        """By tenant; of those only that hold some."""

    @contextmanager
    def share(self, tenant: str) -> Iterator[Share]:
        """What one request of a tenant holds; given back when it is left."""
        share = Share(self, tenant if tenant in self._known or not self._known else "")
        try:
            yield share
        finally:
            share.give_back(share.held)

    def take(self, tenant: str, size_bytes: int) -> None:
        if size_bytes > self.left:
            raise Overloaded(1.0, "the requests that are being answered hold too much memory")
        if self._held[tenant] + size_bytes > _MOST * (self.left - size_bytes):
            raise Overloaded(1.0, "the requests of this tenant that are being answered hold too much memory")
        self.left -= size_bytes
        self._held[tenant] += size_bytes

    def give_back(self, tenant: str, size_bytes: int) -> None:
        self.left += size_bytes
        self._held[tenant] -= size_bytes
        if not self._held[tenant]:
            del self._held[tenant]


class Share:
    """The bytes of one request."""

    def __init__(self, budget: Budget, tenant: str) -> None:
        self._budget, self._tenant = budget, tenant
        self.held = 0

    def take(self, size_bytes: int) -> None:
        """Raises Overloaded if all requests together would hold too much, or all of this tenant."""
        self._budget.take(self._tenant, size_bytes)
        self.held += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self.held -= size_bytes
        self._budget.give_back(self._tenant, size_bytes)
