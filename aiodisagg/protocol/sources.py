"""What a sender can send: encoded items by content digest, bounded in bytes.

One source serves every room that wants its digest (single flight). It is kept while anybody may still ask for rows
of it, and after that as a cache, least recently used first to go, so that a repeated image or a restarted receiver
starts at once. Room for a source is promised before its encoding begins.

Its files are kept until all of its rows exist, and bounded as well. What there is no room for is *put aside*: its
files are dropped, and its receivers are told that it will be provided, as of everything that waits. A receiver asks
again and again while it hears nothing, and need not send files for that; when the item's turn has come, it is told to
send them once more. So nobody fails or looks elsewhere because many wait here, and whoever came first goes first: the
room that those before it need is not given to anybody else, until they end or are forgotten as any other record is.

Of the rows a receiver has its share: its equal part of the room, and more while a quarter stays for the others that
are linked. Whoever has it is passed over, and keeps its place.

A receiver without a link may come back, so what it wants stays as it is, for as long as nobody else needs the room.
Who has a link goes before it in every line, and may have its room: a process that was killed or stopped leaves as much
behind as it had asked for, and everybody else would wait until that is forgotten. Such a receiver is *away*, and so is
one that has a link and does not take rows that are there.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod

from aiodisagg.protocol.events import CancelEncode, ChangeEncode, DropSource, SenderAction, StartEncode
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

    @property
    def idle(self) -> bool:
        """A cache's: nobody wants it."""
        return self.started and self.complete and not self.users

    @property
    def receivers(self) -> set[str]:
        return {peer for peer, _ in self.users}


def _size_of(files: tuple[bytes, ...]) -> int:
    return sum(map(len, files))


class SourceTable:
    """Pure accounting of sources. ``capacity_bytes`` bounds the rows of those started, and of each of them;
    ``capacity_file_bytes`` the files of those that are not done, of which one larger than that goes in alone."""

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
        self.linked: set[str] = set()
        """Receivers that have a link."""
        self._held: Counter[str] = Counter()
        """Bytes of started sources by receiver; what several want counts for each."""
        self._idle_bytes = 0
        """Of those that are cached and wanted by nobody."""

    def get(self, digest: str) -> Source | None:
        return self._sources.get(digest)

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def waiting_patches(self) -> int:
        """Patches of the items whose rows do not all exist yet."""
        return self._waiting_patches

    def newest(self) -> Iterator[str]:
        """Digests whose rows all exist, the last used first. What waits here may take longer than elsewhere."""
        return (digest for digest, source in reversed(self._sources.items()) if source.complete)

    def acquire(self, want: Want, user: User) -> Source | None:
        """The source for a want, made from its media if there is none; None if the media are needed first."""
        source = self._sources.get(want.digest)
        if source is None:
            if want.media is None:
                return None
            job = StartEncode(want.digest, want.kind, want.grid_thw, want.rows, want.fps, (), want.urgency, want.alone)
            source = self._sources[want.digest] = Source(job, want.rows * self._row_bytes)
            self._waiting_patches += source.patches
            self._aside[want.digest] = _size_of(want.media)
        elif user not in source.users:
            self.hits += 1
        self._count(source, -1)
        source.users.add(user)
        self._count(source, +1)
        self.linked.add(user[0])
        self._away.discard(user)
        source.leaving = False
        self._sources.move_to_end(want.digest)
        return self._take_files(source, want) if want.digest in self._aside else source

    def heed(self, want: Want) -> list[SenderAction]:
        """What a want for a source that is here says of its job: the best place counts, and that it is to be alone."""
        source = self._sources.get(want.digest)
        if source is None or source.complete:
            return []
        before, again = source.job, source.cancelled
        urgency = want.urgency if again or want.urgency.before(before.urgency) else before.urgency
        source.job = replace(before, urgency=urgency, alone=before.alone or want.alone)
        if source.job == before or again or not source.started:
            return []
        return [ChangeEncode(want.digest, urgency, source.job.alone)]

    def _count(self, source: Source, sign: int) -> None:
        """To be taken away before a source changes, and added after."""
        if not source.started:
            return
        for peer in source.receivers:
            self._held[peer] += sign * source.size_bytes
            if not self._held[peer]:
                del self._held[peer]
        if source.idle:
            self._idle_bytes += sign * source.size_bytes

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
        self._count(source, -1)
        source.ready, source.cancelled = stop, False
        self._count(source, +1)
        if source.complete:
            self._waiting_patches -= source.patches
            self._drop_files(source)

    def release(self, digest: str, user: User) -> list[SenderAction]:
        """Ends a user's interest. A job that nobody wants is cancelled; complete rows stay as a cache."""
        self._away.discard(user)
        source = self._sources.get(digest)
        if source is None:
            return []
        self._count(source, -1)
        source.users.discard(user)
        self._count(source, +1)
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

    def here(self, user: User, here: bool) -> None:
        """This user's receiver has a link and takes rows, or not."""
        if here:
            self._away.discard(user)
        else:
            self._away.add(user)

    def _deserted(self, digest: str) -> bool:
        """All who want it are away."""
        users = self._sources[digest].users
        return bool(users) and users <= self._away

    def _first(self) -> str | None:
        """Whose turn it is: who came first of those that are not away and may have more, or if all are away, of all."""
        full: set[str] = set()
        for digest in self._queue:
            if self._deserted(digest) or (receivers := self._sources[digest].receivers) <= full:
                continue
            if self._has_share(self._sources[digest]):
                return digest
            full |= receivers
        return self._queue[0] if self._queue and not full else None

    def _has_share(self, source: Source) -> bool:
        """Whether one who wants it may have so much more. Who has nothing may have one, whatever its size."""
        if self._in_use + source.size_bytes <= self.capacity_bytes * 3 // 4:
            return True
        most = self.capacity_bytes // max(1, len(self.linked))
        held = min(self._held[peer] for peer in source.receivers)
        return not held or held + source.size_bytes <= most

    @property
    def _in_use(self) -> int:
        return self.used_bytes - self._idle_bytes

    def admit(self) -> list[SenderAction]:
        """Starts queued jobs for which there is room, evicting cached sources that nobody uses."""
        actions: list[SenderAction] = []
        while (digest := self._first()) is not None:
            source = self._sources[digest]
            if self._in_use + source.size_bytes > self.capacity_bytes:
                break
            actions += self._evict(source.size_bytes)
            self._queue.remove(digest)
            self.used_bytes += source.size_bytes
            source.started = True
            self._count(source, +1)
            self.started += 1
            actions.append(source.job)
        return actions

    def _evict(self, room: int) -> list[SenderAction]:
        dropped: list[SenderAction] = []
        while self.used_bytes + room > self.capacity_bytes:
            # Only what is in use lies before the first one found, so this looks at few, however many are cached.
            idle = (d for d, s in self._sources.items() if s.idle)
            digest = next(idle, None)
            if digest is None:
                break
            size_bytes = self._sources.pop(digest).size_bytes
            self.used_bytes -= size_bytes
            self._idle_bytes -= size_bytes
            dropped.append(DropSource(digest))
        return dropped

    def in_the_way(self) -> list[User] | None:
        """Who is to give a source up, which is ``leaving`` from now on, so that the first in the queue finds room: they
        are all away, and it is not. None: nobody. Of such sources the one that was asked for longest ago goes first. To
        be asked after ``admit``, again and again; room that is about to be free is counted.
        """
        first = self._first() if self._away else None
        if first is None or self._deserted(first):
            return None
        started = {d: source for d, source in self._sources.items() if source.started and not source.idle}
        going = {digest for digest, source in started.items() if source.cancelled or source.leaving}
        coming = sum(started[digest].size_bytes for digest in going)
        if self._in_use - coming + self._sources[first].size_bytes <= self.capacity_bytes:
            return None
        for digest, source in started.items():
            if digest not in going and self._deserted(digest):
                source.leaving = True
                return sorted(source.users)
        return None

    def stopped(self, digest: str) -> tuple[set[User], list[SenderAction]]:
        """A job ended without rows: its users are told, unless it was cancelled and is wanted again by now."""
        source = self._sources[digest]
        self._count(source, -1)
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
