"""The bodies that the bootstrap server and its client exchange, as JSON.

Servers and peers of two releases meet in every rolling upgrade, whoever is upgraded first. So whoever reads ignores
fields that it does not know, and of a line of the membership stream it uses the entries that it can read.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import msgspec

from aiodisagg.bootstrap.registry import Load, PeerEntry, PeerState
from aiodisagg.errors import ConfigError

_TOKEN = re.compile(r"[!-~]([ -~]*[!-~])?")


def check_token(key: str, token: str | None) -> None:
    """Raises ConfigError for one that no header can carry, and for an empty one, which anybody has."""
    if token is not None and not _TOKEN.fullmatch(token):
        raise ConfigError(key, "must be printable ASCII, without spaces around it, and not empty")


def check_url(key: str, url: str) -> None:
    """Raises ConfigError for what is no URL of an HTTP server, or has something behind its path."""
    try:
        parts = urlsplit(url)
        whole = not ("?" in url or "#" in url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and whole
    except ValueError:  # of ``port``, and of brackets
        good = False
    if not good:
        raise ConfigError(key, f"{url!r} is not the http(s) URL of a server, such as http://127.0.0.1:8500")


class Lease(msgspec.Struct, frozen=True):
    """Answer to a registration and to a heartbeat."""

    lease_s: float
    server: str
    """Random id of the server's life; another one has forgotten everything."""


class Heartbeat(msgspec.Struct, frozen=True):
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


class _Line(msgspec.Struct, frozen=True):
    """``Watched`` as it comes."""

    server: str
    revision: int
    snapshot: bool
    settled: bool
    entries: tuple[msgspec.Raw, ...] = ()


def read_watched(line: bytes) -> tuple[Watched, tuple[str, ...]]:
    """A line of the membership stream, and why entries were left out of it. Raises ValueError or RecursionError if it
    is no such line at all."""
    read = msgspec.json.decode(line, type=_Line)
    entries, wrong = [], []
    for raw in read.entries:
        try:
            entries.append(msgspec.json.decode(raw, type=PeerEntry))
        except (ValueError, RecursionError) as error:
            wrong.append(str(error))
    return Watched(read.server, read.revision, read.snapshot, read.settled, tuple(entries)), tuple(wrong)


class Failure(msgspec.Struct, frozen=True):
    """Body of every 4xx."""

    error: str
