"""The transport that fails on purpose, and the base's own checks."""

from __future__ import annotations

import asyncio

import pytest

from aiodisagg.errors import WriteFailed
from aiodisagg.transport.base import Slice
from aiodisagg.transport.memory import MemoryTransport
from aiodisagg.transport.testing import Fault, FaultyTransport, Kit

pytestmark = pytest.mark.anyio


async def test_faults_happen_to_the_chosen_writes(no_leaks: None) -> None:
    released, landed = asyncio.Event(), asyncio.Event()
    faults = {
        0: Fault("fail_before"),
        1: Fault("fail_after"),
        2: Fault("late", landed),
        3: Fault("delay", released),
    }
    async with Kit(MemoryTransport).receiver() as receiver:
        writer = FaultyTransport(MemoryTransport(), faults)
        await writer.open(None, lambda offset, size, lease: False, incarnation="w")
        remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        for number in range(3):
            with pytest.raises(WriteFailed, match="as planned"):
                await writer.write(remote, [receiver.slice(b"x" * 10, number * 10)])
        assert receiver.untouched(0, 10)
        assert receiver.holds(b"x" * 10, 10)
        assert receiver.untouched(20)
        fence = asyncio.ensure_future(writer.fence(remote))
        delayed = asyncio.ensure_future(writer.write(remote, [receiver.slice(b"y" * 10, 30)]))
        await asyncio.sleep(0)  # it takes its number now
        await writer.write(remote, [receiver.slice(b"z" * 10, 40)])
        assert receiver.untouched(20, 40)
        assert not fence.done()
        landed.set()
        await fence
        assert receiver.holds(b"x" * 10, 20)
        released.set()
        await delayed
        assert receiver.holds(b"y" * 10 + b"z" * 10, 30)
        await writer.aclose()


async def test_close_forgets_late_writes(no_leaks: None) -> None:
    async with Kit(MemoryTransport).receiver() as receiver:
        writer = FaultyTransport(MemoryTransport(), {0: Fault("late", asyncio.Event())})
        await writer.open(None, lambda offset, size, lease: False, incarnation="w")
        remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        with pytest.raises(WriteFailed):
            await writer.write(remote, [receiver.slice(b"x", 0)])
        await writer.aclose()
        assert receiver.untouched()


async def test_sources_that_are_not_contiguous_bytes_are_the_callers_mistake(no_leaks: None) -> None:
    async with Kit(MemoryTransport).pair() as (receiver, writer, remote, _):
        data = memoryview(bytearray(64))
        for source in (data[::2], data.cast("I"), data.cast("B", (8, 8))):
            with pytest.raises(ValueError, match="contiguous bytes"):
                await writer.write(remote, [Slice(source, 0, receiver.lender.lend(0, 64))])
        assert receiver.untouched()
