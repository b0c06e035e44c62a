"""Room for the large frames that the links of a server gather at once. No I/O.

Each link gathers its own frame, so hundreds of peers that send a video at once would take hundreds of times its size.
Here they go in order: who does not fit waits, and its socket is not read. The first always fits, so there is always one
that goes on; it leaves when its frame is whole, or with its link, which is lost if not a byte of it comes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final

SMALL_BYTES: Final = 1 << 20
"""Frames up to this size take no room."""


class Room:
    """For ``size_bytes`` of frames, or one that is larger."""

    def __init__(self, size_bytes: int) -> None:
        self._free = size_bytes
        self._inside: dict[Hashable, int] = {}
        self._line: OrderedDict[Hashable, tuple[int, Callable[[], None]]] = OrderedDict()

    def enter(self, who: Hashable, size_bytes: int, go: Callable[[], None]) -> bool:
        """Whether there is room now; else ``go`` is called when there is."""
        if self._line or not self._fits(size_bytes):
            self._line[who] = size_bytes, go
            return False
        self._let_in(who, size_bytes)
        return True

    def leave(self, who: Hashable) -> None:
        """It needs no room any more, and waits for none. Idempotent."""
        self._line.pop(who, None)
        self._free += self._inside.pop(who, 0)
        while self._line:
            first, (size_bytes, go) = next(iter(self._line.items()))
            if not self._fits(size_bytes):
                return
            del self._line[first]
            self._let_in(first, size_bytes)
            go()

    def _fits(self, size_bytes: int) -> bool:
        return size_bytes <= self._free or not self._inside

    def _let_in(self, who: Hashable, size_bytes: int) -> None:
        self._inside[who] = size_bytes
        self._free -= size_bytes
