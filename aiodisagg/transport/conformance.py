"""The checks behind :func:`aiodisagg.transport.testing.check_transport`: one promise of the interface each.

Here: what arrives, and how peers come and go. Who may touch memory, and when, is in ``conformance_ownership``; what
writes and waits have to do with each other, in ``conformance_beside``.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading

from aiodisagg.errors import PeerGone, TransportClosed, TransportError, TransportUnavailable
from aiodisagg.transport.conformance_beside import BESIDE
from aiodisagg.transport.conformance_ownership import OWNERSHIP
from aiodisagg.transport.testing import GUARD, MIB, Checks, ConformanceError, Kit, expect, loop_watch, pattern, raises

CHECKS = Checks()


@CHECKS.add
async def bytes_are_exact_and_nothing_else_changes(kit: Kit) -> None:
    async with kit.pair() as (receiver, writer, remote, _):
        at = 100
        for size in (1, 7, 4096, 65_537, 300_001):
            data = pattern(size, size)
            await writer.write(remote, [receiver.slice(data, at)])
            expect(receiver.holds(data, at), f"{size} bytes arrived as written")
            expect(receiver.untouched(at + size), "nothing behind the range changed")
            at += size + 13
        expect(receiver.untouched(0, 100), "nothing before the range changed")


@CHECKS.add
async def empty_writes_succeed(kit: Kit) -> None:
    async with kit.pair() as (receiver, writer, remote, _):
        await writer.write(remote, [])
        await writer.write(remote, [receiver.slice(b"", 0), receiver.slice(b"", receiver.arena.size_bytes)])
        await writer.write(remote, [receiver.slice(b"", 5), receiver.slice(b"abc", 9), receiver.slice(b"", 7)])
        expect(receiver.holds(b"abc", 9) and receiver.untouched(12), "only the three bytes landed")


@CHECKS.add
async def huge_write_leaves_the_loop_free(kit: Kit) -> None:
    async with kit.pair(kit.huge_bytes + 8192) as (receiver, writer, remote, _):
        data = pattern(kit.huge_bytes)
        for left in (2, 1, 0):  # a copy on the wrong thread comes again, a stolen page of memory does not
            try:
                async with loop_watch(kit, data):
                    await writer.write(remote, [receiver.slice(data, 4096)])
                break
            except ConformanceError:
                if not left:
                    raise
        expect(receiver.holds(data, 4096), "all bytes arrived")
        expect(receiver.untouched(0, 4096) and receiver.untouched(4096 + len(data)), "the guard bytes are intact")


@CHECKS.add
async def slices_scatter_and_gather(kit: Kit) -> None:
    async with kit.pair(4 * MIB) as (receiver, writer, remote, _):
        source = memoryview(bytes(pattern(2 * MIB)))  # read-only sources are sources too
        places = [(3 * MIB, 0, 1000), (17, 5000, 1), (2 * MIB, 100_000, 600_000), (4 * MIB - 5, 99, 5), (MIB, 0, 0)]
        await writer.write(remote, [receiver.slice(source[at : at + size], to) for to, at, size in places])
        for to, at, size in places:
            expect(receiver.holds(bytes(source[at : at + size]), to), f"the slice for {to} arrived")
        expect(receiver.untouched(18, MIB) and receiver.untouched(2 * MIB + 600_000, 3 * MIB), "nothing in between did")


@CHECKS.add
async def odd_sizes_arrive_whole(kit: Kit) -> None:
    """Around the sizes of usual pieces, the last bytes first: a write that ends early has not placed them yet."""
    async with kit.pair(9 * MIB) as (receiver, writer, remote, _):
        for size in (65_535, MIB - 1, MIB + 1, 2 * MIB + 3, 4 * MIB + 4097, 8 * MIB + 1):
            data = pattern(size, size)
            await writer.write(remote, [receiver.slice(data, 3)])
            expect(receiver.holds(data[-9:], size - 6), f"a write of {size} bytes ends when the last of them is there")
            expect(receiver.holds(data, 3), f"{size} bytes arrived as written")
            expect(receiver.untouched(0, 3) and receiver.untouched(3 + size), "nothing around them changed")
            receiver.arena.view[:] = bytes([GUARD]) * receiver.arena.size_bytes


@CHECKS.add
async def many_slices_of_one_size(kit: Kit) -> None:
    """More than one call of a kernel takes, and alike in everything but place and content."""
    async with kit.pair(8 * MIB) as (receiver, writer, remote, _):
        for size, count in ((100, 3000), (2 * MIB, 3)):
            source = memoryview(pattern(size * count))
            pieces = [source[number * size : (number + 1) * size] for number in range(count)]
            places = [(count - 1 - number) * (size + 4) for number in range(count)]
            await writer.write(remote, [receiver.slice(*one) for one in zip(pieces, places, strict=True)])
            for piece, place in zip(pieces, places, strict=True):
                expect(receiver.arena.view[place : place + size] == piece, "each slice is in its own place")
                expect(receiver.untouched(place + size, place + size + 4), "and nothing in between changed")


@CHECKS.add
async def source_is_read_anew(kit: Kit) -> None:
    async with kit.pair(4 * MIB) as (receiver, writer, remote, _):
        for size in (1000, 3 * MIB):
            source = bytearray(size)
            for fill in (1, 2, 3):
                source[:] = bytes([fill]) * size
                await writer.write(remote, [receiver.slice(source, 0)])
                expect(receiver.holds(source, 0), "what arrives is what the source holds when it is written")


@CHECKS.add
async def many_writers_at_once(kit: Kit) -> None:
    async with kit.receiver(8 * MIB) as receiver:

        async def one(number: int) -> None:
            async with kit.writer() as (writer, _):
                remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
                slot = 2 * MIB * number
                async with asyncio.TaskGroup() as tasks:
                    for part in range(16):
                        size = 1 + (part * 9973) % 120_000
                        item = receiver.slice(pattern(size, part), slot + part * 125_000)
                        tasks.create_task(writer.write(remote, [item]))
                for part in range(16):
                    size = 1 + (part * 9973) % 120_000
                    expect(receiver.holds(pattern(size, part), slot + part * 125_000), "each write is whole")

        async with asyncio.TaskGroup() as tasks:
            for number in range(4):
                tasks.create_task(one(number))


@CHECKS.add
async def both_directions_at_once(kit: Kit) -> None:
    async with kit.receiver(2 * MIB) as one, kit.receiver(2 * MIB) as two:
        to_two = await one.transport.connect(two.transport.describe(), peer=two.incarnation)
        to_one = await two.transport.connect(one.transport.describe(), peer=one.incarnation)
        data, other = pattern(2 * MIB, 1), pattern(2 * MIB, 2)
        await asyncio.gather(
            one.transport.write(to_two, [two.slice(data, 0)]), two.transport.write(to_one, [one.slice(other, 0)])
        )
        expect(two.holds(data, 0) and one.holds(other, 0), "both pools hold the other's bytes")


@CHECKS.add
async def small_write_passes_a_huge_one(kit: Kit) -> None:
    async with kit.pair(kit.huge_bytes + MIB) as (receiver, writer, remote, _):
        item = receiver.slice(pattern(kit.huge_bytes), MIB)
        huge = [asyncio.ensure_future(writer.write(remote, [item])) for _ in range(4)]
        await asyncio.sleep(0)
        await writer.write(remote, [receiver.slice(pattern(MIB, 3), 0)])
        done = sum(one.done() for one in huge)
        expect(done < 2, f"a small write passes huge ones that started before it; {done} of 4 were done first")
        await asyncio.gather(*huge)


CHECKS |= BESIDE  # here, since they run in this order
CHECKS |= OWNERSHIP


@CHECKS.add
async def close_ends_writes_under_way(kit: Kit) -> None:
    async with kit.receiver(kit.huge_bytes) as receiver, kit.writer() as (writer, _):
        remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        source = pattern(kit.huge_bytes // 4)
        items = [receiver.slice(source, at * len(source)) for at in range(4)]
        writes = [asyncio.ensure_future(writer.write(remote, [item])) for item in items]
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await writer.aclose()
            outcomes = await asyncio.gather(*writes, return_exceptions=True)
        expect(all(o is None or isinstance(o, TransportClosed) for o in outcomes), f"typed outcomes, not {outcomes}")
        expect(any(isinstance(o, TransportClosed) for o in outcomes), "close does not wait for huge writes")
        landed = bytes(receiver.arena.view)
        source[:] = bytes(len(source))
        await writer.aclose()
        expect(bytes(receiver.arena.view) == landed or not kit.capabilities.one_sided, "nothing moves after close")


@CHECKS.add
async def close_is_one_however_often_it_is_called(kit: Kit) -> None:
    """Whoever may free the pool after ``aclose`` may do so after any call of it that returned."""
    await _use(kit)
    for turns, cancelled in ((0, True), (1, True), (3, True), (1, False)):
        before = set(threading.enumerate())
        async with kit.pair(8 * MIB) as (receiver, writer, remote, _):
            write = asyncio.ensure_future(writer.write(remote, [receiver.slice(pattern(8 * MIB), 0)]))
            await asyncio.sleep(0)
            closes = []
            for transport in (writer, receiver.transport):
                closes.append(asyncio.ensure_future(transport.aclose()))
                for _ in range(turns):
                    await asyncio.sleep(0)
                if cancelled:
                    closes[-1].cancel()
                await transport.aclose()
            left = _threads(before)
            await asyncio.gather(write, *closes, return_exceptions=True)
            expect(not left, f"any close that returns is the end, and leaves no threads {left}")


@CHECKS.add
async def use_after_close_is_an_error(kit: Kit) -> None:
    async with kit.pair() as (receiver, writer, remote, _):
        description = receiver.transport.describe()
        await writer.aclose()
        with raises(TransportClosed):
            await writer.write(remote, [receiver.slice(b"x", 0)])
        with raises(TransportClosed):
            await writer.connect(description, peer=receiver.incarnation)
        with raises(TransportClosed):
            await writer.open(None, lambda offset, size, lease: True, incarnation="again")
        await writer.fence(remote)  # what was closed is fenced
        await receiver.transport.aclose()
        with raises(TransportClosed):
            receiver.transport.describe()
        with raises(TransportClosed):
            await receiver.transport.revoke("anyone", [1])
        unopened = kit.make()
        with raises(TransportClosed):
            unopened.describe()
        await unopened.aclose()


@CHECKS.add
async def disconnect_ends_one_remote(kit: Kit) -> None:
    async with kit.pair() as (receiver, writer, remote, name):
        again = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        await writer.write(remote, [receiver.slice(b"one", 0)])
        for _ in range(2):
            await writer.disconnect(remote)
        with raises(TransportClosed):
            await writer.write(remote, [receiver.slice(b"two", 0)])
        await writer.write(again, [receiver.slice(b"three", 10)])
        expect(receiver.holds(b"one", 0) and receiver.holds(b"three", 10), "the other remote goes on")
        await writer.disconnect(again)
        async with asyncio.timeout(20):
            await receiver.transport.revoke(name, [1])


@CHECKS.add
async def sender_without_a_pool_describes_nothing(kit: Kit) -> None:
    async with kit.writer() as (writer, _):
        with raises(TransportUnavailable):
            writer.describe()


@CHECKS.add
async def wrong_incarnation_is_gone(kit: Kit) -> None:
    async with kit.receiver() as receiver, kit.writer() as (writer, _):
        expect(len(receiver.transport.describe()) <= 4096, "a description fits 4 KiB")
        with raises(PeerGone):
            await writer.connect(receiver.transport.describe(), peer="somebody-else")
        remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        expect(remote.size_bytes == receiver.arena.size_bytes, "the remote knows the pool's size")


@CHECKS.add
async def closed_peer_is_gone(kit: Kit) -> None:
    async with kit.writer() as (writer, _):
        async with kit.receiver() as old:
            remote = await writer.connect(old.transport.describe(), peer=old.incarnation)
            await writer.write(remote, [old.slice(b"x", 0)])
            description, late = old.transport.describe(), old.slice(b"x", 0)
        with raises(PeerGone):
            await writer.connect(description, peer=old.incarnation)
        async with kit.receiver() as new:  # the restarted process: another incarnation
            async with asyncio.timeout(20):
                with raises(PeerGone):
                    for _ in range(1_000_000):  # the end of a peer travels for a moment
                        await writer.write(remote, [late])
            await writer.fence(remote)
            await writer.disconnect(remote)
            fresh = await writer.connect(new.transport.describe(), peer=new.incarnation)
            await writer.write(fresh, [new.slice(b"again", 0)])
            expect(new.holds(b"again", 0) and new.untouched(5), "only the new write landed in the new pool")


@CHECKS.add
async def peer_that_closes_in_mid_write_is_gone(kit: Kit) -> None:
    async with kit.pair(kit.huge_bytes) as (receiver, writer, remote, _):
        write = asyncio.ensure_future(writer.write(remote, [receiver.slice(pattern(kit.huge_bytes), 0)]))
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await receiver.transport.aclose()
            (outcome,) = await asyncio.gather(write, return_exceptions=True)
            await writer.fence(remote)
        expect(outcome is None or isinstance(outcome, PeerGone), f"done or PeerGone, not {outcome!r}")


@CHECKS.add
async def damaged_descriptions_are_transport_errors(kit: Kit) -> None:
    async with kit.receiver() as receiver, kit.writer() as (writer, _):
        good, dice = receiver.transport.describe(), random.Random(11)
        bad = [b"", b"\0", b"x" * 5000, dice.randbytes(300), good + b"\0", good[4:], good * 2]
        bad += [good[:cut] for cut in range(0, len(good), 7)]
        for _ in range(64):
            broken = bytearray(good)
            broken[dice.randrange(len(good))] ^= 1 << dice.randrange(8)
            bad.append(bytes(broken))
        for description in bad:
            with raises(TransportError):
                await writer.connect(description, peer=receiver.incarnation)
        await writer.connect(good, peer=receiver.incarnation)


@CHECKS.add
async def threads_end_with_close(kit: Kit) -> None:
    await _use(kit)  # what a library makes once, and keeps, is made here
    before = set(threading.enumerate())
    await _use(kit)
    left = _threads(before)
    expect(not left, f"no thread is left, not {left}")


def _threads(before: set[threading.Thread]) -> list[str]:
    """Names of those that have begun since, without a loop's own."""
    return [thread.name for thread in set(threading.enumerate()) - before if not thread.name.startswith("asyncio_")]


@CHECKS.add
async def close_leaves_no_descriptor_and_no_task(kit: Kit) -> None:
    await _use(kit)
    gc.collect()
    tasks, files = asyncio.all_tasks(), _descriptors()
    await _use(kit)
    gc.collect()
    for _ in range(100):  # sockets that were closed end in a later turn
        if asyncio.all_tasks() <= tasks and _descriptors() <= files:
            return
        await asyncio.sleep(0.01)
    expect(False, f"close leaves {_descriptors() - files} descriptors and tasks {asyncio.all_tasks() - tasks}")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


async def _use(kit: Kit) -> None:
    """Two connections, one that is given up, a write that ends and one that is cancelled; nothing is disconnected."""
    async with kit.pair(8 * MIB) as (receiver, writer, remote, _):
        description = receiver.transport.describe()
        await writer.connect(description, peer=receiver.incarnation)
        given_up = asyncio.ensure_future(writer.connect(description, peer=receiver.incarnation))
        await asyncio.sleep(0)
        given_up.cancel()
        await writer.write(remote, [receiver.slice(pattern(8 * MIB), 0)])
        write = asyncio.ensure_future(writer.write(remote, [receiver.slice(pattern(8 * MIB), 0)]))
        await asyncio.sleep(0)
        write.cancel()
        await asyncio.gather(given_up, write, return_exceptions=True)
