"""When to ping and when to give a peer up. No I/O, no clock: the link calls ``tick`` once a heartbeat.

* Silence is counted in ticks, not read off a clock. A process that itself stood still for ten seconds finds one
  tick, and its peer's bytes waiting in the socket, not a peer to blame. (uvloop runs timers before it reads.)
* Whoever *said* nothing for a tick pings, so a side that stopped reading because its queue is full still lives in
  the eyes of the other.
* Whoever *heard* nothing for a tick pings too, and pings are answered at once by the protocol, so the two sides need
  not agree on a heartbeat.
* While this side does not read, it cannot hear; that silence is its own and is not counted.
"""

from __future__ import annotations

import enum
import math


class Beat(enum.Enum):
    QUIET = "quiet"
    PING = "ping"
    LOST = "lost"


class Pulse:
    """Liveness of one link: lost after ``timeout_s`` of silence, rounded up to whole heartbeats."""

    def __init__(self, heartbeat_s: float, timeout_s: float) -> None:
        self._limit = math.ceil(timeout_s / heartbeat_s - 1e-9)
        self._silent = 0

    def tick(self, *, heard: bool, said: bool, reading: bool) -> Beat:
        """One heartbeat passed, in which a byte was heard or not, said or not, and the socket was read or not."""
        self._silent = self._silent + 1 if reading and not heard else 0
        if self._silent >= self._limit:
            return Beat.LOST
        return Beat.QUIET if heard and said else Beat.PING

    @property
    def quiet(self) -> bool:
        """Nothing was heard in the last two heartbeats; one may pass between a new link's first words and pings."""
        return self._silent > 1

    def __repr__(self) -> str:
        return f"<Pulse silent {self._silent}/{self._limit}>"
