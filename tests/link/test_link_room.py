"""Large frames that many links of a server gather at once take turns, and nobody is lost for having to wait."""

from __future__ import annotations

import asyncio

import pytest

from aiodisagg.link import Link, LinkConfig, LinkServer, framing
from aiodisagg.link.room import Place, Room
from aiodisagg.protocol.messages import Message, encode
from tests.link.helpers import SECRET, RawPeer, hello, large

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
MiB = 1 << 20
STEP = 8 << 10
"""In each heartbeat: the pace of 4 MiB in 26 s."""
FAST = LinkConfig(heartbeat_s=0.05, timeout_s=0.2, max_frame_bytes=5 * MiB)


class Entering:
    def __init__(self, size: int) -> None:
        self.room, self.let_in = Room(size), list[str]()

    def __call__(self, who: str, size: int) -> bool:
        return self.room.enter(who, size, lambda: self.let_in.append(who))


def test_who_does_not_fit_waits() -> None:
    enter = Entering(10)
    assert enter("a", 6) and enter("b", 4)
    assert not enter("c", 30) and not enter("d", 7)
    enter.room.leave("a")
    assert enter.let_in == []
    enter.room.leave("b")
    assert enter.let_in == ["c"], "more than there is room for, and alone"
    assert not enter("e", 2)
    enter.room.leave("d")
    enter.room.leave("c")
    enter.room.leave("c")
    assert enter.let_in == ["c", "e"] and enter("f", 8)


def test_who_fits_passes_the_first_in_line_until_as_much_as_there_is_room_did() -> None:
    enter = Entering(10)
    assert enter("slow", 5) and not enter("first", 6)
    for number in range(5):
        assert enter(f"small {number}", 2), "a frame that fits"
        enter.room.leave(f"small {number}")
    assert not enter("late", 2)
    enter.room.leave("slow")
    assert enter.let_in == ["first", "late"], "in order, and both fit"


def test_who_sent_much_and_then_little_does_not_keep_pace() -> None:
    room = Room(10 * MiB)
    inside, waiting = Place(room, lambda: None), Place(room, lambda: None)
    inside.gather(8 * MiB)
    assert inside.beat(4 * MiB, 1.0) and inside.beat(4 * MiB, 1.0), "nobody waits"
    waiting.gather(8 * MiB)
    assert inside.beat(5 * MiB, 1.0)
    assert not inside.beat(5 * MiB + 1, 1.0)


class Serving:
    def __init__(self, address: str, config: LinkConfig = FAST) -> None:
        self.heard: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self.linked: asyncio.Queue[Link] = asyncio.Queue()
        self.server = LinkServer(address, lambda: hello("server"), on_link=self._serve, secret=SECRET, config=config)

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
            a.writer.write(frame[2 * MiB + at * STEP : 2 * MiB + (at + 1) * STEP])
            await pings(a, b, count=1)
        assert of_b.bytes_received < 2 * MiB and not of_b.closed, "what was read when its header came, and now and then"
        assert serving.heard.empty()
        a.writer.write(frame[2 * MiB + 12 * STEP :])
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


async def beats(peer: RawPeer) -> int:
    """How many heartbeats pass until the server gives this peer up."""
    count = 0
    while (kind := (await peer.frame())[0]) != framing.BYE:
        count += kind == framing.PING
    return count


async def test_who_sends_byte_by_byte_is_lost_while_others_wait(address: str) -> None:
    """A byte was a sign of life, and so the room was taken for as long as one came now and then."""
    message, serving = large(4 * MiB), Serving(address)
    frame = framing.frame(framing.MESSAGE, encode(message))
    async with serving.server, asyncio.timeout(60):
        a, of_a = await serving.raw("a")
        for at in range(12):
            a.writer.write(frame[at : at + 1])
            await pings(a, count=1)
        assert not of_a.closed, "as slowly as it likes while nobody waits"
        b, _ = await serving.raw("b")
        b.writer.write(frame)
        at = 12
        while not of_a.closed:
            a.writer.write(frame[at : at + 1])
            at += 1
            await pings(b, count=1)
        assert "too slowly while others wait" in repr(of_a)
        assert await serving.heard.get() == ("b", message)
        for peer in (a, b):
            await peer.aclose()


async def test_a_frame_that_fits_does_not_wait_behind_one_that_does_not(address: str) -> None:
    patient = LinkConfig(heartbeat_s=0.05, timeout_s=60.0, max_frame_bytes=5 * MiB)
    half, whole, serving = large(2 * MiB), large(4 * MiB), Serving(address, patient)
    frame = framing.frame(framing.MESSAGE, encode(whole))
    async with serving.server, asyncio.timeout(60):
        (a, of_a), (b, of_b), (c, _) = [await serving.raw(name) for name in "abc"]
        a.writer.write(framing.frame(framing.MESSAGE, encode(half))[:-1])
        while of_a.bytes_received < 2 * MiB:
            await pings(a, count=1)
        before = of_b.bytes_received
        b.writer.write(frame)
        while of_b.bytes_received == before:
            await pings(b, count=1)
        c.say(half)
        assert await serving.heard.get() == ("c", half)
        a.writer.write(framing.frame(framing.MESSAGE, encode(half))[-1:])
        assert [await serving.heard.get() for _ in range(2)] == [("a", half), ("b", whole)]
        for peer in (a, b, c):
            await peer.aclose()


async def test_links_that_are_silent_while_they_wait_end_at_once_and_not_one_after_another(address: str) -> None:
    serving = Serving(address)
    frame = framing.frame(framing.MESSAGE, encode(large(4 * MiB)))
    async with serving.server, asyncio.timeout(60):
        silent = [(await serving.raw(name))[0] for name in "abcde"]
        for peer in silent:
            peer.writer.write(frame[:1000])
        counts = await asyncio.gather(*map(beats, silent))
        assert max(counts) < 8, "four, and one or two until the first silent one"
        for peer in silent:
            await peer.aclose()


async def test_who_dies_while_it_waits_is_lost_before_its_turn(address: str) -> None:
    serving = Serving(address)
    frame = framing.frame(framing.MESSAGE, encode(large(4 * MiB)))
    async with serving.server, asyncio.timeout(60):
        a, of_a = await serving.raw("a")
        a.writer.write(frame[: 2 * MiB])
        while of_a.bytes_received < 2 * MiB:
            await pings(a, count=1)
        b, of_b = await serving.raw("b")
        b.writer.write(frame[: 600 << 10])
        at = 2 * MiB
        while not of_b.closed:
            a.writer.write(frame[at : at + STEP])
            at += STEP
            await pings(a, count=1)
        assert "nothing was heard" in repr(of_b) and not of_a.closed
        for peer in (a, b):
            await peer.aclose()
