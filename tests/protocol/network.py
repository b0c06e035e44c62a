"""Links in virtual time: in order within a connection, lost with it, and each side learns of a cut when it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiodisagg.protocol import events as ev
from aiodisagg.protocol.messages import Cancel, Commit, Fenced, Grant, Message, Offer, Want

if TYPE_CHECKING:
    from .world import World


@dataclass(eq=False, slots=True)
class Process:
    """One life of one process and what its shell holds."""

    name: str
    machine: Any
    life: int
    alive: bool = True
    frozen: bool = False
    thaws_at: float = 0.0
    died_at: float = 0.0
    timer: float | None = None
    backlog: list[object] = field(default_factory=list)
    memory: bytearray = field(default_factory=bytearray)
    store: dict[str, int] = field(default_factory=dict)
    jobs: dict[str, object] = field(default_factory=dict)
    fail_next: int = 0
    taken_rows: int = 0


@dataclass(eq=False, slots=True)
class Link:
    ends: tuple[Process, Process]
    connection: int = 0
    open: bool = False
    view: dict[str, int] = field(default_factory=dict)
    """Which connection each side believes to be open."""
    last: dict[str, float] = field(default_factory=dict)
    """When the newest message to each side arrives: they do not overtake each other."""
    drain: dict[str, float] = field(default_factory=dict)
    """After a cut: until when what was under way still arrives."""
    odd: list[tuple[str, type]] = field(default_factory=list)


class Network:
    """All links of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.processes: dict[str, Process] = {}
        self.links: dict[frozenset[str], Link] = {}

    def is_up(self, process: Process, other: str) -> bool:
        link = self.links.get(frozenset((process.name, other)))
        return link is not None and link.view.get(process.name, 0) != 0

    def connect(self, receiver: Process, sender: Process) -> None:
        """Opens a (new) connection between two live processes."""
        self.processes[receiver.name], self.processes[sender.name] = receiver, sender
        if not (receiver.alive and sender.alive):
            return
        link = self.links.setdefault(frozenset((receiver.name, sender.name)), Link((receiver, sender)))
        if link.open:
            return
        link.open, link.connection = True, link.connection + 1
        connection = link.connection
        for end, other in ((receiver, sender), (sender, receiver)):
            when = max(self.world.now, link.last.get(end.name, 0.0)) + self.world.random.uniform(0.001, 0.03)
            link.last[end.name] = when
            link.drain.pop(end.name, None)
            self.world.at(when, lambda end=end, other=other: self._up(link, connection, end, other))

    def _up(self, link: Link, connection: int, end: Process, other: Process) -> None:
        self._on(end, lambda: self._up_now(link, connection, end, other))

    def _up_now(self, link: Link, connection: int, end: Process, other: Process) -> None:
        link.view[end.name] = connection
        self.world.feed(end, ev.LinkUp(other.name))
        if end is self.world.receiver:
            self.world.place()

    def _on(self, process: Process, what: Callable[[], None]) -> None:
        """Runs in the process: later if it is stopped, never if it is dead."""
        if not process.alive:
            return
        if process.frozen:
            process.backlog.append(what)
        else:
            what()

    def cut(self, receiver: Process, sender: Process, lasts_s: float, *, gone: Process | None = None) -> None:
        """Ends the connection; both (living) ends learn it soon, and it is opened again after ``lasts_s``."""
        link = self.links.get(frozenset((receiver.name, sender.name)))
        if link is None or not link.open:
            return
        link.open = False
        connection, random = link.connection, self.world.random
        known = gone is not None and random.random() < 0.7
        for end, other in ((receiver, sender), (sender, receiver)):
            lost_at = self.world.now + random.uniform(0.0, 0.05)
            link.drain[end.name] = random.uniform(self.world.now, lost_at)
            link.last[end.name] = lost_at
            self.world.at(lost_at, lambda end=end, other=other: self._lost(link, connection, end, other, known))
        if gone is None:
            self.world.at(self.world.now + 0.06 + lasts_s, lambda: self.connect(receiver, sender))

    def _lost(self, link: Link, connection: int, end: Process, other: Process, gone: bool) -> None:
        def lost() -> None:
            link.view[end.name] = 0
            self.world.feed(end, ev.LinkLost(other.name, gone))

        self._on(end, lost)

    def cut_all(self, lasts_s: float) -> None:
        """Every link is opened anew, and is an honest one from now on."""
        for link in list(self.links.values()):
            link.odd.clear()
            self.cut(*link.ends, lasts_s)

    def cut_process(self, process: Process, lasts_s: float) -> None:
        for link in list(self.links.values()):
            if process in link.ends:
                self.cut(*link.ends, lasts_s)

    def died(self, process: Process) -> None:
        for link in list(self.links.values()):
            if process in link.ends:
                self.cut(*link.ends, 0.0, gone=process)
                link.open = False

    def disturb(self, receiver: Process, sender: Process, how: str) -> None:
        """The next message (of some kind) on this link is lost, repeated or late, although the connection holds."""
        link = self.links.get(frozenset((receiver.name, sender.name)))
        if link is not None:
            link.odd.append(
                (how, self.world.random.choice((object, Want, Grant, Grant, Offer, Commit, Commit, Cancel, Fenced)))
            )

    def _oddity(self, link: Link, message: Message) -> str:
        for odd in link.odd:
            if isinstance(message, odd[1]):
                link.odd.remove(odd)
                return odd[0]
        return ""

    def send(self, source: Process, peer: str, message: Message) -> None:
        link = self.links.get(frozenset((source.name, peer)))
        if link is None or not link.open or link.view.get(source.name, 0) != link.connection:
            return
        world, target = self.world, self.processes[peer]
        world.messages += 1
        if world.cut_at == world.messages:
            self.cut(*link.ends, world.pause_s)
            return
        how = self._oddity(link, message)
        if how == "drop":
            return
        if how:
            world.soon(world.random.choice((0.02, 3.0)), lambda: self._again(link, source, target, message))
            if how == "late":
                return
        connection = link.connection
        when = max(world.now + world.random.uniform(0.0001, 0.01), link.last.get(peer, 0.0) + 1e-9)
        link.last[peer] = when

        def arrive() -> None:
            if link.connection == connection and world.now > link.drain.get(peer, world.now):
                return
            self._on(target, arrived)

        def arrived() -> None:
            if link.view.get(peer, 0) == connection:
                world.feed(target, ev.MessageReceived(source.name, message))

        world.at(when, arrive)

    def _again(self, link: Link, source: Process, target: Process, message: Message) -> None:
        """A message out of turn, on whatever connection is open now; without one there is nothing it could come by."""

        def arrived() -> None:
            if link.view.get(target.name, 0):
                self.world.feed(target, ev.MessageReceived(source.name, message))

        self._on(target, arrived)
