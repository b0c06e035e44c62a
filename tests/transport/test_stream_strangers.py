"""Strangers on the port of plain TCP: how many that say nothing are borne, and that they lock nobody out."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from aiodisagg.transport.stream import StreamTransport
from aiodisagg.transport.testing import Kit
from tests.conftest import LOOPS
from tests.transport.test_stream import hello, receiving, stranger

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]


async def test_silent_strangers_make_room_for_each_other_and_for_writers(no_leaks: None) -> None:
    """Each held a descriptor for ``connect_timeout_s``, however many came in that time."""
    kit = Kit(lambda: StreamTransport(connect_timeout_s=600))
    async with kit.pair() as (receiver, writer, remote, _), AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(stranger(receiver)) for _ in range(100)]
        async with asyncio.timeout(20):
            for other in silent[:36]:
                assert await other.is_sent_away()
            late = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
            assert await silent[36].is_sent_away()  # its first connection was one more, its second one no more
            await writer.write(late, [receiver.slice(b"late", 0)])
            await writer.write(remote, [receiver.slice(b"fine", 4)])  # who has said the token is none of them
        assert receiver.holds(b"latefine", 0)
        assert len(receiving(receiver)._greeting) == 63 and len(receiving(receiver).wires) == 63 + 4
        for other in silent[37:]:
            other.writer.write(hello(receiver))
            await other.hear()  # it was left alone


async def test_a_burst_of_strangers_is_ended_before_it_is_served(no_leaks: None) -> None:
    """The loop accepts many in one turn, and says only later that their connections are made."""
    kit = Kit(lambda: StreamTransport(connect_timeout_s=600))
    async with kit.receiver() as receiver, kit.writer() as (writer, _), AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(stranger(receiver)) for _ in range(100)))
        async with asyncio.timeout(20):
            remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
            await writer.write(remote, [receiver.slice(b"fine", 0)])
        assert receiver.holds(b"fine", 0)
        assert len(receiving(receiver)._greeting) == 63 and len(receiving(receiver).wires) == 63 + 2
