"""The sending side of a process: all its outgoing items and the sources they draw from."""

from __future__ import annotations

from dataclasses import replace

from aiodisagg.errors import InvalidTransition, RemoteProtocolError
from aiodisagg.protocol.counters import ByteCounters
from aiodisagg.protocol.events import (
    ChunkWritten,
    DrainBegan,
    Drained,
    EncodeStopped,
    LinkLost,
    LinkUp,
    MessageReceived,
    RowsReady,
    Send,
    SenderAction,
    SenderEvent,
    StageEntered,
    TimerFired,
    WriteFailed,
    WritesFenced,
)
from aiodisagg.protocol.messages import Cancel, Fenced, Grant, Refuse, Release, Want
from aiodisagg.protocol.outgoing import OutgoingItem, RoomWanted, SenderConfig
from aiodisagg.protocol.rows import ModelFingerprint, RowLayout
from aiodisagg.protocol.sources import SourceTable, User
from aiodisagg.protocol.timers import Timers

__all__ = ["Sender", "SenderConfig"]


class Sender:
    """Pure: ``handle(event, now) -> actions``. A bad peer can raise only RemoteProtocolError, changing nothing.

    Args:
        model: the only model whose rows this process makes; a want for another is refused.
    """

    def __init__(self, model: ModelFingerprint, config: SenderConfig | None = None) -> None:
        self.model, self.config = model, config or SenderConfig()
        layout = RowLayout.of(model)
        self._row_bytes = layout.row_bytes
        self.counters = ByteCounters(layout)
        self.sources = SourceTable(self.config.capacity_bytes, layout.row_bytes, self.config.file_bytes)
        self.items: dict[User, OutgoingItem] = {}
        self._draining = False
        self._drained = False
        self._timers: Timers[User] = Timers()

    def next_timer(self) -> float | None:
        """When to feed TimerFired; None: no item is open. Read it again after every ``handle``."""
        return self._timers.next()

    def handle(self, event: SenderEvent, now: float) -> list[SenderAction]:
        actions: list[SenderAction] = []
        match event:
            case MessageReceived():
                actions = self._message(event, now)
            case ChunkWritten(peer, key) | WriteFailed(peer, key) | WritesFenced(peer, key):
                item = self.items.get((peer, key))
                if item is None:
                    raise InvalidTransition("no such item", type(event).__name__)
                actions = self._step(item, event, now)
            case RowsReady(digest, stop):
                source = self.sources.get(digest)
                if source is None or not source.ready < stop <= source.job.rows:
                    raise InvalidTransition(f"source {source!r}", repr(event))
                if not source.cancelled or stop == source.job.rows:
                    self.sources.ready(source, stop)
                    for user in source.users:
                        self.items[user].moved = now
                    actions = self._users(digest, event, now)
            case StageEntered(digest):
                if self.sources.get(digest) is None:
                    raise InvalidTransition("no such source", repr(event))
                actions = self._users(digest, event, now)
            case EncodeStopped(digest):
                users, actions = self.sources.stopped(digest)
                for user in sorted(users):
                    actions += self._step(self.items[user], event, now)
            case LinkLost(peer) | LinkUp(peer):
                (self.sources.linked.add if isinstance(event, LinkUp) else self.sources.linked.discard)(peer)
                for item in [item for item in self.items.values() if item.peer == peer]:
                    actions += self._step(item, event, now)
            case DrainBegan():
                self._draining = True
            case TimerFired():
                while (due := self._timers.take(now)) is not None:
                    actions += self._step(self.items[due], event, now)
        actions += self._admit(now)
        if self._draining and not self._drained and not any(item.linked for item in self.items.values()):
            self._drained = True
            actions.append(Drained())
        return actions

    def _admit(self, now: float) -> list[SenderAction]:
        """Starts what there is room for. Who is away keeps its sources only until somebody who is here needs it."""
        actions = self.sources.admit()
        while (users := self.sources.in_the_way()) is not None:
            for user in users:
                actions += self._step(self.items[user], RoomWanted(), now)
            actions += self.sources.admit()
        return actions

    def _users(self, digest: str, event: RowsReady | StageEntered, now: float) -> list[SenderAction]:
        source = self.sources.get(digest)
        event = replace(event, waiting_patches=self.sources.waiting_patches)
        actions: list[SenderAction] = []
        for user in sorted(source.users) if source is not None else ():
            actions += self._step(self.items[user], event, now)
        return actions

    def _step(self, item: OutgoingItem, event: object, now: float) -> list[SenderAction]:
        user = (item.peer, item.key)
        actions = item.handle(event, now)
        if item.ended:
            self.items.pop(user, None)
            self._timers.disarm(user)
            return actions + self.sources.release(item.digest, user)
        self.sources.here(item.digest, user, item.here(now))
        if item.state.final:
            self._timers.disarm(user)
        else:
            self._timers.arm(user, item.due(now))
        return actions

    def _message(self, event: MessageReceived, now: float) -> list[SenderAction]:
        peer, message = event.peer, event.message
        if not isinstance(message, Want | Grant | Release | Cancel):
            raise RemoteProtocolError(peer, f"{type(message).__name__} is not a receiver's word")
        item = self.items.get((peer, message.key))
        if isinstance(message, Want):
            return self._want(item, peer, message, now)
        if item is None:
            why = "its rows are gone" if isinstance(message, Grant) else ""
            fenced = Send(peer, Fenced(message.key, message.epoch, why))
            return [] if isinstance(message, Release) else [fenced]
        try:
            return self._step(item, message, now)
        except InvalidTransition as error:
            raise RemoteProtocolError(peer, f"item {message.key}: {error}") from error

    def _want(self, item: OutgoingItem | None, peer: str, want: Want, now: float) -> list[SenderAction]:
        if want.model != self.model:
            said = f"this peer runs {self.model}, not {want.model}"
            return [Send(peer, Refuse(want.key, want.epoch, "model_mismatch", said, True))]
        t, h, w = want.grid_thw
        if want.epoch < 1:
            raise RemoteProtocolError(peer, f"item {want.key}: epochs begin at 1")
        sane = 0 < want.rows <= t * h * w and max(want.rows, t, h, w) < 2**31
        if not sane or any(not 0 <= a < b <= want.rows for a, b in want.held):
            raise RemoteProtocolError(peer, f"item {want.key}: {want.rows} rows do not fit the grid {want.grid_thw}")
        if item is not None and (item.digest, item.rows) != (want.digest, want.rows):
            raise RemoteProtocolError(peer, f"item {want.key} was {item.digest}, now {want.digest}")
        if (size_bytes := want.rows * self._row_bytes) > (most := self.config.capacity_bytes):
            said = f"its {want.rows} rows take {size_bytes} bytes, and the peer keeps {most} at most (source_bytes)"
            return [Send(peer, Refuse(want.key, want.epoch, "too_large", said, True))]
        known = self.sources.get(want.digest)
        shape = (want.kind, want.grid_thw, want.rows)
        if known is not None and (known.job.kind, known.job.grid_thw, known.job.rows) != shape:
            said = f"item {want.key}: {want.digest} is not {shape}"
            if any(other == peer for other, _ in known.users):
                raise RemoteProtocolError(peer, said)
            return self._refuse(item, peer, want, said, now)
        if item is None and self._draining:
            return [Send(peer, Refuse(want.key, want.epoch, "draining", "this peer is about to end", True))]
        if item is None:
            item = OutgoingItem(peer, want, self.model, self._row_bytes, self.counters, self.config, now)
            self.items[peer, want.key] = item
        actions: list[SenderAction] = []
        if want.epoch > item.epoch:
            actions = self.sources.heed(want)
            item.source = self.sources.acquire(want, (peer, want.key))
        return actions + self._step(item, want, now)

    def _refuse(self, item: OutgoingItem | None, peer: str, want: Want, why: str, now: float) -> list[SenderAction]:
        """Another peer said something else of this digest. Nobody knows who of them lies, and who is honest must not
        lose its link, and all of its items, by it."""
        if item is None:
            return [Send(peer, Refuse(want.key, want.epoch, "wrong_shape", why, True))]
        if want.epoch <= item.epoch:
            return []
        item.epoch = want.epoch
        return self._step(item, EncodeStopped(want.digest, "wrong_shape", why, True), now)  # a write of it may move

    def __repr__(self) -> str:
        return f"<Sender {len(self.items)} items, {len(self.sources)} sources, {self.sources.used_bytes} bytes>"
