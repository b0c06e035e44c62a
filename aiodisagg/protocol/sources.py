"""What a sender can send: encoded items by content digest, bounded in bytes.

One source serves every room that wants its digest (single flight). It is kept while anybody may still ask for rows
of it, and after that as a cache, least recently used first to go, so that a repeated image or a restarted receiver
starts at once. Room for a source is promised before its encoding begins.

Its files are kept until all of its rows exist, and bounded as well. What there is no room for is *put aside*: its
files are dropped, and its receivers are told that it will be provided, as of everything that waits. A receiver asks
again and again while it hears nothing, and need not send files for that; when the item's turn has come, it is told to
send them once more. So nobody fails or looks elsewhere because many wait here, and whoever came first goes first: the
room that those before it need is not given to anybody else, until they end or are forgotten as any other record is.

A receiver without a link may come back, so what it wants stays as it is, for as long as nobody else needs the room.
Who has a link goes before it in every line, and may have its room: a process that was killed or stopped leaves as much
behind as it had asked for, and everybody else would wait until that is forgotten.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod

from aiodisagg.protocol.events import CancelEncode, DropSource, SenderAction, StartEncode
from aiodisagg.protocol.messages import ItemKey, Want

User = tuple[str, ItemKey]
"""(peer, item): one receiver's interest in a source."""


@dataclass(slots=True)
class Source:
    """An item at the sender. ``ready`` rows exist; its job is put aside, queued, started or, with all rows, done."""

    job: StartEncode
    size_bytes: int
    ready: int = 0
    started: bool = False
    cancelled: bool = False
    leaving: bool = False
    """Its users were away, and gave it up for others: it goes when no write of theirs can move any more."""
    users: set[User] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return self.ready >= self.job.rows

    @property
    def file_bytes(self) -> int:
        return _size_of(self.job.media)

    @property
    def patches(self) -> int:
        return prod(self.job.grid_thw)


def _size_of(files: tuple[bytes, ...]) -> int:
    return sum(map(len, files))


class SourceTable:
    """Pure accounting of sources. ``capacity_bytes`` bounds the rows of those started, ``capacity_file_bytes`` the
    files of those that are not done; one larger than that goes in alone."""

    def __init__(self, capacity_bytes: int, row_bytes: int, capacity_file_bytes: int) -> None:
        self.capacity_bytes, self._row_bytes = capacity_bytes, row_bytes
        self.capacity_file_bytes = capacity_file_bytes
        self.used_bytes = 0
        self.file_bytes = 0
        self.hits = 0
        self.started = 0
        self._waiting_patches = 0
        self._sources: OrderedDict[str, Source] = OrderedDict()
        self._queue: deque[str] = deque()
        self._aside: OrderedDict[str, int] = OrderedDict()
        """Digests whose files are to be sent again, and how large they are."""
        self._away: set[User] = set()
        """Users whose receiver has no link."""

    def get(self, digest: str) -> Source | None:
        return self._sources.get(digest)

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def waiting_patches(self) -> int:
        """Patches of the items whose rows do not all exist yet."""
        return self._waiting_patches

    def newest(self) -> Iterator[str]:
        """Digests whose rows exist or are in the making, the last used first."""
        return (digest for digest, source in reversed(self._sources.items()) if not source.cancelled)

    def acquire(self, want: Want, user: User) -> Source | None:
        """The source for a want, made from its media if there is none; None if the media are needed first."""
        source = self._sources.get(want.digest)
        if source is None:
            if want.media is None:
                return None
            job = StartEncode(want.digest, want.kind, want.grid_thw, want.rows, want.fps, (), want.urgency)
            source = self._sources[want.digest] = Source(job, want.rows * self._row_bytes)
            self._waiting_patches += source.patches
            self._aside[want.digest] = _size_of(want.media)
        elif user not in source.users:
            self.hits += 1
        if source.cancelled or (not source.started and want.urgency.before(source.job.urgency)):
            source.job = replace(source.job, urgency=want.urgency)
        source.users.add(user)
        self._away.discard(user)
        source.leaving = False
        self._sources.move_to_end(want.digest)
        return self._take_files(source, want) if want.digest in self._aside else source

    def _take_files(self, source: Source, want: Want) -> Source | None:
        """Queues a source that was put aside if its turn has come; None: its files are needed for that."""
        if want.media is not None:
            self._aside[want.digest] = _size_of(want.media)
        if not self._has_turn(want.digest):
            return source
        if want.media is None:
            return None
        size_bytes = self._aside.pop(want.digest)
        self._put_aside(size_bytes)
        self.file_bytes += size_bytes
        source.job = replace(source.job, media=want.media)
        self._queue.append(want.digest)
        return source

    def _has_turn(self, digest: str) -> bool:
        """Whether there is room for its files and for those of all that were put aside before it. Who is away is not
        counted: what it has in the queue is put aside, and what is aside already comes later."""
        taken = self.file_bytes
        if self._away:
            taken -= sum(self._sources[queued].file_bytes for queued in self._queue if self._deserted(queued))
        for other, size_bytes in self._aside.items():
            if self._deserted(other):
                continue
            if taken and taken + size_bytes > self.capacity_file_bytes:
                return False
            if other == digest:
                return True
            taken += size_bytes
        raise KeyError(digest)

    def _put_aside(self, room: int) -> None:
        """Puts queued sources aside whose users are all away, the last one first, until there is room for files."""
        for digest in [queued for queued in reversed(self._queue) if self._deserted(queued)]:
            if not self.file_bytes or self.file_bytes + room <= self.capacity_file_bytes:
                return
            source = self._sources[digest]
            self._queue.remove(digest)
            self._aside[digest] = source.file_bytes
            self._aside.move_to_end(digest, last=False)
            self._drop_files(source)

    def _drop_files(self, source: Source) -> None:
        self.file_bytes -= source.file_bytes
        source.job = replace(source.job, media=())

    def ready(self, source: Source, stop: int) -> None:
        """The rows up to ``stop`` exist. When all do, the job is never started again, and its files go."""
        source.ready, source.cancelled = stop, False
        if source.complete:
            self._waiting_patches -= source.patches
            self._drop_files(source)

    def release(self, digest: str, user: User) -> list[SenderAction]:
        """Ends a user's interest. A job that nobody wants is cancelled; complete rows stay as a cache."""
        self._away.discard(user)
        source = self._sources.get(digest)
        if source is None:
            return []
        source.users.discard(user)
        if source.users or source.complete:
            return []
        if source.started:
            if source.cancelled:
                return []
            source.cancelled, source.ready = True, 0  # its rows go when the job stops: nobody may begin to use them
            return [CancelEncode(digest)]
        if self._aside.pop(digest, None) is None:
            self._queue.remove(digest)
        self._remove(source)
        return []

    def linked(self, user: User, up: bool) -> None:
        """The link to this user's receiver is open, or it was lost."""
        if up:
            self._away.discard(user)
        else:
            self._away.add(user)

    def _deserted(self, digest: str) -> bool:
        """All who want it are away."""
        users = self._sources[digest].users
        return bool(users) and users <= self._away

    def _first(self) -> str:
        """Whose turn it is: who came first of those that are not away, or of all."""
        here = (digest for digest in self._queue if not self._deserted(digest)) if self._away else self._queue
        return next(iter(here), self._queue[0])

    def _fits(self, source: Source, used_bytes: int) -> bool:
        return not used_bytes or used_bytes + source.size_bytes <= self.capacity_bytes

    def admit(self) -> list[SenderAction]:
        """Starts queued jobs for which there is room, evicting cached sources that nobody uses."""
        actions: list[SenderAction] = []
        while self._queue:
            digest = self._first()
            source = self._sources[digest]
            actions += self._evict(source.size_bytes)
            if not self._fits(source, self.used_bytes):
                break
            self._queue.remove(digest)
            self.used_bytes += source.size_bytes
            source.started = True
            self.started += 1
            actions.append(source.job)
        return actions

    def _evict(self, room: int) -> list[SenderAction]:
        dropped: list[SenderAction] = []
        while self.used_bytes + room > self.capacity_bytes:
            # Only what is in use lies before the first one found, so this looks at few, however many are cached.
            idle = (d for d, s in self._sources.items() if s.started and s.complete and not s.users)
            digest = next(idle, None)
            if digest is None:
                break
            self.used_bytes -= self._sources.pop(digest).size_bytes
            dropped.append(DropSource(digest))
        return dropped

    def in_the_way(self) -> list[User] | None:
        """Who is to give a source up, which is ``leaving`` from now on, so that the first in the queue finds room: they
        are all away, and it is not. None: nobody. Of such sources the one that was asked for longest ago goes first. To
        be asked after ``admit``, again and again; room that is about to be free is counted.
        """
        if not self._away or not self._queue or self._deserted(first := self._first()):
            return None
        started = {digest: source for digest, source in self._sources.items() if source.started}
        going = {digest for digest, source in started.items() if source.cancelled or source.leaving}
        coming = sum(started[digest].size_bytes for digest in going)
        if self._fits(self._sources[first], self.used_bytes - coming):
            return None
        for digest, source in started.items():
            if digest not in going and self._deserted(digest):
                source.leaving = True
                return sorted(source.users)
        return None

    def stopped(self, digest: str) -> tuple[set[User], list[SenderAction]]:
        """A job ended without rows: its users are told, unless it was cancelled and is wanted again by now."""
        source = self._sources[digest]
        self.used_bytes -= source.size_bytes
        if source.cancelled and source.users:
            source.ready, source.started, source.cancelled = 0, False, False
            self._queue.append(digest)
            return set(), [DropSource(digest)]
        self._remove(source)
        return source.users, [DropSource(digest)]

    def _remove(self, source: Source) -> None:
        """One that never was complete."""
        self._drop_files(source)
        self._waiting_patches -= source.patches
        del self._sources[source.job.digest]
