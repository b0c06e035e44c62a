"""Dialling that is given up, or begins at an address that swallows everything."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from aiodisagg.errors import LinkError
from aiodisagg.link import link as link_module
from aiodisagg.link.config import LinkConfig
from aiodisagg.link.connection import Connection
from aiodisagg.link.link import dial
from tests.link.helpers import SECRET, hello
from tests.link.test_link_server import serve

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

PATIENCE_S = 20.0


def cancelling(kind: Any, task: Callable[[], asyncio.Task[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The task is cancelled in the very turn in which its connection is made."""
    made = kind.connection_made

    def connection_made(self: Any, transport: asyncio.BaseTransport) -> None:
        made(self, transport)
        if not task().done():
            task().cancel()

    monkeypatch.setattr(kind, "connection_made", connection_made)


@pytest.mark.parametrize("address", ["tcp:127.0.0.1:0", "unix:"])
async def test_a_dial_that_is_cancelled_as_its_connection_is_made_ends(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On uvloop it waited for ever for the end of a connection that was told of none."""
    async with serve(address) as server:
        task = asyncio.create_task(dial(server.address, hello(), secret=SECRET))
        cancelling(Connection, lambda: task, monkeypatch)
        done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
        assert done and task.cancelled()


async def test_an_address_that_swallows_everything_does_not_keep_the_next_from_being_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A host name with two addresses, of which the first one's network drops what is sent."""
    async with serve("tcp:127.0.0.1:0") as server:
        full = socket.create_server(("127.0.0.2", server_port := int(server.address.rpartition(":")[2])), backlog=0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:  # they fill the queue: the next one's first packet is dropped
            one.setblocking(False)
            one.connect_ex(("127.0.0.2", server_port))

        async def resolve(target: Any) -> list[str]:
            return ["127.0.0.2", "127.0.0.1"]

        monkeypatch.setattr(link_module, "resolve", resolve)
        config = LinkConfig(handshake_timeout_s=5.0)
        made = await dial(server.address, hello(), secret=SECRET, config=config)
        await made.aclose()
        for one in (*waiting, full):
            one.close()


async def test_nobody_at_any_address_is_still_told_in_time() -> None:
    with pytest.raises(LinkError, match="cannot connect"):
        await dial(
            f"tcp:127.0.0.1:{_closed_port()}", hello(), secret=SECRET, config=LinkConfig(handshake_timeout_s=5.0)
        )


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
