"""A server whose entering is given up listens no more."""

from __future__ import annotations

import asyncio

import pytest

from aiodisagg.errors import LinkError
from aiodisagg.link import Link, LinkServer, dial
from tests.link.helpers import SECRET, hello

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


async def nothing(link: Link) -> None:
    await link.wait_closed()


async def test_entering_that_is_cancelled_leaves_no_listener(address: str) -> None:
    """asyncio's loop turns once after it has begun to listen: the socket stayed open, and its file where it was."""
    server = LinkServer(address, lambda: hello("server"), on_link=nothing, secret=SECRET)
    bind = server._bind

    async def bound() -> asyncio.Server:
        made = await bind()
        entering.cancel()
        return made

    async def enter() -> None:
        async with server:
            await asyncio.Event().wait()

    server._bind = bound  # type: ignore[method-assign]
    entering = asyncio.create_task(enter())
    await asyncio.wait([entering])
    assert entering.cancelled()
    with pytest.raises(LinkError):
        await dial(server.address, hello(), secret=SECRET)
