"""A writer that has fenced itself is not asked: only copies that this process is in the middle of are waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from aiodisagg.peer.planes import Planes
from aiodisagg.protocol.incoming import NOBODY
from aiodisagg.transport.base import Transport
from aiodisagg.transport.ipc import IpcTransport
from aiodisagg.transport.zmq import ZmqTransport

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Plane:
    """Answers when ``over``."""

    def __init__(self, kind: type[Transport]) -> None:
        self.capabilities = kind.capabilities
        self.over = asyncio.Event()
        self.asked: list[tuple[str, tuple[int, ...]]] = []

    async def revoke(self, peer: str, leases: Sequence[int]) -> None:
        self.asked.append((peer, tuple(leases)))
        await self.over.wait()


async def test_only_planes_whose_receiving_side_places_bytes_are_asked() -> None:
    planes, ipc, zmq = Planes(("ipc", "zmq"), "127.0.0.1"), Plane(IpcTransport), Plane(ZmqTransport)
    planes.open_transports.update(cast(Any, {"ipc": ipc, "zmq": zmq}))
    revoke = asyncio.create_task(planes.revoke(NOBODY, (1, 2)))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not revoke.done() and zmq.asked == [("", (1, 2))]
    zmq.over.set()
    async with asyncio.timeout(30):
        await revoke
    assert not ipc.asked and not planes._watches, "nobody is waited for, so nobody is named"
    whole = asyncio.create_task(planes.revoke("A", (3,)))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not whole.done() and ipc.asked == zmq.asked[1:] == [("A", (3,))]
    ipc.over.set()
    async with asyncio.timeout(30):
        await whole
