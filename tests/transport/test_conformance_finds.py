"""Plausible mistakes of who writes a transport, and that the suite finds each."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from aiodisagg.errors import WriteFailed, WriteRefused
from aiodisagg.transport.base import Slice, Transport
from aiodisagg.transport.conformance import CHECKS
from aiodisagg.transport.copying import copy_into, settle
from aiodisagg.transport.memory import MemoryTransport
from aiodisagg.transport.testing import MIB, ConformanceError, Kit

pytestmark = pytest.mark.anyio


class TailLost(MemoryTransport):
    """Rounds down."""

    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        for one in slices:
            size = one.source.nbytes if one.source.nbytes <= MIB else one.source.nbytes // 4096 * 4096
            await super().write(remote, [Slice(one.source[:size], one.offset, one.lease)])


class ChunksSwapped(MemoryTransport):
    """Puts the second MiB of much where the first belongs."""

    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        cut = []
        for one in slices:
            starts = range(0, one.source.nbytes, MIB)
            parts = [Slice(one.source[at : at + MIB], one.offset + at, one.lease) for at in starts]
            if len(parts) > 3:
                first, second = parts[:2]
                parts[:2] = [Slice(second.source, first.offset, 0), Slice(first.source, second.offset, 0)]
                parts[:2] = [Slice(part.source, part.offset, one.lease) for part in parts[:2]]
            cut += parts
        await super().write(remote, cut)


class SlicesSwapped(MemoryTransport):
    """Looks a slice up by its size."""

    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        by_size = {one.source.nbytes: one.source for one in slices}
        await super().write(remote, [Slice(by_size[one.source.nbytes], one.offset, one.lease) for one in slices])


class ManySlicesLost(MemoryTransport):
    """As many as one ``writev`` takes."""

    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        await super().write(remote, slices[:1024])


class SaidEarly(MemoryTransport):
    """Done when the last piece is handed over, and not when it is there."""

    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        task = asyncio.ensure_future(super().write(remote, slices))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.sleep(0)
        while not task.done() and getattr(remote, "running", ()):
            if any(copying._ahead is None for copying in remote.running):
                return
            await asyncio.sleep(0)
        await task


class Stale(MemoryTransport):
    """Keeps what it has read of a source."""

    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        kept = self.__dict__.setdefault("kept", {})
        copies = []
        for one in slices:
            key = id(one.source.obj), one.source.nbytes
            source = kept.setdefault(key, (one.source, bytes(one.source)))[1]
            copies.append(Slice(memoryview(source), one.offset, one.lease))
        await super().write(remote, copies)


class OnePool(MemoryTransport):
    """Writes to whatever was connected last."""

    async def connect(self, description, *, peer):  # type: ignore[no-untyped-def]
        self.latest = await super().connect(description, peer=peer)
        return self.latest

    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        await super().write(self.latest, slices)


class FirstLeaseCounts(MemoryTransport):
    """Looks at the lease of the first slice alone."""

    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        await super().write(remote, slices[:1])
        for one in slices[1:]:
            copy_into(remote.landing._pool[one.offset : one.offset + one.source.nbytes], one.source)


class RefusalSpreads(MemoryTransport):
    """A refused write fails those that run beside it."""

    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        try:
            await super().write(remote, slices)
        except WriteRefused:
            for copying in remote.running:
                copying.stop(WriteFailed(self.name, "another one was refused", peer=remote.peer))
            raise


class FenceOfTheCancelled(MemoryTransport):
    """Does not wait for writes that nobody cancelled."""

    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        try:
            await super().write(remote, slices)
        except asyncio.CancelledError:
            self.__dict__.setdefault("cancelled", set()).update(remote.running)
            raise

    async def fence(self, remote) -> None:  # type: ignore[no-untyped-def]
        await settle(self.__dict__.get("cancelled", ()))


class FenceCancels(MemoryTransport):
    """Gathers the writes: whoever cancels the fence cancels them."""

    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        task = asyncio.ensure_future(super().write(remote, slices))
        self.__dict__.setdefault("writes", set()).add(task)
        task.add_done_callback(self.writes.discard)
        await task

    async def fence(self, remote) -> None:  # type: ignore[no-untyped-def]
        await asyncio.gather(*self.__dict__.get("writes", ()), return_exceptions=True)


class FenceWaitsForAll(MemoryTransport):
    """Waits until nothing is under way."""

    async def fence(self, remote) -> None:  # type: ignore[no-untyped-def]
        while remote.running:
            await settle(remote.running)
            await asyncio.sleep(0)


class FenceOfNothing(MemoryTransport):
    async def fence(self, remote) -> None:  # type: ignore[no-untyped-def]
        pass


class KeepsCancelledSources(MemoryTransport):
    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        try:
            await super().write(remote, slices)
        except asyncio.CancelledError:
            self.__dict__.setdefault("kept", []).append([one.source[:] for one in slices])
            raise


class KeepsRefusedSources(MemoryTransport):
    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        try:
            await super().write(remote, slices)
        except WriteRefused:
            self.__dict__.setdefault("kept", []).append([one.source[:] for one in slices])
            raise


class RevokesOnce(MemoryTransport):
    """Takes a wait that was given up for one that ended."""

    async def revoke(self, peer, leases) -> None:  # type: ignore[no-untyped-def]
        seen = self.__dict__.setdefault("seen", set())
        new = [lease for lease in leases if lease not in seen]
        seen.update(new)
        if new:
            await super().revoke(peer, new)


class RevokesTheFirst(MemoryTransport):
    async def revoke(self, peer, leases) -> None:  # type: ignore[no-untyped-def]
        await super().revoke(peer, leases[:1])


class LeavesWithoutAWait(MemoryTransport):
    async def disconnect(self, remote) -> None:  # type: ignore[no-untyped-def]
        remote.closed = True


class LeavesWithOthers(MemoryTransport):
    """Stops the writes of every remote."""

    async def disconnect(self, remote) -> None:  # type: ignore[no-untyped-def]
        for copying in self._threads._running:
            copying.stop(WriteFailed(self.name, "disconnected", peer=remote.peer))
        await super().disconnect(remote)


class ThreadLeft(MemoryTransport):
    left: list[threading.Event]

    async def open(self, arena, admit, *, incarnation) -> None:  # type: ignore[no-untyped-def]
        await super().open(arena, admit, incarnation=incarnation)
        self.left.append(threading.Event())
        threading.Thread(target=self.left[-1].wait, name="io").start()


class DescriptorLeft(MemoryTransport):
    left: list[int]

    async def connect(self, description, *, peer):  # type: ignore[no-untyped-def]
        remote = await super().connect(description, peer=peer)
        self.left.append(os.open("/dev/null", os.O_RDONLY))
        return remote


class TaskLeft(MemoryTransport):
    left: list[asyncio.Task[bool]]

    async def connect(self, description, *, peer):  # type: ignore[no-untyped-def]
        remote = await super().connect(description, peer=peer)
        self.left.append(asyncio.ensure_future(asyncio.Event().wait()))
        return remote


class NeverRefuses(MemoryTransport):
    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        try:
            await super().write(remote, slices)
        except WriteRefused:
            await asyncio.Event().wait()


FOUND: dict[type[Transport], tuple[str, str]] = {
    TailLost: ("odd_sizes_arrive_whole", "the last of them"),
    ChunksSwapped: ("huge_write_leaves_the_loop_free", "all bytes arrived"),
    SlicesSwapped: ("many_slices_of_one_size", "its own place"),
    ManySlicesLost: ("many_slices_of_one_size", "its own place"),
    SaidEarly: ("odd_sizes_arrive_whole", "the last of them"),
    Stale: ("source_is_read_anew", "when it is written"),
    OnePool: ("two_pools_of_one_writer", "each pool holds"),
    FirstLeaseCounts: ("every_slice_needs_its_lease", "nothing was raised"),
    RefusalSpreads: ("refused_write_hurts_no_other", "beside a refused one succeed"),
    FenceOfTheCancelled: ("fence_waits_for_writes_under_way", "was waited for"),
    FenceCancels: ("who_stops_waiting_stops_no_write", "goes on when a fence"),
    FenceWaitsForAll: ("fence_does_not_wait_for_later_writes", "a fence ends"),
    FenceOfNothing: ("source_is_released_by_a_fence", "of a cancelled write"),
    KeepsCancelledSources: ("source_is_released_by_a_fence", "of a cancelled write"),
    KeepsRefusedSources: ("source_is_released_by_a_fence", "of a refused write"),
    RevokesOnce: ("revoke_waits_for_what_was_admitted", "revoke waits for a copy"),
    RevokesTheFirst: ("revoke_waits_for_what_was_admitted", "revoke waits for a copy"),
    LeavesWithoutAWait: ("disconnect_is_about_one_remote", "after disconnect did not arrive"),
    LeavesWithOthers: ("disconnect_is_about_one_remote", "the other remote's write"),
    ThreadLeft: ("threads_end_with_close", "no thread is left"),
    DescriptorLeft: ("close_leaves_no_descriptor_and_no_task", "descriptors"),
    TaskLeft: ("close_leaves_no_descriptor_and_no_task", "Event.wait"),
}


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
async def test_a_mistake_is_found(kind: type[Transport], monkeypatch: pytest.MonkeyPatch) -> None:
    check, promise = FOUND[kind]
    left: list[int | threading.Event | asyncio.Task[bool]] = []
    monkeypatch.setattr(kind, "left", left, raising=False)
    threads = set(threading.enumerate())
    try:
        with pytest.raises(ConformanceError, match=promise):
            await CHECKS[check](Kit(kind, huge_bytes=32 << 20))
    finally:
        for one in left:
            match one:
                case int():
                    os.close(one)
                case threading.Event():
                    one.set()
                case _:
                    one.cancel()
        for thread in set(threading.enumerate()) - threads:
            thread.join()


async def test_a_call_that_never_returns_is_found() -> None:
    with pytest.raises(ConformanceError, match=r"did not in 0\.5 s"):
        await CHECKS["every_slice_needs_its_lease"](Kit(NeverRefuses, patience_s=0.5))
