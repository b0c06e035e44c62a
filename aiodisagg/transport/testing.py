"""For those who write or use a transport: a conformance suite, a receiver to test against, and a transport that fails.

``await check_transport(MyTransport)`` runs every check; a pytest module parametrizes over ``CHECKS`` instead, to see
each by its name. pytest is not needed. The checks know only the interface and ask for what a class declares.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from aiodisagg.errors import WriteFailed
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.base import Admit, Capabilities, Remote, Slice, Transport

MIB = 1 << 20
GUARD = 0xEE
"""What a pool is filled with, so that a byte outside a write shows."""
_DATA = random.Random(7).randbytes(MIB)


class ConformanceError(AssertionError):
    """A transport does not keep the interface's promise; the message says which."""


def expect(condition: bool, promise: str) -> None:
    if not condition:
        raise ConformanceError(promise)


@contextmanager
def raises(*kinds: type[Exception]) -> Iterator[None]:
    """The body must raise one of ``kinds``."""
    try:
        yield
    except kinds:
        return
    except Exception as error:
        raise ConformanceError(f"{error!r} was raised instead of {' or '.join(k.__name__ for k in kinds)}") from error
    raise ConformanceError(f"nothing was raised instead of {' or '.join(k.__name__ for k in kinds)}")


class Lender:
    """A receiver's book of lent ranges; its ``admit`` is what a transport asks. ``admitted``: called on the thread that
    asked, between a yes and its being told."""

    def __init__(self) -> None:
        self.admitted: Callable[[], None] = lambda: None
        self._numbers = itertools.count(1)
        self._lent: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def lend(self, offset: int, size_bytes: int) -> int:
        with self._lock:
            lease = next(self._numbers)
            self._lent[lease] = offset, size_bytes
            return lease

    def withdraw(self, lease: int) -> None:
        with self._lock:
            self._lent.pop(lease, None)

    def admit(self, offset: int, size_bytes: int, lease: int) -> bool:
        with self._lock:
            start, size = self._lent.get(lease, (0, -1))
        admits = start <= offset and offset + size_bytes <= start + size
        if admits:
            self.admitted()
        return admits


_numbers = itertools.count(1)


@dataclass
class Receiver:
    """A transport with a pool full of guard bytes."""

    transport: Transport
    arena: Arena
    incarnation: str
    lender: Lender = field(default_factory=Lender)

    def slice(self, source: bytes | bytearray | memoryview, offset: int) -> Slice:
        """These bytes for that offset, under a new lease for exactly this range."""
        view = memoryview(source)
        return Slice(view, offset, self.lender.lend(offset, view.nbytes))

    def holds(self, data: bytes | bytearray, offset: int) -> bool:
        return bytes(self.arena.view[offset : offset + len(data)]) == data

    def untouched(self, start: int = 0, stop: int | None = None) -> bool:
        view = self.arena.view[start:stop]
        return bool(view == bytes([GUARD]) * view.nbytes)


@dataclass
class Kit:
    """What a check gets: how to make a transport, and how patient to be."""

    make: Callable[[], Transport]
    huge_bytes: int = 64 << 20
    lag_s: float = 1.0
    """Longest wall time between two turns of the loop; generous, other programs run beside the tests."""
    lag_cpu_s: float = 0.002
    """Longest processor time of the loop's thread between two turns, or half of a huge copy's if that is longer."""
    patience_s: float = 300.0
    """Longest time of one check, however slow the machine; a call that never returns is found by it."""

    @property
    def capabilities(self) -> Capabilities:
        return self.make().capabilities

    @asynccontextmanager
    async def receiver(self, size_bytes: int = 1 << 20) -> AsyncIterator[Receiver]:
        arena = Arena(size_bytes)
        arena.view[:] = bytes([GUARD]) * arena.size_bytes
        one = Receiver(self.make(), arena, f"receiver-{next(_numbers)}")
        try:
            await one.transport.open(arena, one.lender.admit, incarnation=one.incarnation)
            yield one
        finally:
            await one.transport.aclose()
            arena.close()

    @asynccontextmanager
    async def writer(self) -> AsyncIterator[tuple[Transport, str]]:
        transport, name = self.make(), f"writer-{next(_numbers)}"
        try:
            await transport.open(None, lambda offset, size, lease: False, incarnation=name)
            yield transport, name
        finally:
            await transport.aclose()

    @asynccontextmanager
    async def pair(self, size_bytes: int = 1 << 20) -> AsyncIterator[tuple[Receiver, Transport, Remote, str]]:
        """A receiver, a writer, the receiver's pool as the writer sees it, and the writer's incarnation."""
        async with self.receiver(size_bytes) as receiver, self.writer() as (writer, name):
            remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
            yield receiver, writer, remote, name


Check = Callable[[Kit], Awaitable[None]]


class Checks(dict[str, Check]):
    """Checks by their names, in the order in which they are run."""

    def add(self, check: Check) -> Check:
        @functools.wraps(check)
        async def bounded(kit: Kit) -> None:
            task = asyncio.ensure_future(check(kit))
            try:
                done, _ = await asyncio.wait({task}, timeout=kit.patience_s)
            except asyncio.CancelledError:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                raise
            if not done:
                task.cancel()  # and is not waited for: what hangs may hang in its end, too
                raise ConformanceError(f"every call ends; this check did not in {kit.patience_s:g} s")
            task.result()

        self[check.__name__] = bounded
        return bounded


def pattern(size_bytes: int, seed: int = 0) -> bytearray:
    """Random bytes, the same each time; others for another seed. They come again after an odd number: pieces of a
    round size, put into each other's places, show."""
    start = seed * 4099 % 65536 | 1
    return bytearray((_DATA[start:] * (size_bytes // (len(_DATA) - start) + 1))[:size_bytes])


@asynccontextmanager
async def loop_watch(kit: Kit, data: bytearray) -> AsyncIterator[None]:
    """Fails if one turn of the loop takes longer than ``kit.lag_s``, or works for half as long as a copy of ``data``.

    Wall time depends on what else the machine does; the processor time of the loop's thread hardly does, and a copy
    on the wrong thread shows there. Python's own collections of garbage are not counted.
    """
    copies = []
    target = bytearray(len(data))
    for _ in range(3):
        before = time.thread_time()
        target[:] = data
        copies.append(time.thread_time() - before)
    limit_cpu_s = max(kit.lag_cpu_s, min(copies) / 2)
    worst_s, worst_cpu_s = 0.0, 0.0

    async def watch() -> None:
        nonlocal worst_s, worst_cpu_s
        while True:
            wall, cpu = time.perf_counter(), time.thread_time()
            await asyncio.sleep(0)
            worst_s = max(worst_s, time.perf_counter() - wall)
            worst_cpu_s = max(worst_cpu_s, time.thread_time() - cpu)

    gc.collect()
    gc.disable()
    task = asyncio.ensure_future(watch())
    await asyncio.sleep(0)  # it watches from before the body's first turn
    try:
        yield
    finally:
        gc.enable()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    expect(worst_cpu_s <= limit_cpu_s, f"the loop's thread worked for {worst_cpu_s * 1e3:.1f} ms in one turn")
    expect(worst_s <= kit.lag_s, f"the loop was blocked for {worst_s * 1e3:.1f} ms")


async def check_transport(make: Callable[[], Transport], *, only: Sequence[str] = ()) -> None:
    """Runs the suite (or the checks named in ``only``) on transports made by ``make``.

    Raises:
        ConformanceError: a promise of the interface is broken; ``__notes__`` names the check.
    """
    from aiodisagg.transport.conformance import CHECKS

    for name, check in CHECKS.items():
        if not only or name in only:
            try:
                await check(Kit(make))
            except ConformanceError as error:
                error.add_note(f"in check {name}")
                raise


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one write.

    ``fail_before``: WriteFailed, and nothing is written. ``fail_after``: all is written, then WriteFailed.
    ``late``: WriteFailed at once, but the bytes still land when ``until`` is set: the case that leases exist for.
    ``delay``: waits for ``until``, then writes.
    """

    kind: str
    until: asyncio.Event | None = None


class FaultyTransport(Transport):
    """Another transport, whose writes fail as ``faults`` says: a map from the write's number (from 0) to its fault.

    ``fence`` waits for late writes, as it would for real ones. ``reached`` is set when a fault happens.
    """

    name: ClassVar[str] = "faulty"

    def __init__(self, inner: Transport, faults: dict[int, Fault]) -> None:
        self.capabilities = inner.capabilities  # type: ignore[misc]  # a wrapper promises what it wraps
        self.inner, self.faults = inner, dict(faults)
        self.writes = 0
        self.reached = asyncio.Event()
        self._late: dict[asyncio.Task[None], Remote] = {}

    async def open(self, arena: Arena | None, admit: Admit, *, incarnation: str) -> None:
        await self.inner.open(arena, admit, incarnation=incarnation)

    def describe(self) -> bytes:
        return self.inner.describe()

    async def connect(self, description: bytes, *, peer: str) -> Remote:
        return await self.inner.connect(description, peer=peer)

    async def write(self, remote: Remote, slices: Sequence[Slice]) -> None:
        number, self.writes = self.writes, self.writes + 1
        fault = self.faults.get(number)
        if fault is None:
            return await self.inner.write(remote, slices)
        self.reached.set()
        failure = WriteFailed(self.name, f"write {number}: {fault.kind}, as planned", peer=remote.peer)
        until = fault.until or asyncio.Event()
        match fault.kind:
            case "fail_before":
                raise failure
            case "fail_after":
                await self.inner.write(remote, slices)
                raise failure
            case "late":
                task = asyncio.ensure_future(self._write_late(remote, slices, until))
                self._late[task] = remote
                task.add_done_callback(self._late.pop)
                raise failure
            case "delay":
                await until.wait()
                return await self.inner.write(remote, slices)
            case _:
                raise ValueError(f"unknown fault {fault.kind!r}")

    async def _write_late(self, remote: Remote, slices: Sequence[Slice], until: asyncio.Event) -> None:
        await until.wait()
        await asyncio.gather(self.inner.write(remote, slices), return_exceptions=True)

    async def fence(self, remote: Remote) -> None:
        if late := [task for task, to in self._late.items() if to is remote]:
            await asyncio.wait(late)
        await self.inner.fence(remote)

    async def revoke(self, peer: str, leases: Sequence[int]) -> None:
        await self.inner.revoke(peer, leases)

    async def disconnect(self, remote: Remote) -> None:
        await self.fence(remote)
        await self.inner.disconnect(remote)

    async def aclose(self) -> None:
        for task in list(self._late):
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)
        await self.inner.aclose()
