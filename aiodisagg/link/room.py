"""Room for the large frames that the links of a server gather at once. No I/O.

Each link gathers its own frame, so hundreds of peers that send a video at once would take hundreds of times its size.
Here they go in order: who does not fit waits, and the first always fits, so there is always one that goes on.

* Frames that fit pass those that do not. They pass the first in line by as much as there is room, and no more.
* Who is inside leaves when its frame is whole, or with its link. While others wait, a link is heard only by bytes at a
  pace of the frame in ``WHOLE_WITHIN_S``: one that sends less is lost like a silent one.
* Who waits is not read, and so nobody would know that it is gone before its turn came. So it is read once every few
  heartbeats: one that is silent is lost meanwhile, and one that lives gets no more than that read ahead of its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

SMALL_BYTES: Final = 1 << 20
"""Frames up to this size take no room."""
WHOLE_WITHIN_S: Final = 60.0
"""The whole room at 4 MiB/s."""
DEAF_BEATS: Final = 5
"""Heartbeats between two reads of a link that waits."""


@dataclass(slots=True)
class _Waiting:
    size_bytes: int
    go: Callable[[], None]
    passed_bytes: int = 0


class Room:
    """For ``size_bytes`` of frames, or one that is larger."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = self._free = size_bytes
        self._inside: dict[Hashable, int] = {}
        self._line: dict[Hashable, _Waiting] = {}

    @property
    def crowded(self) -> bool:
        """Somebody waits."""
        return bool(self._line)

    def enter(self, who: Hashable, size_bytes: int, go: Callable[[], None]) -> bool:
        """Whether there is room now; else ``go`` is called when there is."""
        if not self._let_in(who, size_bytes):
            self._line[who] = _Waiting(size_bytes, go)
            return False
        return True

    def leave(self, who: Hashable) -> None:
        """It needs no room any more, and waits for none. Idempotent."""
        self._line.pop(who, None)
        self._free += self._inside.pop(who, 0)
        for other, waiting in tuple(self._line.items()):
            if self._let_in(other, waiting.size_bytes):
                waiting.go()

    def _let_in(self, who: Hashable, size_bytes: int) -> bool:
        if size_bytes > self._free and self._inside:
            return False
        first = next(iter(self._line), who)
        if first != who:
            head = self._line[first]
            if head.passed_bytes + size_bytes > self._size_bytes:
                return False
            head.passed_bytes += size_bytes
        self._line.pop(who, None)
        self._inside[who] = size_bytes
        self._free -= size_bytes
        return True


class Place:
    """One link's place in the room. ``changed`` is called when it shall be read again, or not any more."""

    def __init__(self, room: Room, changed: Callable[[], None]) -> None:
        self._room, self._changed = room, changed
        self._frame_bytes = self._come_bytes = 0
        self._waits = False
        self._deaf_beats = 0

    @property
    def read(self) -> bool:
        """Whether its socket is to be read."""
        return self._deaf_beats == 0

    def gather(self, size_bytes: int) -> None:
        """Something came, and a frame of this size is not whole."""
        if self._waits:
            self._deaf_beats = DEAF_BEATS
            self._changed()
        elif not self._frame_bytes and size_bytes > SMALL_BYTES:
            self._frame_bytes = size_bytes
            self._waits = not self._room.enter(self, size_bytes, self._go)

    def leave(self) -> None:
        """The frame is whole, or the link ends."""
        if self._frame_bytes:
            self._frame_bytes = self._come_bytes = self._deaf_beats = 0
            self._waits = False
            self._room.leave(self)
            self._changed()

    def beat(self, come_bytes: int, passed_s: float) -> bool:
        """A heartbeat passed, and so much of the frame has come. Whether that keeps pace, for those who wait."""
        new_bytes, self._come_bytes = come_bytes - self._come_bytes, come_bytes
        if self._deaf_beats:
            self._deaf_beats -= 1
            self._changed()
        inside = self._frame_bytes and not self._waits
        return not (inside and self._room.crowded) or new_bytes * WHOLE_WITHIN_S >= self._frame_bytes * passed_s

    def _go(self) -> None:
        self._waits = False
        self._deaf_beats = 0
        self._changed()
