"""A connection that is given up while it is made."""

from __future__ import annotations

import asyncio

import pytest

from aiodisagg.transport import stream_line
from aiodisagg.transport.stream import StreamTransport
from aiodisagg.transport.testing import Kit
from aiodisagg.transport.wire import Wire
from tests.conftest import LOOPS

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]

PATIENCE_S = 20.0


async def test_connecting_that_is_cancelled_as_a_connection_is_made_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On uvloop it waited for ever for the end of a connection that was told of none."""
    async with Kit(StreamTransport).pair() as (receiver, sender, _, _name):
        task: asyncio.Task[object]
        made = Wire.connection_made

        class Ours(Wire):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                made(self, transport)
                task.cancel()

        monkeypatch.setattr(stream_line, "Wire", Ours)
        task = asyncio.ensure_future(sender.connect(receiver.transport.describe(), peer=receiver.incarnation))
        done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
        assert done and task.cancelled()
