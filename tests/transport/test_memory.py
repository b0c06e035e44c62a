"""What is particular to the transport inside one process."""

from __future__ import annotations

import msgspec
import pytest

from aiodisagg.errors import TransportUnavailable, WriteRefused
from aiodisagg.transport.base import Slice
from aiodisagg.transport.description import pack, unpack
from aiodisagg.transport.memory import MemoryTransport, _Pool
from aiodisagg.transport.testing import Kit
from tests.conftest import LOOPS

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]


async def test_a_write_with_one_bad_lease_places_nothing(no_leaks: None) -> None:
    async with Kit(MemoryTransport).pair() as (receiver, writer, remote, _):
        with pytest.raises(WriteRefused):
            await writer.write(remote, [receiver.slice(b"good", 0), Slice(memoryview(b"bad"), 100, 999)])
        assert receiver.untouched()


async def test_a_pool_of_another_process_is_unavailable(no_leaks: None) -> None:
    async with Kit(MemoryTransport).pair() as (receiver, writer, _remote, _name):
        pool = unpack("memory", _Pool, receiver.transport.describe())
        for changes in ({"process": "another"}, {"process": pool.process[:-1]}):
            there = pack("memory", msgspec.structs.replace(pool, **changes))
            with pytest.raises(TransportUnavailable):
                await writer.connect(there, peer=receiver.incarnation)
