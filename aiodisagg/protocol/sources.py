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
are linked. Whoever has it is passed over, and keeps its place. Its files in the queue, which may be there for long,
make way for the next ones of a receiver that has less than its share.

A receiver without a link may come back, so what it wants stays as it is, for as long as nobody else needs the room.
Who has a link goes before it in every line, and may have its room: a process that was killed or stopped leaves as much
behind as it had asked for, and everybody else would wait until that is forgotten. Such a receiver is *away*, and so is
one that has a link and does not take rows that are there. What only they want takes nothing from others' shares.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
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
    away: set[User] = field(default_factory=set)
    """Those of its users that have no link, or take no rows."""
    place: int = 0
    """In the queue, lower ones first; 0: it is not there."""

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
    def deserted(self) -> bool:
        """All who want it are away."""
        return bool(self.users) and self.users == self.away

    @property
    def yielding(self) -> bool:
        """Its room is about to be free, or will be when somebody needs it."""
        return self.cancelled or self.leaving or self.deserted

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
        self._queues: dict[str, OrderedDict[str, None]] = {}
        """Digests of jobs to start by receiver, as they came; what several want is in the queue of each."""
        self._places = 0
        self._aside: OrderedDict[str, int] = OrderedDict()
        """Digests whose files are to be sent again, and how large they are."""
        self.linked: set[str] = set()
        """Receivers that have a link."""
        self._held: Counter[str] = Counter()
        """Bytes of started sources by receiver; what several want counts for each."""
        self._idle_bytes = 0
        """Of those that are cached and wanted by nobody."""
        self._yielding_bytes = 0
        """Of started ones that are ``yielding``."""

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
        source.away.discard(user)
        source.leaving = False
        self._count(source, +1)
        self.linked.add(user[0])
        if source.place:
            self._queues.setdefault(user[0], OrderedDict())[want.digest] = None
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
        elif source.yielding:
            self._yielding_bytes += sign * source.size_bytes

    def _enqueue(self, source: Source) -> None:
        self._places += 1
        source.place = self._places
        for peer in source.receivers:
            self._queues.setdefault(peer, OrderedDict())[source.job.digest] = None

    def _dequeue(self, source: Source) -> None:
        source.place = 0
        for peer in source.receivers:
            self._leave(source, peer)

    def _leave(self, source: Source, peer: str) -> None:
        queue = self._queues.get(peer)
        if queue is not None:
            queue.pop(source.job.digest, None)
            if not queue:
                del self._queues[peer]

    def _take_files(self, source: Source, want: Want) -> Source | None:
        """Queues a source that was put aside if its turn has come; None: its files are needed for that."""
        if want.media is not None:
            self._aside[want.digest] = _size_of(want.media)
        make_way = self._make_way(want.digest)
        if make_way is None:
            return source
        if want.media is None:
            return None
        size_bytes = self._aside.pop(want.digest)
        self._put_aside(make_way, size_bytes)
        self.file_bytes += size_bytes
        source.job = replace(source.job, media=want.media)
        self._enqueue(source)
        return source

    def _make_way(self, digest: str) -> list[str] | None:
        """What is to go from the queue so that there is room for its files and for those of all that were put aside
        before it, or None: it has not its turn. Who is behind it is not counted."""
        full = self._full(self._sources[digest])
        behind, goes, taken = self._behind(full), [], self.file_bytes
        for other, size_bytes in self._aside.items():
            if other != digest and self._is_behind(other, full):
                continue
            while taken and taken + size_bytes > self.capacity_file_bytes:
                queued = next(behind, None)
                if queued is None:
                    return None
                goes.append(queued)
                taken -= self._sources[queued].file_bytes
            if other == digest:
                return goes
            taken += size_bytes
        raise KeyError(digest)

    def _full(self, source: Source) -> set[str]:
        """Receivers whose files make way for those of ``source``: what they have in the queue is more than their share,
        and somebody wants this who has nothing there and may have it."""
        if source.receivers <= self._queues.keys() or not self._has_share(source):
            return set()
        return {peer for peer, queue in self._queues.items() if not self._has_share(self._sources[next(iter(queue))])}

    def _behind(self, full: set[str]) -> Iterator[str]:
        """Queued digests that nobody wants but who is away, and then those of full receivers; the last ones first."""
        seen: set[str] = set()
        for peer in (*(peer for peer in self._queues if peer not in self.linked), *sorted(full)):
            for digest in reversed(self._queues[peer]):
                if digest not in seen and self._is_behind(digest, full):
                    seen.add(digest)
                    yield digest

    def _is_behind(self, digest: str, full: set[str]) -> bool:
        source = self._sources[digest]
        return source.deserted or source.receivers <= full

    def _put_aside(self, digests: list[str], room: int) -> None:
        """Puts queued sources aside, one after the other, until there is room for files."""
        for digest in digests:
            if not self.file_bytes or self.file_bytes + room <= self.capacity_file_bytes:
                return
            source = self._sources[digest]
            self._dequeue(source)
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
        source = self._sources.get(digest)
        if source is None:
            return []
        self._count(source, -1)
        source.users.discard(user)
        source.away.discard(user)
        ends = source.started and not (source.users or source.complete or source.cancelled)
        if ends:
            source.cancelled, source.ready = True, 0  # its rows go when the job stops: nobody may begin to use them
        self._count(source, +1)
        if user[0] not in source.receivers:
            self._leave(source, user[0])
        if not source.started and not source.users:
            self._aside.pop(digest, None)
            self._remove(source)
        return [CancelEncode(digest)] if ends else []

    def here(self, digest: str, user: User, here: bool) -> None:
        """This user's receiver has a link and takes rows, or not."""
        source = self._sources.get(digest)
        if source is None or user not in source.users or here == (user not in source.away):
            return
        self._count(source, -1)
        (source.away.discard if here else source.away.add)(user)
        self._count(source, +1)

    def _first(self) -> str | None:
        """Whose turn it is: who came first of those that are not away and may have more, or if all are away, of all."""
        if not self._queues:
            return None
        firsts = {next(iter(queue)) for queue in self._queues.values()}
        line = sorted((self._sources[digest] for digest in firsts), key=lambda source: source.place)
        here = [source for source in line if not source.deserted]
        may = (source.job.digest for source in here or line if not here or self._has_share(source))
        return next(may, None)

    def _has_share(self, source: Source) -> bool:
        """Whether one who wants it may have so much more. Who has nothing may have one, whatever its size."""
        if self._in_use - self._yielding_bytes + source.size_bytes <= self.capacity_bytes * 3 // 4:
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
            self._dequeue(source)
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
        first = self._first() if self._yielding_bytes else None
        if first is None or self._sources[first].deserted:
            return None
        started = {d: source for d, source in self._sources.items() if source.started and not source.idle}
        going = {digest for digest, source in started.items() if source.cancelled or source.leaving}
        coming = sum(started[digest].size_bytes for digest in going)
        if self._in_use - coming + self._sources[first].size_bytes <= self.capacity_bytes:
            return None
        for digest, source in started.items():
            if digest not in going and source.deserted:
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
            self._enqueue(source)
            return set(), [DropSource(digest)]
        self._remove(source)
        return source.users, [DropSource(digest)]

    def _remove(self, source: Source) -> None:
        """One that never was complete."""
        self._drop_files(source)
        self._waiting_patches -= source.patches
        del self._sources[source.job.digest]
