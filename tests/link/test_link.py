"""Links between two peers: order, size, back-pressure, and every way to end."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from aiodisagg.errors import LinkClosed, LinkError, MessageTooLarge, RemoteProtocolError
from aiodisagg.link import Link, LinkConfig, PeerRole, dial, framing
from aiodisagg.protocol.messages import Message
from tests.link.helpers import SECRET, RawPeer, commit, hello, large, linked, listening, stuck, text, word

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


async def test_both_sides_know_each_other(address: str) -> None:
    async with linked(address) as (near, far):
        assert (near.remote, near.local) == (far.local, far.remote)
        assert near.far_host == far.far_host == ("127.0.0.1" if address.startswith("tcp:") else "")
        assert near.remote.role is PeerRole.ENCODE
        assert near.remote.transports == {"memory": b"\x00pool"}
        assert "dialler - server (server-life) open" in repr(near)


async def test_messages_arrive_once_and_in_order_both_ways(address: str) -> None:
    said: list[Message] = [commit(n) if n % 3 else text(4000) for n in range(3000)]
    async with linked(address) as (near, far):

        async def talk(link: Link) -> None:
            for number, message in enumerate(said):
                if number % 5:
                    await link.send(message)
                else:
                    link.send_nowait(message)

        async def listen(link: Link) -> list[Message]:
            return [await link.recv() for _ in said]

        async with asyncio.TaskGroup() as group:
            heard = [group.create_task(listen(link)) for link in (near, far)]
            for link in (near, far):
                group.create_task(talk(link))
        assert heard[0].result() == said
        assert heard[1].result() == said


async def test_a_message_of_tens_of_mebibytes(address: str) -> None:
    message = large(40 << 20)
    async with linked(address) as (near, far):
        async with asyncio.TaskGroup() as group:
            group.create_task(near.send(message))
            heard = group.create_task(far.recv())
        assert heard.result() == message
        await far.send(word(1))
        assert await near.recv() == word(1)


async def test_a_message_above_the_limit_is_refused_here_and_the_link_goes_on(address: str) -> None:
    async with linked(address, LinkConfig(max_frame_bytes=1 << 20)) as (near, far):
        with pytest.raises(LinkError, match="does not fit"):
            await near.send(large(1 << 20))
        with pytest.raises(LinkError, match="does not fit"):
            near.send_nowait(large(1 << 20))
        await near.send(word(2))
        assert await far.recv() == word(2)


async def test_who_dials_takes_no_large_frame(address: str) -> None:
    """What an encode peer says is small: one that says more is not to fill a language peer's memory."""
    async with linked(address) as (near, far):
        for far_send in (far.send(large(1 << 20)), far.send(large(4 << 20))):
            with pytest.raises(MessageTooLarge) as caught:
                await far_send
            assert caught.value.limit_bytes == 1 << 20
        await near.send(large(4 << 20))
        assert await far.recv() == large(4 << 20)


# -- back-pressure ----------------------------------------------------------------------------------------------

SMALL_QUEUES = LinkConfig(max_queued_messages=4, high_water_bytes=64 << 10)


async def test_what_the_other_side_does_not_accept_is_not_sent(address: str) -> None:
    """It was sent, and the other side closed the link."""
    small = LinkConfig(max_frame_bytes=1 << 19)
    for here, there in ((LinkConfig(), small), (small, LinkConfig())):
        async with linked(address, there, here) as links:
            for link in links:
                with pytest.raises(MessageTooLarge) as caught:
                    await link.send(large(1 << 19))
                assert caught.value.limit_bytes == 1 << 19 < caught.value.size_bytes
                await link.send(word(2))
            assert [await link.recv() for link in links] == [word(2)] * 2


async def test_send_waits_for_a_peer_that_does_not_receive_and_nothing_is_lost(address: str) -> None:
    async with linked(address, SMALL_QUEUES) as (near, far):
        task, sent = await stuck(near)
        held = sent[0]
        assert not task.done()
        # Bounded: two kernel buffers, a queue and a high-water mark, not everything that wanted to leave.
        assert held < 300
        while sent[0] < held + 50:
            assert await far.recv() == large(64 << 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_cancelled_send_that_waited_is_not_sent(address: str) -> None:
    async with linked(address, SMALL_QUEUES) as (near, far):
        task, sent = await stuck(near)
        waiting = asyncio.create_task(near.send(word(1)))
        near.send_nowait(word(2))
        await asyncio.sleep(0)
        for one in (task, waiting):
            one.cancel()
        await asyncio.wait({task, waiting})
        heard = [await far.recv() for _ in range(sent[0] + 1)]
        assert heard[-1] == word(2)
        assert word(1) not in heard


async def test_send_nowait_keeps_its_place_behind_sends_that_wait(address: str) -> None:
    async with linked(address, SMALL_QUEUES) as (near, far):
        task, sent = await stuck(near)
        task.cancel()
        await asyncio.wait({task})
        waiting = asyncio.create_task(near.send(word(1)))
        await asyncio.sleep(0)
        near.send_nowait(word(2))
        heard = [await far.recv() for _ in range(sent[0] + 2)]
        await waiting
        assert heard[-2:] == [word(1), word(2)]


async def test_send_nowait_is_bounded(address: str) -> None:
    bounded = LinkConfig(max_queued_messages=4, high_water_bytes=64 << 10, max_unsent_bytes=100_000)
    async with linked(address, bounded) as (near, _far):
        task, _sent = await stuck(near)
        with pytest.raises(LinkClosed, match="does not read"):
            for _ in range(1000):
                near.send_nowait(text(4000))
        with pytest.raises(LinkClosed, match="does not read"):
            await task


async def test_a_cancelled_recv_loses_nothing(address: str) -> None:
    async with linked(address) as (near, far):
        for number in range(20):
            waiting = asyncio.create_task(far.recv())
            await asyncio.sleep(0)
            near.send_nowait(word(number))
            await asyncio.sleep(0)
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await waiting == word(number)
                continue
            assert await far.recv() == word(number)


async def test_only_one_task_receives(address: str) -> None:
    async with linked(address) as (near, far):
        first = asyncio.create_task(far.recv())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError):
            await far.recv()
        await near.send(word(1))
        assert await first == word(1)


# -- the end ----------------------------------------------------------------------------------------------------


async def test_what_was_sent_before_a_close_can_still_be_received(address: str) -> None:
    async with linked(address) as (near, far):
        for number in range(10):
            await near.send(word(number))
        await near.aclose()
        await far.wait_closed()
        assert [await far.recv() for _ in range(10)] == [word(n) for n in range(10)]
        with pytest.raises(LinkClosed, match=r"closed by the peer$"):
            await far.recv()
        with pytest.raises(LinkClosed):
            await far.send(word(1))
        with pytest.raises(LinkClosed):
            far.send_nowait(word(1))


async def test_close_while_others_wait_in_send_and_recv(address: str) -> None:
    config = LinkConfig(max_queued_messages=4, high_water_bytes=64 << 10, close_timeout_s=0.01)
    async with linked(address, config) as (near, far):
        sender, _ = await stuck(near)
        receiver = asyncio.create_task(near.recv())
        await asyncio.sleep(0)
        await near.aclose()
        for task in (sender, receiver):
            with pytest.raises(LinkClosed, match="closed here"):
                await task
        assert near.closed
        await far.aclose()


async def test_aclose_is_idempotent_and_survives_cancellation(address: str) -> None:
    async with linked(address) as (near, far):
        closing = asyncio.create_task(near.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait({closing})
        await near.wait_closed()
        await near.aclose()
        with pytest.raises(LinkClosed):
            await far.recv()


async def test_a_peer_that_vanishes_is_noticed_at_once(address: str) -> None:
    async with listening(address) as listener:
        raw = await RawPeer.connect(listener.server)
        await raw.shake_hands()
        link = await listener.accepted.get()
        raw.say(word(1))
        await raw.aclose()
        assert await link.recv() == word(1)
        with pytest.raises(LinkClosed, match=r"raw \(raw-life\)"):
            await link.recv()


@pytest.mark.parametrize(
    "junk",
    [framing.frame(framing.MESSAGE, b"\xff\xff"), framing.frame(framing.HELLO, b"again"), b"GET / HTTP/1.1\r\n\r\n"],
    ids=["payload", "kind", "length"],
)
async def test_garbage_closes_that_link_only(address: str, junk: bytes) -> None:
    async with listening(address) as listener:
        good = await dial(listener.server.address, hello("good"), secret=SECRET)
        far = await listener.accepted.get()
        raw = await RawPeer.connect(listener.server)
        await raw.shake_hands()
        bad = await listener.accepted.get()
        raw.writer.write(junk)
        with pytest.raises(LinkClosed) as caught:
            await bad.recv()
        assert isinstance(caught.value.__cause__, RemoteProtocolError)
        assert b"protocol" in await raw.until(framing.BYE)
        await raw.aclose()
        await good.send(word(5))
        assert await far.recv() == word(5)
        await good.aclose()
