"""Large frames that many links of a server gather at once take turns, and nobody is lost for having to wait."""

from __future__ import annotations

import asyncio

import pytest

from aiodisagg.link import Link, LinkConfig, LinkServer, framing
from aiodisagg.link.room import Room
from aiodisagg.protocol.messages import Message, encode
from tests.link.helpers import SECRET, RawPeer, hello
from tests.link.test_link import large

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
MiB = 1 << 20
FAST = LinkConfig(heartbeat_s=0.05, timeout_s=0.2, max_frame_bytes=5 * MiB)


def test_who_does_not_fit_waits_its_turn() -> None:
    room, let_in = Room(10), list[str]()

    def enter(who: str, size: int) -> bool:
        return room.enter(who, size, lambda: let_in.append(who))

    assert enter("a", 6) and enter("b", 4)
    assert not enter("c", 30) and not enter("d", 1), "d would fit, and is not first"
    room.leave("a")
    assert let_in == []
    room.leave("b")
    assert let_in == ["c"], "more than there is room for, and alone"
    assert not enter("e", 2)
    room.leave("d")
    room.leave("c")
    room.leave("c")
    assert let_in == ["c", "e"] and enter("f", 8)


class Serving:
    def __init__(self, address: str) -> None:
        self.heard: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self.linked: asyncio.Queue[Link] = asyncio.Queue()
        self.server = LinkServer(address, lambda: hello("server"), on_link=self._serve, secret=SECRET, config=FAST)

    async def _serve(self, link: Link) -> None:
        self.linked.put_nowait(link)
        await link.deliver(lambda message: self.heard.put_nowait((link.remote.name, message)))

    async def raw(self, name: str) -> tuple[RawPeer, Link]:
        peer = await RawPeer.connect(self.server)
        await peer.shake_hands(name=name)
        return peer, await self.linked.get()


async def pings(*peers: RawPeer, count: int) -> None:
    """So many heartbeats of the server pass."""
    for _ in range(count):
        for peer in peers:
            await peer.until(framing.PING)


async def test_large_frames_of_many_peers_take_turns_and_who_waits_is_not_lost(address: str) -> None:
    """Each took its size at once: two hundred videos of 50 MB took 10 GB."""
    message, serving = large(4 * MiB), Serving(address)
    frame = framing.frame(framing.MESSAGE, encode(message))
    async with serving.server, asyncio.timeout(60):
        (a, of_a), (b, of_b) = [await serving.raw(name) for name in "ab"]
        a.writer.write(frame[: 2 * MiB])
        while of_a.bytes_received < 2 * MiB:
            await pings(a, count=1)
        b.writer.write(frame)
        for at in range(12):  # three times what a silent peer is given
            a.writer.write(frame[2 * MiB + at : 2 * MiB + at + 1])
            await pings(a, b, count=1)
        assert of_b.bytes_received < MiB and not of_b.closed, "what was read when its header came"
        assert serving.heard.empty()
        a.writer.write(frame[2 * MiB + 12 :])
        assert [await serving.heard.get() for _ in range(2)] == [("a", message), ("b", message)]
        for peer in (a, b):
            await peer.aclose()


async def test_who_is_lost_in_mid_frame_makes_room(address: str) -> None:
    message, serving = large(4 * MiB), Serving(address)
    frame = framing.frame(framing.MESSAGE, encode(message))
    async with serving.server, asyncio.timeout(60):
        (a, of_a), (b, _) = [await serving.raw(name) for name in "ab"]
        a.writer.write(frame[:MiB])
        while of_a.bytes_received < MiB:
            await pings(a, count=1)
        b.writer.write(frame)
        assert await serving.heard.get() == ("b", message), "a said nothing more"
        assert of_a.closed
        for peer in (a, b):
            await peer.aclose()
