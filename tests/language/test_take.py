"""Chunks that landed are checked and handed on, and whatever goes wrong is told."""

from __future__ import annotations

import asyncio

import pytest
import xxhash

from aiodisagg.device.copies import DeviceBytes
from aiodisagg.language.memory import RowMemory
from aiodisagg.language.take import INLINE_BYTES, Taker
from aiodisagg.protocol.events import RowsRefused, RowsTaken, Take
from aiodisagg.protocol.messages import Chunk, ItemKey

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
KEY = ItemKey(1, 2)


@pytest.mark.parametrize("size_bytes", [INLINE_BYTES, INLINE_BYTES + 1], ids=["on the loop", "on a thread"])
@pytest.mark.parametrize("what", ["good", "wrong checksum", "not delivered"])
async def test_a_chunk_is_taken_once_it_was_delivered(what: str, size_bytes: int) -> None:
    """Rows that nobody got, and are said to be here, are never asked for again."""
    got: list[bytes] = []
    told: asyncio.Queue[RowsTaken | RowsRefused] = asyncio.Queue()

    def deliver(take: Take, data: memoryview | DeviceBytes) -> None:
        assert isinstance(data, memoryview)
        if what == "not delivered":
            raise RuntimeError("no memory")
        got.append(bytes(data))

    memory = RowMemory(1 << 20, None)
    try:
        async with Taker(memory, deliver, told.put_nowait, checksum=True) as taker:
            rows = b"r" * size_bytes
            memory.arena.view[100 : 100 + size_bytes] = rows
            checksum = xxhash.xxh3_64_intdigest(rows) ^ (what == "wrong checksum")
            chunk = Chunk(7, 0, 4, checksum)
            taker.take(Take(KEY, chunk, 100, size_bytes, None))
            found = await asyncio.wait_for(told.get(), 60)
    finally:
        memory.close()
    why = {"good": RowsTaken(KEY, chunk), "wrong checksum": RowsRefused(KEY, chunk)}
    assert found == why.get(what, RowsRefused(KEY, chunk, "RuntimeError('no memory')"))
    assert got == ([rows] if what == "good" else [])
