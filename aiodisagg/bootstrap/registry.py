"""The registry of peers: pure, with the time passed in.

A peer is a record under a lease. It renews the lease by heartbeats that carry its load; one that misses them becomes
*suspect* and, after another lease, *gone*. States::

    joining -> ready <-> suspect -> gone          ready | joining -> draining -> gone

The registry holds soft state only: whoever it forgot registers again within a lease. Every change has a revision; a
watcher that knows revision r is told how everybody is now who changed since, or everything if it is not known any more
who went since.
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
"""Peers that went, kept for watchers; one that is further behind gets a snapshot."""

Short = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
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
    """Where its local addresses mean what they say, see ``host_name``; the client fills it in. Older ones say the boot
    id alone."""
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
        self.turned = 0
        """Revision of the last change of more than a load: somebody came, went, or changed its state."""
        self._entries: dict[str, PeerEntry] = {}
        self._expires: dict[str, float] = {}
        self._gone: deque[PeerEntry] = deque()
        self._forgotten = 0
        """Revision of the last of them that is not kept any more."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, incarnation: object) -> bool:
        return incarnation in self._entries

    def register(self, record: PeerRecord, now: float) -> PeerEntry:
        """Adds or replaces a peer. Another incarnation at one of its addresses is gone: a process has one life.

        Loopback, abstract sockets and socket files may be the same in two places (``_place``), whose peers would push
        each other out for ever.
        """
        for other in self._others_there(record):
            self.remove(other.incarnation)
        self._expires[record.incarnation] = now + self.lease_s
        known = self._entries.get(record.incarnation)
        if known is not None and known.record == record and known.state is record.state:
            return known
        return self._put(record, record.state, known.load if known else Load())

    def rivals(self, record: PeerRecord) -> list[PeerRecord]:
        """Who would be gone if this peer registered, which was gone itself: they all live, and at most one of them can
        be reached where it says."""
        went = any(gone.record.incarnation == record.incarnation for gone in self._gone)
        return self._others_there(record) if went and record.incarnation not in self._entries else []

    def _others_there(self, record: PeerRecord) -> list[PeerRecord]:
        places = {_place(address, record.host) for address in record.addresses}
        return [
            other.record
            for other in self._entries.values()
            if other.record.incarnation != record.incarnation
            and places.intersection(_place(address, other.record.host) for address in other.record.addresses)
        ]

    def heartbeat(self, incarnation: str, load: Load, state: PeerState | None, now: float) -> PeerEntry | None:
        """Renews a lease; None: the peer is not known and has to register (again)."""
        known = self._entries.get(incarnation)
        if known is None:
            return None
        self._expires[incarnation] = now + self.lease_s
        state = state or (known.record.state if known.state is PeerState.SUSPECT else known.state)
        if (state, load) == (known.state, known.load):
            return known
        return self._put(known.record, state, load, only_load=state is known.state)

    def remove(self, incarnation: str) -> bool:
        """The peer is gone; whether it was known."""
        known = self._entries.pop(incarnation, None)
        if known is None:
            return False
        del self._expires[incarnation]
        self._gone.append(self._next(known.record, PeerState.GONE, known.load))
        if len(self._gone) > HISTORY:
            self._forgotten = self._gone.popleft().revision
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
        found = (entry for entry in self._entries.values() if _plays(entry, role))
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

    def changes_since(self, revision: int, role: PeerRole | None = None) -> list[PeerEntry] | None:
        """Those that changed after ``revision``, as they are now, and those that went, in the order of the changes;
        None: too long ago, or of another registry."""
        if not self._forgotten <= revision <= self.revision:
            return None
        known = (*self._gone, *self._entries.values())
        changed = [entry for entry in known if entry.revision > revision and _plays(entry, role)]
        return sorted(changed, key=lambda entry: entry.revision)

    def _put(self, record: PeerRecord, state: PeerState, load: Load, *, only_load: bool = False) -> PeerEntry:
        entry = self._entries[record.incarnation] = self._next(record, state, load, only_load=only_load)
        return entry

    def _next(self, record: PeerRecord, state: PeerState, load: Load, *, only_load: bool = False) -> PeerEntry:
        self.revision += 1
        if not only_load:
            self.turned = self.revision
        return PeerEntry(record=record, state=state, load=load, revision=self.revision)


def _plays(entry: PeerEntry, role: PeerRole | None) -> bool:
    """``both`` counts for either role."""
    return role in (None, entry.record.role) or entry.record.role is PeerRole.BOTH


def host_name(boot_id: str, net_ns: str, mount_ns: str) -> str:
    """``host`` of a record: in 64 characters, since longer ones are refused."""
    net, mount = (name.partition("[")[2].rstrip("]") for name in (net_ns, mount_ns))  # of net:[4026531840]
    return f"{boot_id}/{net}/{mount}"


_OF_A_NAMESPACE = ("unix:@", "tcp:127.", "tcp:localhost:", "tcp:[::1]:")
"""How addresses begin that mean something in one network namespace only."""


def _place(address: str, host: str) -> tuple[str, ...]:
    """An address, and where it is one: loopback and abstract sockets belong to a network namespace, socket files to a
    mount namespace."""
    boot_id, _, namespaces = host.partition("/")
    net_ns, _, mount_ns = namespaces.partition("/")
    if address.startswith(_OF_A_NAMESPACE):
        return address, boot_id, net_ns
    return (address, boot_id, mount_ns) if address.startswith("unix:") else (address,)


def only_there(address: str, host: str, here: str) -> bool:
    """Whether an address of ``host`` cannot be dialled ``here``, as far as is known; both as ``host_name`` says. Socket
    files may be shared by containers."""
    (theirs, _, at), (ours, _, of) = host.partition("/"), here.partition("/")
    if not (theirs and ours) or not address.startswith((*_OF_A_NAMESPACE, "unix:")):
        return False
    theirs_ns, ours_ns = at.partition("/")[0], of.partition("/")[0]
    other_ns = bool(theirs_ns and ours_ns) and theirs_ns != ours_ns
    return theirs != ours or (other_ns and address.startswith(_OF_A_NAMESPACE))
