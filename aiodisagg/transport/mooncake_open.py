"""What happens before and after transfers, on threads: an engine with its memory, the way to a peer, the end.

``Openers`` runs each such step on a daemon thread of its own: a peer that accepts a connection and stays silent can
hold one for a minute, and neither the loop nor the program's exit may wait for that.

A program may also end without ``aclose``: by an exception, or at once. A thread that comes back from the engine while
the interpreter is being taken down is ended by it with C++ on its stack, and that aborts the process. So before the
interpreter goes, at its exit, every pump is stopped and every engine destroyed, or left to the kernel if a transfer
has not ended by then.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hmac
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TypeVar

from aiodisagg.errors import PeerGone, TransportUnavailable
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.mooncake_engine import DONE, FAILED, Engine
from aiodisagg.transport.mooncake_pump import Pump
from aiodisagg.transport.mooncake_side import PLACE_BYTES
from aiodisagg.transport.mooncake_staging import Staging

T = TypeVar("T")

MAX_PLACES = 256
"""Places of eight bytes that peers write to, and as many that our checks are sent from; more attaches at once wait."""
_LOST_SLOTS = 256
_TICK_S = 200e-6
_EXIT_GRACE_S = 1.0

_opened: set[Opened] = set()
_steps: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@dataclass(slots=True, eq=False)
class Opened:
    """An engine and what is registered with it."""

    engine: Engine
    pump: Pump
    staging: Staging | None
    scratch: Arena
    arena: Arena | None
    lives: dict[str, str] = field(default_factory=dict)
    """Incarnation by segment. An engine keeps what it once learned of an address; a peer's next life at the same one
    would fail for ever (looking again is no way out: that blocks every submit for a minute if a peer is stopped)."""
    process: int = field(default_factory=os.getpid)

    def knows_only(self, segment: str, peer: str) -> bool:
        return self.lives.setdefault(segment, peer) == peer

    def place(self, number: int, *, outgoing: bool = False) -> int:
        return PLACE_BYTES * (number + MAX_PLACES * outgoing)

    def address(self, place: int) -> int:
        return self.scratch.address + place

    def fill(self, place: int, data: bytes) -> None:
        self.scratch.view[place : place + PLACE_BYTES] = data

    def read(self, place: int) -> bytes:
        return bytes(self.scratch.view[place : place + PLACE_BYTES])

    def close(self, grace_s: float) -> Callable[[], None]:
        """A step for a thread: waits for transfers under way, then ends the engine. Afterwards nothing moves."""

        def step() -> None:
            self.pump.finish(grace_s)
            self.pump.join()
            _opened.discard(self)
            for arena in (self.arena, self.scratch):
                if arena is not None:
                    self.engine.unregister(arena.address)
            if self.staging is not None:
                self.staging.unregister()
            if self.pump.abandoned:
                self.engine.park()  # and its staging memory with it
                return
            self.engine.close()
            self.scratch.close()
            if self.staging is not None:
                self.staging.close()

        return step

    def leave(self, grace_s: float) -> None:
        """At the interpreter's exit: afterwards no thread of ours is inside the engine."""
        self.pump.finish(grace_s)
        ended = self.process == os.getpid() and self.pump.join(grace_s + _EXIT_GRACE_S)
        if ended and not self.pump.abandoned:
            self.engine.close()
        else:  # a forked child has none of the threads that the destructor waits for
            self.engine.park()


class Places:
    """Places that nobody uses. Who finds none waits; the wait's bound is the caller's time-out.

    The one that is free longest comes first: bytes of an attach that was given up may still arrive in its place.
    """

    def __init__(self) -> None:
        self._free: asyncio.Queue[int] = asyncio.Queue(MAX_PLACES)
        for number in range(MAX_PLACES):
            self._free.put_nowait(number)

    async def take(self) -> Place:
        return Place(await self._free.get(), self._free.put_nowait)


class Place:
    """For one check. Given back at the end of the ``with`` statement, if not before."""

    def __init__(self, number: int, give: Callable[[int], None]) -> None:
        self.number = number
        self._give = give
        self._given_back = False

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Idempotent."""
        if not self._given_back:
            self._given_back = True
            self._give(self.number)

    def check(self, opened: Opened, nonce: bytes) -> bool:
        """Did these bytes arrive there? Gives the place back: a second check is wrong."""
        right = not self._given_back and hmac.compare_digest(opened.read(opened.place(self.number)), nonce)
        self.give_back()
        return right


def open_engine(
    name: str,
    protocol: str,
    host: str,
    devices: str,
    progress_timeout_s: int,
    *,
    arena: Arena | None,
    depth: tuple[int, int],
    slot_bytes: int,
    slots: int,
    overdue_s: float,
) -> Callable[[], Opened]:
    """A step for a thread: an engine, with its pool and its staging slots registered. Raises TransportUnavailable."""

    def step() -> Opened:
        engine = Engine(name, protocol, host, devices, progress_timeout_s)
        scratch = Arena(2 * MAX_PLACES * PLACE_BYTES)
        staging = Staging(engine, slot_bytes, _LOST_SLOTS) if slots else None
        direct = [(one.address, one.address + one.size_bytes) for one in (scratch, arena) if one is not None]
        try:
            for start, stop in direct:
                engine.register(start, stop - start)
            if staging is not None:
                for _ in range(slots):
                    staging.add()
        except TransportUnavailable:
            engine.close()
            scratch.close()
            if staging is not None:
                staging.close()
            raise
        opened = Opened(engine, Pump(name, engine, *depth, staging, direct, overdue_s), staging, scratch, arena)
        _opened.add(opened)
        return opened

    return step


def reach(
    name: str, peer: str, opened: Opened, segment: str, target: int, number: int, nonce: bytes, limit_s: float
) -> None:
    """On a thread: opens the engine's way to a peer by writing ``nonce`` to ``target`` in its memory.

    The probe comes first because it takes no lock of the engine: a silent peer then costs this thread and nobody else.

    Raises:
        PeerGone: no engine answers there.
        TransportUnavailable: one answers, but a write does not arrive.
    """
    until = time.monotonic() + limit_s
    if not opened.engine.probe(segment):
        raise PeerGone(name, f"no engine answers at {segment}", peer=peer)
    place = opened.place(number, outgoing=True)
    opened.fill(place, nonce)
    while time.monotonic() < until:
        transfer = opened.engine.submit(segment, opened.address(place), target, len(nonce))
        status = FAILED
        while transfer and (status := opened.engine.status(transfer)) not in (DONE, FAILED):
            if time.monotonic() > until:
                break
            time.sleep(_TICK_S)
        if status == DONE:
            return
        time.sleep(max(0.0, min(0.5, until - time.monotonic())))
    raise TransportUnavailable(name, f"{segment} answers, but a write to it fails", peer=peer)


class Openers:
    """Runs steps on daemon threads, and tasks that nobody awaits, until ``aclose``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._threads: set[threading.Thread] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, step: Callable[[], T], ended: Callable[[], None] = lambda: None) -> T:
        """The result of ``step`` on a thread. If this wait is cancelled, the step goes on and its result is dropped.

        ``ended`` is called on the loop when the step has ended, also after a cancelled wait."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                result = step()
            except Exception as error:
                tell(future.set_exception, error)
            else:
                tell(future.set_result, result)

        def tell(how: Callable[..., None], what: object) -> None:
            def finish() -> None:
                ended()
                if not future.done():
                    how(what)

            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(finish)

        thread = threading.Thread(target=work, name=f"aiodisagg-{self._name}-open", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left
            ended()
            raise
        self._threads = {one for one in self._threads if one.is_alive()} | {thread}
        _steps.add(thread)
        return await future

    def after(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Ends the tasks. Threads that are done are joined, others are left to their peer's time-out."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for thread in self._threads:
            thread.join(0.01)


@atexit.register
def _leave() -> None:
    """See the module's text. A step that a silent peer holds is not waited for."""
    until_s = time.monotonic() + _EXIT_GRACE_S
    for thread in list(_steps):
        thread.join(max(0.0, until_s - time.monotonic()))
    for opened in list(_opened):
        opened.leave(max(0.0, until_s - time.monotonic()))
