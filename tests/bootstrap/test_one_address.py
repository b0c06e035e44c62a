"""Peers that say they listen at one address: lives of a process follow each other, two processes do not."""

from __future__ import annotations

import aiohttp
import msgspec
import pytest

from aiodisagg.bootstrap.server import BootstrapServer
from tests.bootstrap.test_registry import record

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

ADDRESS = "tcp:172.17.0.2:7001"


async def registered(*names: str) -> None:
    async with BootstrapServer(port=0) as server, aiohttp.ClientSession() as session:
        for name in names:
            one = record(name, address=ADDRESS)
            body = msgspec.json.encode(one)
            async with session.put(f"{server.url}/v1/peers/{one.incarnation}", data=body) as response:
                assert response.status == 200


async def test_two_that_live_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Containers behind a bridge on each of two hosts are both 172.17.0.2: each was registered, pushed out and
    registered again for ever, and no log said a word."""
    await registered(*("one", "two") * 3)
    said = f"one, two take the place of each other again and again: all say that they listen at {ADDRESS} (--listen)"
    assert [line.getMessage() for line in caplog.records] == [said]


async def test_a_process_that_starts_anew_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    await registered("first", "first", "second", "second", "third", "third")
    assert not caplog.records
