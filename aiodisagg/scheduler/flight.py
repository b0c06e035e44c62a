"""One fetch for everybody who wants a digest, and what is kept of it afterwards.

``Flights`` says who shares which fetch: the first to want a digest starts one, later ones *share* it, and it ends when
its rows are here, when it failed, or when nobody waits any more. A fetch has one *leg*, a second one while it is
hedged; the first leg to land wins. A leg bears the name of the one it was started for and outlives it while others
share the flight.

``RowCache`` keeps what landed, bounded in bytes, least recently used first to go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True)
class Flight(Generic[K]):
    """A digest under way. ``sharers``: who waits for it, first come first, and until when. ``legs``: its fetches."""

    digest: str
    sharers: dict[K, float] = field(default_factory=dict)
    legs: list[K] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Landing(Generic[K]):
    """A flight is over. ``sharers``: whom to tell; ``cancel``: legs that are not needed any more."""

    digest: str
    sharers: tuple[K, ...]
    cancel: tuple[K, ...]


class Flights(Generic[K]):
    """All flights of a language peer. Pure accounting; ``now`` and deadlines are of one monotonic clock."""

    def __init__(self) -> None:
        self.shared = 0
        """How often a flight was there already."""
        self._by_digest: dict[str, Flight[K]] = {}
        self._by_sharer: dict[K, Flight[K]] = {}
        self._by_leg: dict[K, Flight[K]] = {}

    def __len__(self) -> int:
        return len(self._by_digest)

    def get(self, digest: str) -> Flight[K] | None:
        return self._by_digest.get(digest)

    def of(self, key: K) -> Flight[K] | None:
        """The flight that the key shares or is a leg of."""
        return self._by_sharer.get(key) or self._by_leg.get(key)

    def join(self, digest: str, key: K, deadline: float) -> bool:
        """The key wants the digest; True: start a fetch, a leg named ``key``. False: one is under way."""
        flight = self._by_digest.get(digest)
        started = flight is None
        if flight is None:
            flight = self._by_digest[digest] = Flight(digest)
            self._add_leg(flight, key)
        else:
            self.shared += 1
        flight.sharers[key] = deadline
        self._by_sharer[key] = flight
        return started

    def hedge(self, digest: str, leg: K) -> None:
        """A second fetch is under way for the same digest."""
        self._add_leg(self._by_digest[digest], leg)

    def leave(self, key: K) -> tuple[K, ...]:
        """The key does not wait any more; the legs to cancel, if nobody else does."""
        flight = self._by_sharer.pop(key, None)
        if flight is None:
            return ()
        del flight.sharers[key]
        return () if flight.sharers else self._end(flight).cancel

    def landed(self, leg: K) -> Landing[K] | None:
        """All rows are here, by this leg; None: it belongs to no flight (any more)."""
        flight = self._by_leg.get(leg)
        if flight is None:
            return None
        self._drop_leg(flight, leg)
        return self._end(flight)

    def failed(self, leg: K, *, for_good: bool = False) -> Landing[K] | None:
        """A leg failed; None: another is still under way, or it belongs to no flight.

        ``for_good``: it is the digest's fault, and any other leg would fail as well.
        """
        flight = self._by_leg.get(leg)
        if flight is None:
            return None
        self._drop_leg(flight, leg)
        return None if flight.legs and not for_good else self._end(flight)

    def expired(self, leg: K, now: float) -> tuple[Landing[K] | None, K | None]:
        """A leg reached its deadline, which was its first sharer's: who is out of time, and, if others have some left,
        the one of them whose name the next leg bears."""
        flight = self._by_leg.get(leg)
        if flight is None:
            return None, None
        self._drop_leg(flight, leg)
        late = tuple(key for key, deadline in flight.sharers.items() if deadline <= now)
        if len(late) == len(flight.sharers):
            return self._end(flight), None
        for key in late:
            del flight.sharers[key]
            del self._by_sharer[key]
        landing = Landing(flight.digest, late, ())
        if flight.legs:
            return landing, None
        heir = next(iter(flight.sharers))
        self._add_leg(flight, heir)
        return landing, heir

    def _add_leg(self, flight: Flight[K], leg: K) -> None:
        flight.legs.append(leg)
        self._by_leg[leg] = flight

    def _drop_leg(self, flight: Flight[K], leg: K) -> None:
        flight.legs.remove(leg)
        del self._by_leg[leg]

    def _end(self, flight: Flight[K]) -> Landing[K]:
        del self._by_digest[flight.digest]
        landing = Landing(flight.digest, tuple(flight.sharers), tuple(flight.legs))
        for key in flight.sharers:
            del self._by_sharer[key]
        for leg in flight.legs:
            del self._by_leg[leg]
        return landing


class RowCache(Generic[V]):
    """Rows by digest; ``capacity_bytes`` bounds those kept. What was handed out lives as long as it is used."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.hits = self.misses = self.saved_bytes = self.evicted = 0
        self._kept: OrderedDict[str, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, digest: object) -> bool:
        return digest in self._kept

    def get(self, digest: str) -> V | None:
        """What is kept under the digest, now the last to go; counts a hit or a miss."""
        found = self._kept.get(digest)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self.saved_bytes += found[1]
        self._kept.move_to_end(digest)
        return found[0]

    def put(self, digest: str, value: V, size_bytes: int) -> tuple[str, ...]:
        """Keeps the value, unless it is larger than the capacity; the digests that had to go."""
        if size_bytes > self.capacity_bytes:
            return ()
        if digest in self._kept:
            self.used_bytes -= self._kept.pop(digest)[1]
        gone = []
        while self.used_bytes + size_bytes > self.capacity_bytes:
            oldest, (_, size) = self._kept.popitem(last=False)
            self.used_bytes -= size
            gone.append(oldest)
        self.evicted += len(gone)
        self._kept[digest] = (value, size_bytes)
        self.used_bytes += size_bytes
        return tuple(gone)
