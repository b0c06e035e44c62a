"""Messages that are handed to a function where the socket is read, instead of waking a task."""

from __future__ import annotations

import asyncio

import pytest

from aiodisagg.errors import LinkClosed
from aiodisagg.protocol.messages import Message
from tests.link.helpers import linked, word

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Heard:
    """A handler that notes what it got, and refuses ``bad``."""

    def __init__(self, count: int, bad: Message | None = None) -> None:
        self.messages: list[Message] = []
        self.all: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count, self._bad = count, bad

    def __call__(self, message: Message) -> None:
        if message == self._bad:
            raise ZeroDivisionError("a bug of the handler")
        self.messages.append(message)
        if len(self.messages) == self._count:
            self.all.set_result(None)


async def test_what_had_come_and_what_comes_is_delivered_in_order_up_to_the_end(address: str) -> None:
    async with linked(address) as (near, far):
        said = [word(n) for n in range(2000)]
        for message in said[:1000]:
            near.send_nowait(message)
        first = await far.recv()  # the others of its read are queued now
        heard = Heard(1998)
        delivering = asyncio.ensure_future(far.deliver(heard))
        for message in said[1000:-1]:
            await near.send(message)
        await heard.all
        near.send_nowait(said[-1])
        await near.aclose()
        with pytest.raises(LinkClosed, match="closed by the peer"):
            await delivering
        assert [first, *heard.messages] == said
        with pytest.raises(LinkClosed, match="closed by the peer"):
            await far.deliver(heard)


async def test_a_handler_may_answer_on_the_spot(address: str) -> None:
    async with linked(address) as (near, far):
        answering = asyncio.ensure_future(far.deliver(far.send_nowait))
        for n in range(100):
            near.send_nowait(word(n))
        assert [await near.recv() for _ in range(100)] == [word(n) for n in range(100)]
        answering.cancel()
        await asyncio.wait([answering])


async def test_a_handlers_error_ends_the_delivery_and_loses_no_later_message(address: str) -> None:
    async with linked(address) as (near, far):
        heard = Heard(3, bad=word(3))
        delivering = asyncio.ensure_future(far.deliver(heard))
        await asyncio.sleep(0)
        for n in range(6):
            near.send_nowait(word(n))
        with pytest.raises(ZeroDivisionError):
            await delivering
        assert heard.messages == [word(n) for n in range(3)]
        assert [await far.recv() for _ in range(2)] == [word(4), word(5)]
        far.send_nowait(word(9))
        assert await near.recv() == word(9)  # the link lives


async def test_a_cancelled_delivery_loses_nothing(address: str) -> None:
    async with linked(address) as (near, far):
        heard = Heard(1)
        delivering = asyncio.ensure_future(far.deliver(heard))
        near.send_nowait(word(0))
        await heard.all
        delivering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await delivering
        for n in range(1, 4):
            near.send_nowait(word(n))
        assert [await far.recv() for _ in range(3)] == [word(n) for n in range(1, 4)]
        assert heard.messages == [word(0)]


async def test_a_link_is_received_from_in_one_way_at_a_time(address: str) -> None:
    async with linked(address) as (near, far):
        delivering = asyncio.ensure_future(far.deliver(Heard(1)))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="already receives"):
            await far.recv()
        with pytest.raises(RuntimeError, match="already receives"):
            await far.deliver(Heard(1))
        await near.aclose()
        with pytest.raises(LinkClosed):
            await delivering
