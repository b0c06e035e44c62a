"""The settings of a link, checked where they enter."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from aiodisagg.errors import ConfigError

MiB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig:
    """Settings of a link. Raises ConfigError, which names the key."""

    heartbeat_s: float = 1.0
    """A side that said or heard nothing for this long pings."""
    timeout_s: float = 5.0
    """A peer of which not one byte came for this long is lost, or too little of a large frame that keeps others waiting
    (:mod:`aiodisagg.link.room`); at least two heartbeats."""
    handshake_timeout_s: float = 5.0
    """From the first connection attempt to a link that may be used."""
    close_timeout_s: float = 1.0
    """How long a closing side tries to get its last bytes out before it cuts the connection."""
    max_frame_bytes: int = 256 * MiB
    """Largest frame, sent or accepted; the smaller one of both sides counts. A ``Want`` carries the encoded files of an
    item. Also what the large frames that come through all links of a server may take together, before they are whole.
    Who dials accepts no frame of more than 1 MiB."""
    high_water_bytes: int = MiB
    """``send`` waits while more than this many written bytes have not left the process."""
    max_unsent_bytes: int = 64 * MiB
    """``send_nowait`` queues at most this much behind the high-water mark; past it the link is closed."""
    max_queued_messages: int = 1024
    """Received and not yet taken: past this the socket is not read. One read (256 KiB) may overshoot."""
    max_queued_bytes: int = 64 * MiB
    """The same bound, in bytes of payload; one message may overshoot."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value <= 0:
                raise ConfigError(f"link.{field.name}", f"must be a positive number, not {value}")
        if self.timeout_s < 2 * self.heartbeat_s:
            raise ConfigError("link.timeout_s", f"must be at least twice heartbeat_s ({self.heartbeat_s:g} s)")
        if self.max_frame_bytes >= 2**32:
            raise ConfigError("link.max_frame_bytes", "must be below 4 GiB, the length is 32 bits wide")
