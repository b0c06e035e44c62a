"""Which digests a peer holds, said in a few kilobytes of a heartbeat.

A list of prefixes of the newest digests, 12 hex digits (48 bits) each. A Bloom filter of 1 % would be a third of that,
but a reader asks every peer: among a hundred such filters somebody claims a digest that nobody holds two times in
three, and since holders win, load would follow these lies. A prefix lies once in 2**48 / entries. A wrong or outdated
claim costs a placement that is not the best; nobody believes it for more than that.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

PREFIX = 12
"""Characters of a digest that are told."""
ADVERTISED = 256
"""Digests that one peer tells of, the newest."""


def advertise(newest_first: Iterable[str]) -> tuple[str, ...]:
    """What a heartbeat says of the digests that a peer holds."""
    return tuple(digest[:PREFIX] for digest in islice(newest_first, ADVERTISED))


def advertised(digest: str, prefixes: frozenset[str]) -> bool:
    """Whether a heartbeat's prefixes claim the digest."""
    return digest[:PREFIX] in prefixes
