"""The bodies that the bootstrap server and its client exchange, as JSON."""

from __future__ import annotations

import msgspec

from aiodisagg.bootstrap.registry import Load, PeerEntry, PeerState


class Lease(msgspec.Struct, frozen=True):
    """Answer to a registration and to a heartbeat."""

    lease_s: float
    server: str
    """Random id of the server's life; another one has forgotten everything."""


class Heartbeat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    load: Load = Load()
    state: PeerState | None = None


class Watched(msgspec.Struct, frozen=True):
    """One line of the membership stream. A snapshot holds everyone; a later line holds what changed; none: alive."""

    server: str
    revision: int
    snapshot: bool
    settled: bool
    """False while the server is so young that peers of an earlier life may not have registered yet."""
    entries: tuple[PeerEntry, ...] = ()


class Failure(msgspec.Struct, frozen=True):
    """Body of every 4xx."""

    error: str
