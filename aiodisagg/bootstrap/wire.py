"""The bodies that the bootstrap server and its client exchange, as JSON."""

from __future__ import annotations

import re

import msgspec

from aiodisagg.bootstrap.registry import Load, PeerEntry, PeerState
from aiodisagg.errors import ConfigError

_TOKEN = re.compile(r"[!-~]([ -~]*[!-~])?")


def check_token(key: str, token: str | None) -> None:
    """Raises ConfigError for one that no header can carry, and for an empty one, which anybody has."""
    if token is not None and not _TOKEN.fullmatch(token):
        raise ConfigError(key, "must be printable ASCII, without spaces around it, and not empty")


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
