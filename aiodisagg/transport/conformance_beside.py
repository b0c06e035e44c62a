"""Checks of writes beside each other: each ends by itself, and what becomes of one is no matter of another.

Also of waits: a fence, a revoke or a disconnect concerns what it names, and whoever stops waiting stops nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from aiodisagg.errors import WriteRefused
from aiodisagg.transport.base import FenceKind, Slice
from aiodisagg.transport.testing import MIB, Checks, ConformanceError, Kit, expect, pattern, raises

BESIDE = Checks()


@BESIDE.add
async def each_write_ends_by_itself(kit: Kit) -> None:
    sizes = (3 * MIB + 1, 10, 200_000, MIB, 5 * MIB, 1, 2 * MIB - 1, 65_536)
    async with kit.pair(16 * MIB) as (receiver, writer, remote, _):

        async def one(number: int, size: int) -> None:
            at, data = 2 * number + sum(sizes[:number]), pattern(size, number)
            await writer.write(remote, [receiver.slice(data, at)])
            expect(
                receiver.holds(data[-1000:], at + size - len(data[-1000:])), "a write ends when its last byte is there"
            )
            expect(receiver.holds(data, at), "a write ends when all of its own bytes are there")

        async with asyncio.TaskGroup() as tasks:
            for number, size in enumerate(sizes):
                tasks.create_task(one(number, size))


@BESIDE.add
async def two_pools_of_one_writer(kit: Kit) -> None:
    async with kit.receiver(4 * MIB) as one, kit.receiver(4 * MIB) as two, kit.writer() as (writer, _):
        remotes = [await writer.connect(r.transport.describe(), peer=r.incarnation) for r in (one, two)]
        for size in (1000, 3 * MIB):
            data, other = pattern(size, 1), pattern(size, 2)
            await asyncio.gather(
                writer.write(remotes[0], [one.slice(data, 7)]), writer.write(remotes[1], [two.slice(other, 7)])
            )
            expect(one.holds(data, 7) and two.holds(other, 7), "each pool holds what was written to it")
            expect(one.untouched(0, 7) and two.untouched(7 + size), "and nothing else")
        await writer.disconnect(remotes[0])
        await writer.write(remotes[1], [two.slice(b"after", 0)])
        expect(two.holds(b"after", 0) and one.untouched(0, 7), "the end of one remote does not concern the other")


@BESIDE.add
async def refused_write_hurts_no_other(kit: Kit) -> None:
    async with kit.pair(kit.huge_bytes) as (receiver, writer, remote, name):
        size = kit.huge_bytes // 4
        revoked = receiver.slice(pattern(1000), 0)
        receiver.lender.withdraw(revoked.lease)
        await receiver.transport.revoke(name, [revoked.lease])
        data = [pattern(size, number) for number in range(3)]
        others = [
            asyncio.ensure_future(writer.write(remote, [receiver.slice(one, (number + 1) * size)]))
            for number, one in enumerate(data)
        ]
        await asyncio.sleep(0)
        with raises(WriteRefused):
            await writer.write(remote, [revoked])
        outcomes = await asyncio.gather(*others, return_exceptions=True)
        expect(outcomes == [None] * 3, f"writes beside a refused one succeed, not {outcomes}")
        for number, one in enumerate(data):
            expect(receiver.holds(one, (number + 1) * size), "and all of their bytes are there")
        expect(receiver.untouched(0, 1000), "the refused one changed nothing")


@BESIDE.add
async def every_slice_needs_its_lease(kit: Kit) -> None:
    async with kit.pair(8 * MIB) as (receiver, writer, remote, name):
        for size in (10, 3 * MIB):
            good, bad = receiver.slice(pattern(size), 0), receiver.slice(pattern(size), 4 * MIB)
            receiver.lender.withdraw(bad.lease)
            await receiver.transport.revoke(name, [bad.lease])
            with raises(WriteRefused):
                await writer.write(remote, [good, bad])
            await writer.fence(remote)
            expect(receiver.untouched(4 * MIB), "a slice whose lease is not valid lands nowhere, wherever it stands")


@BESIDE.add
async def who_stops_waiting_stops_no_write(kit: Kit) -> None:
    async with kit.pair(kit.huge_bytes) as (receiver, writer, remote, name):
        data = pattern(kit.huge_bytes)
        write = asyncio.ensure_future(writer.write(remote, [receiver.slice(data, 0)]))
        await asyncio.sleep(0)
        unused = receiver.lender.lend(0, 1)
        waits = [
            asyncio.ensure_future(writer.fence(remote)),
            asyncio.ensure_future(receiver.transport.revoke(name, [unused])),
        ]
        for _ in range(3):
            await asyncio.sleep(0)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        (outcome,) = await asyncio.gather(write, return_exceptions=True)
        expect(outcome is None, f"a write goes on when a fence or a revoke is cancelled; it ended with {outcome!r}")
        expect(receiver.holds(data, 0), "all bytes arrived")


@BESIDE.add
async def fence_does_not_wait_for_later_writes(kit: Kit) -> None:
    size = kit.huge_bytes // 64
    async with kit.pair(4 * size) as (receiver, writer, remote, _):

        async def stream(number: int) -> None:
            data = pattern(size, number)
            for _ in range(50):
                await writer.write(remote, [receiver.slice(data, number * size)])

        streams = [asyncio.ensure_future(stream(number)) for number in range(4)]
        await asyncio.sleep(0)
        fence = asyncio.ensure_future(writer.fence(remote))
        try:
            await asyncio.wait([fence, *streams], return_when=asyncio.FIRST_COMPLETED)
            expect(fence.done(), "a fence ends though writes that began after it go on")
        finally:
            await asyncio.gather(fence, *streams, return_exceptions=True)


@BESIDE.add
async def disconnect_is_about_one_remote(kit: Kit) -> None:
    """Its own writes end before it returns; those by another remote go on."""
    async with kit.pair(kit.huge_bytes) as (receiver, writer, remote, _):
        size = kit.huge_bytes // 4
        again = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        source, data = bytearray(b"\xaa" * size), pattern(2 * size)
        mine = [asyncio.ensure_future(writer.write(remote, [receiver.slice(source, at * size)])) for at in range(2)]
        other = asyncio.ensure_future(writer.write(again, [receiver.slice(data, 2 * size)]))
        await asyncio.sleep(0)
        await writer.disconnect(remote)
        source[:] = b"\x55" * size
        (outcome,) = await asyncio.gather(other, return_exceptions=True)
        await asyncio.gather(*mine, return_exceptions=True)
        expect(
            outcome is None and receiver.holds(data, 2 * size), f"the other remote's write succeeds, not {outcome!r}"
        )
        landed = bytes(receiver.arena.view[: 2 * size])
        expect(b"\x55" not in landed, "bytes put into the source after disconnect did not arrive")


@BESIDE.add
async def lease_of_another_pool_is_refused(kit: Kit) -> None:
    if kit.capabilities.fence is not FenceKind.RECEIVER:
        return
    async with kit.receiver() as one, kit.receiver() as two, kit.writer() as (writer, _):
        remotes = [await writer.connect(r.transport.describe(), peer=r.incarnation) for r in (one, two)]
        for _ in range(5):
            two.lender.lend(0, 0)  # so that their leases have other numbers
        item = two.slice(b"for two", 0)
        with raises(WriteRefused):
            await writer.write(remotes[0], [Slice(item.source, 0, item.lease)])
        await writer.write(remotes[1], [item])
        expect(one.untouched() and two.holds(b"for two", 0), "a lease is valid in the pool that lent it")


@BESIDE.add
async def revoke_waits_for_nobody_who_left(kit: Kit) -> None:
    """A writer that leaves while it is asked, and one that gives up connecting, wherever it was in it."""
    async with kit.receiver() as receiver, kit.writer() as (writer, name):
        description, unused = receiver.transport.describe(), receiver.lender.lend(0, 1)
        for _ in range(3):
            remote = await writer.connect(description, peer=receiver.incarnation)
            await _ends(asyncio.gather(receiver.transport.revoke(name, [unused]), writer.disconnect(remote)))
        for turns in range(12):
            connecting = asyncio.ensure_future(writer.connect(description, peer=receiver.incarnation))
            for _ in range(turns):
                await asyncio.sleep(0)
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            await _ends(receiver.transport.revoke(name, [unused]))
        remote = await writer.connect(description, peer=receiver.incarnation)
        await writer.write(remote, [receiver.slice(b"still here", 5)])
        expect(receiver.holds(b"still here", 5), "who comes back is as welcome as before")


async def _ends(wait: Awaitable[object]) -> None:
    try:
        async with asyncio.timeout(60):
            await wait
    except TimeoutError as error:
        raise ConformanceError("a revoke ends when its writer has left") from error
