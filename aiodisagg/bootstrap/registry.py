"""The registry of peers: pure, with the time passed in.

A peer is a record under a lease. It renews the lease by heartbeats that carry its load; one that misses them becomes
*suspect* and, after another lease, *gone*. States::

    joining -> ready <-> suspect -> gone          ready | joining -> draining -> gone

The registry holds soft state only: whoever it forgot registers again within a lease. Every change has a revision; a
watcher that knows revision r is told what happened since, or everything if that is no longer known.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Annotated

import msgspec

from aiodisagg.link.hello import PeerRole
from aiodisagg.protocol.rows import ModelFingerprint
from aiodisagg.scheduler.advertise import ADVERTISED, PREFIX
from aiodisagg.scheduler.cost import ServiceTimes

HISTORY = 1024
"""Changes kept for watchers; one that is further behind gets a snapshot."""

Short = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Prefix = Annotated[str, msgspec.Meta(max_length=PREFIX)]


class PeerState(enum.StrEnum):
    JOINING = "joining"
    """Registered, cannot serve yet."""
    READY = "ready"
    DRAINING = "draining"
    """Finishes what it has; takes nothing new."""
    SUSPECT = "suspect"
    """Its lease ran out; perhaps it is only slow."""
    GONE = "gone"


class Load(msgspec.Struct, frozen=True, omit_defaults=True):
    """How busy a peer is: items or requests that wait, and that are under way. What is zero is not sent."""

    queued: Count = 0
    active: Count = 0
    patches: Count = 0
    """Of items that are to be encoded: the work that lies before a new one."""
    digests: Annotated[tuple[Prefix, ...], msgspec.Meta(max_length=ADVERTISED)] = ()
    """Prefixes of the newest digests of which an encode peer has all rows; see ``scheduler.advertise``."""


class PeerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer says of itself when it registers. What a later release says besides is not read."""

    name: Short
    incarnation: Short
    role: PeerRole
    addresses: tuple[Short, ...] = ()
    """Where it accepts links."""
    transports: tuple[Short, ...] = ()
    model: ModelFingerprint | None = None
    capacity: Count = 0
    """Items or requests it can work on at once; 0: not said."""
    http_url: str | None = None
    host: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """Boot id of its kernel; the client fills it in."""
    state: PeerState = PeerState.READY
    times: ServiceTimes | None = None
    """What its self-test measured, if it encodes."""


class PeerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A peer as others see it."""

    record: PeerRecord
    state: PeerState
    load: Load
    revision: int


class Registry:
    """All peers. Not thread-safe. ``now`` is any monotonic clock in seconds.

    Args:
        lease_s: how long a registration or a heartbeat is good for.
    """

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self.revision = 0
        self._entries: dict[str, PeerEntry] = {}
        self._expires: dict[str, float] = {}
        self._changes: deque[PeerEntry] = deque(maxlen=HISTORY)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, incarnation: object) -> bool:
        return incarnation in self._entries

    def register(self, record: PeerRecord, now: float) -> PeerEntry:
        """Adds or replaces a peer. Another incarnation at one of its addresses is gone: a process has one life.

        Unix sockets and loopback belong to a host: two hosts may use the same ones, and would push each other out
        for ever.
        """
        for other in list(self._entries.values()):
            shares = [a for a in other.record.addresses if a in record.addresses]
            if other.record.host != record.host:
                shares = [a for a in shares if not _is_local(a)]
            if shares and other.record.incarnation != record.incarnation:
                self.remove(other.record.incarnation)
        self._expires[record.incarnation] = now + self.lease_s
        known = self._entries.get(record.incarnation)
        if known is not None and known.record == record and known.state is record.state:
            return known
        return self._put(record, record.state, known.load if known else Load())

    def heartbeat(self, incarnation: str, load: Load, state: PeerState | None, now: float) -> PeerEntry | None:
        """Renews a lease; None: the peer is not known and has to register (again)."""
        known = self._entries.get(incarnation)
        if known is None:
            return None
        self._expires[incarnation] = now + self.lease_s
        state = state or (known.record.state if known.state is PeerState.SUSPECT else known.state)
        if (state, load) == (known.state, known.load):
            return known
        return self._put(known.record, state, load)

    def remove(self, incarnation: str) -> bool:
        """The peer is gone; whether it was known."""
        known = self._entries.pop(incarnation, None)
        if known is None:
            return False
        del self._expires[incarnation]
        self._note(known.record, PeerState.GONE, known.load)
        return True

    def expire(self, now: float) -> None:
        """Makes peers suspect whose lease ran out, and gone whose lease ran out a lease ago."""
        for incarnation, until in list(self._expires.items()):
            if now >= until + self.lease_s:
                self.remove(incarnation)
            elif now >= until and (entry := self._entries[incarnation]).state is not PeerState.SUSPECT:
                self._put(entry.record, PeerState.SUSPECT, entry.load)

    def next_expiry(self) -> float | None:
        """When ``expire`` will change something."""
        due = [
            until + (self.lease_s if self._entries[who].state is PeerState.SUSPECT else 0.0)
            for who, until in self._expires.items()
        ]
        return min(due, default=None)

    def peers(self, role: PeerRole | None = None) -> list[PeerEntry]:
        """Known peers, by name; ``both`` counts for either role."""
        found = (e for e in self._entries.values() if role in (None, e.record.role) or e.record.role is PeerRole.BOTH)
        return sorted(found, key=lambda entry: (entry.record.name, entry.record.incarnation))

    def match(self, incarnation: str) -> list[PeerEntry] | None:
        """Ready peers that can encode for this one (same model), least busy first; None: it is not known."""
        asker = self._entries.get(incarnation)
        if asker is None:
            return None
        able = [
            entry
            for entry in self.peers(PeerRole.ENCODE)
            if entry.state is PeerState.READY
            and entry.record.model == asker.record.model
            and entry.record.incarnation != incarnation
        ]
        return sorted(able, key=lambda entry: (entry.load.queued + entry.load.active, entry.record.name))

    def changes_since(self, revision: int) -> list[PeerEntry] | None:
        """Entries changed after ``revision``, oldest first; None: too long ago, or of another registry."""
        if revision > self.revision or (self.revision > revision and self._oldest() > revision + 1):
            return None
        return [entry for entry in self._changes if entry.revision > revision]

    def _oldest(self) -> int:
        return self._changes[0].revision if self._changes else self.revision + 1

    def _put(self, record: PeerRecord, state: PeerState, load: Load) -> PeerEntry:
        entry = self._entries[record.incarnation] = self._note(record, state, load)
        return entry

    def _note(self, record: PeerRecord, state: PeerState, load: Load) -> PeerEntry:
        self.revision += 1
        entry = PeerEntry(record=record, state=state, load=load, revision=self.revision)
        self._changes.append(entry)
        return entry


def _is_local(address: str) -> bool:
    return address.startswith(("unix:", "tcp:127.", "tcp:localhost:", "tcp:[::1]:"))
