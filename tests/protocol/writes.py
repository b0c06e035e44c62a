"""Bytes on their way into a receiver's pool: they land in parts, late or not at all, until they are fenced."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiodisagg.protocol import events as ev
from aiodisagg.protocol.messages import Chunk, ItemKey

from . import checks, truth
from .checks import Violation
from .network import Process

if TYPE_CHECKING:
    from .world import World


def checksum(data: bytes) -> int:
    return zlib.crc32(data)


@dataclass(eq=False, slots=True)
class Landing:
    """One write under way: ``parts`` of it are still to land."""

    sender: Process
    write: ev.Write
    data: bytes
    answer_at: float
    fails: bool
    parts: list[tuple[int, int]] = field(default_factory=list)
    answered: bool = False
    over: bool = False
    """Fenced, or its writer is dead for long: nothing of it lands any more."""


class Writes:
    """All writes of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.under_way: list[Landing] = []
        self.failed: Counter[ItemKey] = Counter()
        self.copying: Counter[int] = Counter()
        """Leases under which the receiving side is in the middle of a copy, which no fence of the writer's ends."""

    def begin(self, process: Process, write: ev.Write) -> None:
        if process.store.get(write.digest, 0) < write.stop:
            raise Violation(f"{process.name} writes rows that do not exist: {write}")
        if self.moving(process, write.peer, write.key):
            raise Violation(f"{process.name} writes while an older write may move: {write}")
        a, b = write.start * truth.ROW_BYTES, write.stop * truth.ROW_BYTES
        slow = self.world.random.random() < self.world.plan.slow
        answer_at = self.world.now + (
            self.world.random.uniform(1.0, 12.0) if slow else self.world.random.uniform(0.0002, 0.02)
        )
        fails = process.fail_next > 0
        process.fail_next -= fails
        landing = Landing(process, write, truth.packed(write.digest)[a:b], answer_at, fails)
        rows = write.stop - write.start
        middle = self.world.random.randrange(rows + 1)
        landing.parts = [part for part in ((0, middle), (middle, rows)) if part[0] < part[1]]
        self.under_way.append(landing)
        self.world.writes.update((write.key, row) for row in range(write.start, write.stop))
        for part in list(landing.parts):
            late = self.world.random.uniform(0.0, 3.0) if fails and self.world.random.randrange(2) else 0.0
            self.world.at(
                self.world.random.uniform(self.world.now, answer_at) + late, lambda part=part: self._land(landing, part)
            )
        self.world.at(answer_at, lambda: self._answer(landing, answer_at))

    def moving(self, process: Process, peer: str, key: ItemKey) -> list[Landing]:
        """Writes of this item that may still move."""
        return [
            landing
            for landing in self.under_way
            if landing.sender is process and landing.write.peer == peer and landing.write.key == key
        ]

    def _land(self, landing: Landing, part: tuple[int, int]) -> None:
        if landing.over or part not in landing.parts:
            return
        landing.parts.remove(part)
        home = self.world.network.processes[landing.write.peer]
        if not home.alive:
            return
        a, b = (n * truth.ROW_BYTES for n in part)
        offset = landing.write.offset + a
        if not self.world.plan.one_sided and not home.machine.pool.admits(offset, b - a, landing.write.lease):
            landing.fails = True
            return
        if not self.world.plan.one_sided and landing.fails:
            self.copying[landing.write.lease] += 1
            self.world.soon(0.3, lambda: self._copied(landing, part, home))
        else:
            self._place(landing, part, home)

    def _copied(self, landing: Landing, part: tuple[int, int], home: Process) -> None:
        self.copying[landing.write.lease] -= 1
        if home.alive:
            self._place(landing, part, home)

    def _place(self, landing: Landing, part: tuple[int, int], home: Process) -> None:
        a, b = (n * truth.ROW_BYTES for n in part)
        offset = landing.write.offset + a
        checks.landed(self.world, home, landing.write, part, offset)
        data = bytearray(landing.data[a:b])
        if self.world.corrupt_next:
            self.world.corrupt_next -= 1
            self.world.corrupted += 1
            data[self.world.random.randrange(len(data))] ^= 0x10
        home.memory[offset : offset + len(data)] = data

    def _answer(self, landing: Landing, when: float) -> None:
        if landing.answered or landing.answer_at != when or not landing.sender.alive:
            return
        if landing.sender.frozen:  # the process learns it when it runs again
            landing.answer_at = landing.sender.thaws_at + 1e-6
            self.world.at(landing.answer_at, lambda: self._answer(landing, landing.answer_at))
            return
        landing.answered = True
        write = landing.write
        if landing.fails:
            self.failed[write.key] += 1
            self.world.feed(landing.sender, ev.WriteFailed(write.peer, write.key, write.epoch, "planned"))
            return
        while landing.parts:
            self._land(landing, landing.parts[0])
        if landing.fails:
            self.failed[write.key] += 1
            self.world.feed(landing.sender, ev.WriteFailed(write.peer, write.key, write.epoch, "refused"))
            return
        self.under_way.remove(landing)
        chunk = Chunk(write.lease, write.start, write.stop, checksum(landing.data))
        self.world.feed(landing.sender, ev.ChunkWritten(write.peer, write.key, write.epoch, chunk))

    def fence(self, process: Process, fence: ev.Fence) -> None:
        open_ = self.moving(process, fence.peer, fence.key)
        when = self.world.now + self.world.random.uniform(0.0, 0.05)
        for landing in open_:
            if not landing.answered and landing.answer_at > when:
                landing.fails = landing.fails or bool(self.world.random.randrange(2))
                landing.answer_at = when
                self.world.at(when, lambda landing=landing: self._answer(landing, when))

        def fenced() -> None:
            if not process.alive:
                return
            if process.frozen or any(not landing.answered for landing in open_):
                self.world.at(self.world.now + 0.05, fenced)
                return
            for landing in open_:
                landing.over = True
                if landing in self.under_way:
                    self.under_way.remove(landing)
            self.world.feed(process, ev.WritesFenced(fence.peer, fence.key))

        self.world.at(when + self.world.random.choice((0.0, 0.01, 0.5)) + 1e-6, fenced)

    def forget(self, landing: Landing) -> None:
        landing.over = True
        if landing in self.under_way:
            self.under_way.remove(landing)

    def died(self, process: Process, linger_s: float) -> None:
        """What a dead process had begun lands for a while yet, or not."""
        for landing in [landing for landing in self.under_way if landing.sender is process]:
            when = self.world.now + self.world.random.uniform(0.0, linger_s)
            self.world.at(when, lambda landing=landing: self.forget(landing))

    def dropped(self, process: Process, digest: str) -> None:
        """The memory that is being read belongs to somebody else now."""
        for landing in self.under_way:
            if landing.sender is process and landing.write.digest == digest and not landing.answered:
                landing.data = b"\xee" * len(landing.data)
