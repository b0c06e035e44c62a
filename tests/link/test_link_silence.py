"""Links whose other side says nothing, does not read, or is slower than this one: who is lost, and who is not."""

from __future__ import annotations

import asyncio

import pytest

from aiodisagg.errors import LinkClosed
from aiodisagg.link import LinkConfig, framing
from aiodisagg.link.pulse import Beat, Pulse
from tests.link.helpers import FAST, PATIENT, RawPeer, large, linked, listening, stuck, word

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


def beats(count: int, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once links have looked at their silence so many times from now on."""
    seen, enough = 0, asyncio.Event()
    real = Pulse.tick

    def tick(pulse: Pulse, *, heard: bool, said: bool, reading: bool) -> Beat:
        nonlocal seen
        seen += 1
        if seen >= count:
            enough.set()
        return real(pulse, heard=heard, said=said, reading=reading)

    monkeypatch.setattr(Pulse, "tick", tick)
    return enough


async def test_a_silent_peer_is_given_up_and_told_so(address: str) -> None:
    async with listening(address, FAST) as listener:
        raw = await RawPeer.connect(listener.server)
        await raw.shake_hands()
        link = await listener.accepted.get()
        with pytest.raises(LinkClosed, match=r"nothing was heard for 0\.06 s"):
            await link.recv()
        assert b"nothing was heard" in await raw.until(framing.BYE)
        await raw.aclose()


async def test_an_idle_link_lives_on_pongs(address: str) -> None:
    async with listening(address, FAST) as listener:
        raw = await RawPeer.connect(listener.server)
        await raw.shake_hands()
        link = await listener.accepted.get()
        for _ in range(15):  # five timeouts
            await raw.until(framing.PING)
            raw.writer.write(framing.frame(framing.PONG))
        assert not link.closed
        await raw.aclose()


async def test_pings_are_answered_while_the_application_takes_nothing(address: str) -> None:
    async with listening(address, PATIENT) as listener:
        raw = await RawPeer.connect(listener.server)
        await raw.shake_hands()
        link = await listener.accepted.get()
        for number in range(100):
            raw.say(word(number))
        raw.writer.write(framing.frame(framing.PING))
        await raw.until(framing.PONG)
        assert [await link.recv() for _ in range(100)] == [word(n) for n in range(100)]
        await raw.aclose()


async def test_a_side_whose_queue_is_full_still_beats_and_does_not_blame_its_peer(address: str) -> None:
    config = LinkConfig(heartbeat_s=0.02, timeout_s=0.06, max_queued_messages=4)
    async with listening(address, config) as listener:
        raw = await RawPeer.connect(listener.server)
        await raw.shake_hands()
        link = await listener.accepted.get()
        for number in range(4):
            raw.say(word(number))
        for _ in range(15):
            await raw.until(framing.PING)
        assert not link.closed
        assert [await link.recv() for _ in range(4)] == [word(n) for n in range(4)]
        # It reads again: now silence counts.
        with pytest.raises(LinkClosed, match="nothing was heard"):
            await link.recv()
        await raw.aclose()


async def test_the_bytes_of_a_large_frame_count_as_life(address: str) -> None:
    async with listening(address, FAST) as listener:
        raw = await RawPeer.connect(listener.server)
        await raw.shake_hands()
        link = await listener.accepted.get()
        raw.writer.write(framing.header(framing.MESSAGE, 1 << 20))
        for _ in range(15):
            await raw.until(framing.PING)
            raw.writer.write(b"x")
        assert not link.closed
        await raw.aclose()


async def test_a_peer_that_lives_and_does_not_read_is_not_lost(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After twice the timeout the kernel ended the connection: to it a closed window is like a host that vanished."""
    busy = LinkConfig(heartbeat_s=0.02, timeout_s=0.06, max_queued_messages=4, high_water_bytes=64 << 10)
    async with linked(address, busy) as (near, far):
        task, _ = await stuck(near)
        # Of both sides: two seconds over TCP, where the kernel looks twice in the first of them.
        enough = beats(200 if address.startswith("tcp") else 20, monkeypatch)
        waiting = asyncio.create_task(enough.wait())
        await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
        assert not task.done() and not near.closed and not far.closed
        assert await far.recv() == large(64 << 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_two_sides_of_unlike_heartbeats_keep_each_other_alive(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = LinkConfig(heartbeat_s=30.0, timeout_s=60.0)
    enough = beats(15, monkeypatch)  # five timeouts of the fast side; the slow one never ticks
    async with linked(address, FAST, slow) as (near, far):
        await enough.wait()
        assert not near.closed
        assert not far.closed
