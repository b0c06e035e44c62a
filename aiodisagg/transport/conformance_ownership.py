"""Checks of who may touch memory, and when: of the rules at the top of ``base``.

A write that failed or was cancelled says nothing of where its bytes are. What the two sides may rely on is checked
from both: by changing a source after ``fence``, by filling a range after ``revoke``, and by looking for bytes that
moved all the same. A later write is waited for in between, so that what was late had time to land.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable

from aiodisagg.errors import WriteRefused
from aiodisagg.transport.base import FenceKind, Slice
from aiodisagg.transport.testing import GUARD, MIB, Checks, Kit, expect, pattern, raises

OWNERSHIP = Checks()


@OWNERSHIP.add
async def source_is_released(kit: Kit) -> None:
    async with kit.pair(8 * MIB) as (receiver, writer, remote, _):
        for size in (1000, 100_000, 5 * MIB):
            data = pattern(size)
            item = receiver.slice(data, 0)
            await writer.write(remote, [item])
            _expect_released(item, data, f"nothing refers to a source of {size} bytes after its write")


def _expect_released(item: Slice, data: bytearray, promise: str) -> None:
    item.source.release()
    try:
        data.extend(b"x")
    except BufferError:
        expect(False, promise)


@OWNERSHIP.add
async def source_is_released_by_a_fence(kit: Kit) -> None:
    """Also that of a write that was cancelled or refused: memory to which something refers cannot be given back."""
    async with kit.pair(8 * MIB) as (receiver, writer, remote, name):
        for size in (1000, 5 * MIB):
            for turns in (1, 2, 4, 8, 1, 2, 4, 8):
                data = pattern(size)
                item = receiver.slice(data, 0)
                await _cancelled(writer.write(remote, [item]), turns)
                await writer.fence(remote)
                _expect_released(item, data, "nothing refers to the source of a cancelled write after the fence")
            data = pattern(size)
            item = receiver.slice(data, 0)
            receiver.lender.withdraw(item.lease)
            await receiver.transport.revoke(name, [item.lease])
            with raises(WriteRefused):
                await writer.write(remote, [item])
            await writer.fence(remote)
            _expect_released(item, data, "nothing refers to the source of a refused write after the fence")


@OWNERSHIP.add
async def fence_waits_for_writes_under_way(kit: Kit) -> None:
    async with kit.pair(kit.huge_bytes) as (receiver, writer, remote, _):
        size = kit.huge_bytes // 8
        source, late = bytearray(b"\xaa" * size), b"\x55" * size
        writes = [asyncio.ensure_future(writer.write(remote, [receiver.slice(source, at * size)])) for at in range(8)]
        await asyncio.sleep(0)
        await writer.fence(remote)
        source[:] = late
        outcomes = await asyncio.gather(*writes, return_exceptions=True)
        expect(outcomes == [None] * 8, f"a fence stops no write: {outcomes}")
        expect(bytes(receiver.arena.view) == b"\xaa" * (8 * size), "what was under way was waited for")


async def _cancelled(write: Awaitable[None], turns: int) -> bool:
    """Runs a write for some turns of the loop and cancels it. True if it was cancelled under way."""
    task = asyncio.ensure_future(write)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if outcome is not None and not isinstance(outcome, asyncio.CancelledError):
        raise outcome
    return outcome is not None


@OWNERSHIP.add
async def cancel_stops_a_write(kit: Kit) -> None:
    async with kit.pair(kit.huge_bytes) as (receiver, writer, remote, _):
        source = pattern(kit.huge_bytes)
        for _ in range(10):
            receiver.arena.view[-1] = source[-1] ^ 0xFF
            await _cancelled(writer.write(remote, [receiver.slice(source, 0)]), turns=1)
            await writer.fence(remote)
            if receiver.arena.view[-1] != source[-1]:
                return
        expect(False, "a cancelled write does not go on to its end")


@OWNERSHIP.add
async def source_is_free_after_cancel_and_fence(kit: Kit) -> None:
    size = 8 * MIB
    async with kit.pair(size + MIB) as (receiver, writer, remote, _):
        cancelled = 0
        for turns in (1, 2, 4, 8, 16, 32):
            source = bytearray(b"\xaa" * size)
            cancelled += await _cancelled(writer.write(remote, [receiver.slice(source, MIB)]), turns)
            await writer.fence(remote)
            source[:] = b"\x55" * size
            await writer.write(remote, [receiver.slice(b"behind", 0)])
            landed = bytes(receiver.arena.view[MIB:])
            expect(b"\x55" not in landed, "bytes put into the source after the fence did not arrive")
        expect(cancelled > 0, "at least one write was cancelled under way")


@OWNERSHIP.add
async def range_is_free_after_cancel_and_revoke(kit: Kit) -> None:
    size = 8 * MIB
    async with kit.pair(size + MIB) as (receiver, writer, remote, name):
        for turns in (1, 2, 4, 8, 16, 32):
            item = receiver.slice(bytearray(b"\xaa" * size), MIB)
            await _cancelled(writer.write(remote, [item]), turns)
            receiver.lender.withdraw(item.lease)
            async with asyncio.timeout(20):
                await receiver.transport.revoke(name, [item.lease])
            receiver.arena.view[MIB:] = b"\x33" * (receiver.arena.size_bytes - MIB)
            await writer.fence(remote)
            await writer.write(remote, [receiver.slice(b"behind", 0)])
            expect(receiver.arena.view[MIB:] == b"\x33" * size, "a range that was lent anew never changed")


@OWNERSHIP.add
async def revoke_ends_a_running_write(kit: Kit) -> None:
    async with kit.pair(kit.huge_bytes) as (receiver, writer, remote, name):
        item = receiver.slice(pattern(kit.huge_bytes), 0)
        write = asyncio.ensure_future(writer.write(remote, [item]))
        await asyncio.sleep(0)
        receiver.lender.withdraw(item.lease)
        await receiver.transport.revoke(name, [item.lease])
        receiver.arena.view[:] = b"\x33" * receiver.arena.size_bytes
        (outcome,) = await asyncio.gather(write, return_exceptions=True)
        expect(outcome is None or isinstance(outcome, WriteRefused), f"done or refused, not {outcome!r}")
        await writer.write(remote, [receiver.slice(b"x", 0)])
        expect(receiver.arena.view[1:] == b"\x33" * (receiver.arena.size_bytes - 1), "nothing landed after revoke")


@OWNERSHIP.add
async def revoke_waits_for_what_was_admitted(kit: Kit) -> None:
    """Where a thread asks ``admit``, the lease may be withdrawn between the answer and the copy."""
    if kit.capabilities.fence is not FenceKind.RECEIVER:
        return
    size, loop, ours = 5 * MIB, asyncio.get_running_loop(), threading.get_ident()
    asked, go = asyncio.Event(), threading.Event()

    def hold() -> None:
        if threading.get_ident() != ours:
            loop.call_soon_threadsafe(asked.set)
            go.wait(60)

    async with kit.pair(size + MIB) as (receiver, writer, remote, name):
        receiver.lender.admitted = hold
        item, unused = receiver.slice(pattern(size), MIB), receiver.lender.lend(0, 1)
        write, holds = asyncio.ensure_future(writer.write(remote, [item])), asyncio.ensure_future(asked.wait())
        revoke = None
        try:
            await asyncio.wait([write, holds], return_when=asyncio.FIRST_COMPLETED)
            if holds.done():  # else it asks on the loop's thread, where nothing can come in between
                receiver.lender.withdraw(item.lease)
                for left in (1, 0):  # whoever stopped waiting and asks again waits as long
                    revoke = asyncio.ensure_future(receiver.transport.revoke(name, [unused, item.lease]))
                    for _ in range(20):
                        await asyncio.sleep(0)
                    expect(not revoke.done(), "revoke waits for a copy that was admitted before")
                    if left:
                        revoke.cancel()
        finally:
            go.set()
            holds.cancel()
            (outcome, *_) = await asyncio.gather(write, holds, *filter(None, [revoke]), return_exceptions=True)
        expect(outcome is None or isinstance(outcome, WriteRefused), f"done or refused, not {outcome!r}")
        if revoke is not None:
            receiver.arena.view[MIB:] = b"\x33" * size
            await writer.write(remote, [receiver.slice(b"behind", 0)])
            expect(receiver.arena.view[MIB:] == b"\x33" * size, "nothing landed after revoke")


@OWNERSHIP.add
async def revoke_of_the_unknown_returns(kit: Kit) -> None:
    async with kit.pair() as (receiver, writer, remote, name):
        async with asyncio.timeout(20):
            await receiver.transport.revoke("nobody", [1, 2, 3])
            await receiver.transport.revoke(name, [])
            await receiver.transport.revoke(name, list(range(10_000, 15_000)))
            for _ in range(2):  # the same range freed twice
                await receiver.transport.revoke(name, [10_000])
        await writer.write(remote, [receiver.slice(b"still here", 0)])
        expect(receiver.holds(b"still here", 0), "other leases are as valid as before")


@OWNERSHIP.add
async def lease_revoked_before_connect_is_refused(kit: Kit) -> None:
    async with kit.receiver() as receiver, kit.writer() as (writer, name):
        item = receiver.slice(b"too late", 0)
        receiver.lender.withdraw(item.lease)
        await receiver.transport.revoke(name, [item.lease])
        remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        with raises(WriteRefused):
            await writer.write(remote, [item])
        expect(receiver.untouched(), "nothing landed")


@OWNERSHIP.add
async def lease_that_is_not_lent_is_refused(kit: Kit) -> None:
    if kit.capabilities.fence is not FenceKind.RECEIVER:
        return
    async with kit.pair(8 * MIB) as (receiver, writer, remote, _):
        for size in (10, 5 * MIB):
            good, wide = receiver.slice(pattern(size), 0), receiver.slice(pattern(size), 1024)
            wide = Slice(wide.source, wide.offset + 1, wide.lease)
            with raises(WriteRefused):
                await writer.write(remote, [Slice(good.source, 0, 999_999)])
            await writer.fence(remote)
            expect(receiver.untouched(), "a refused write changed nothing")
            with raises(WriteRefused):
                await writer.write(remote, [wide])
            await writer.fence(remote)
            expect(receiver.untouched(0, 1024), "nothing before the lent range changed")
            expect(receiver.untouched(1024 + size), "nothing behind it changed")
            receiver.arena.view[:] = bytes([GUARD]) * receiver.arena.size_bytes
        await writer.write(remote, [receiver.slice(b"next", 0)])
        expect(receiver.holds(b"next", 0), "the next write is not affected")


@OWNERSHIP.add
async def range_outside_the_pool_is_refused(kit: Kit) -> None:
    async with kit.pair() as (receiver, writer, remote, _):
        end = receiver.arena.size_bytes
        for offset in (end, end - 9, -1, 2**40, 2**63 - 1):
            with raises(WriteRefused):
                await writer.write(remote, [receiver.slice(b"first", 0), receiver.slice(b"0123456789", offset)])
        await writer.fence(remote)
        await writer.write(remote, [receiver.slice(b"0123456789", end - 10)])
        expect(receiver.holds(b"0123456789", end - 10), "the last bytes of the pool can be written")
