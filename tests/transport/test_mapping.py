"""A mapped pool is let go once, and not under a copy."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.conftest import LOOPS
from tests.transport.test_ipc import pair, pool_mappings, still_waits

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]


async def test_the_end_of_a_view_unmaps_nothing_under_a_copy(no_leaks: None) -> None:
    async with pair() as (receiver, writer, remote, name):
        mapped, lease, go_on = len(pool_mappings()), receiver.lender.lend(0, 100), threading.Event()
        view = remote.view(0, 100, lease)
        copying = writer._threads.start(iter((60.0,)), go_on.wait, (lease,))
        remote.track(copying)
        leaving = asyncio.ensure_future(writer.disconnect(remote))
        await asyncio.sleep(0)
        del view
        revoke = asyncio.ensure_future(receiver.transport.revoke(name, [lease]))
        assert await still_waits(revoke) and len(pool_mappings()) == mapped
        go_on.set()
        async with asyncio.timeout(60):
            await leaving
            await revoke
        assert len(pool_mappings()) == mapped - 1


async def test_who_disconnects_twice_closes_no_file_of_others(no_leaks: None) -> None:
    async with pair() as (_, writer, remote, _name):
        for _ in range(2):
            await writer.disconnect(remote)
