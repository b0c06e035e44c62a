"""How many writes words take: each is a system call and wakes the peer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from aiodisagg.link.gather import MOST_BYTES, Gather
from aiodisagg.protocol.messages import Message
from tests.link.helpers import linked, word

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


async def next_turn() -> None:
    """Two of them: in which of the two the end of this one comes is the loop's business."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def gathered() -> tuple[Gather, list[bytes]]:
    written: list[bytes] = []
    gather = Gather()
    gather.open(written.append)
    return gather, written


async def test_the_first_word_of_a_turn_leaves_at_once_and_the_others_together() -> None:
    gather, written = gathered()
    for data in (b"a", b"b", b"c"):
        gather.put(data)
    assert written == [b"a"]
    await next_turn()
    assert written == [b"a", b"bc"]
    gather.put(b"d")
    assert written == [b"a", b"bc", b"d"]


async def test_what_is_held_waits_for_its_release_and_never_is_much() -> None:
    gather, written = gathered()
    gather.hold()
    for _ in range(MOST_BYTES + 10):
        gather.put(b"x")
    assert written == [b"x" * MOST_BYTES]
    gather.release()
    assert written == [b"x" * MOST_BYTES, b"x" * 10]


async def test_large_words_keep_their_place() -> None:
    gather, written = gathered()
    gather.hold()
    gather.put(b"a")
    gather.put(large := b"x" * MOST_BYTES)
    gather.put(b"b")
    gather.release()
    assert written == [b"a", large, b"b"]


async def test_nothing_is_written_to_a_socket_that_is_gone() -> None:
    gather, written = gathered()
    gather.put(b"a")
    gather.put(b"b")
    gather.drop()
    await next_turn()
    assert written == [b"a"]


class Counted:
    """What a connection's transport is asked to write."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.writes, self._write = 0, write

    def __call__(self, data: bytes) -> None:
        self.writes += 1
        self._write(data)


async def test_answers_to_what_came_in_one_read_leave_in_one_write(address: str) -> None:
    async with linked(address) as (near, far):
        connection = far._connection
        transport = connection._transport
        assert transport is not None
        counted = Counted(transport.write)
        connection._gather.open(counted)
        all_here: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answers: list[Message] = []

        def hear(message: Message) -> None:
            answers.append(message)
            if len(answers) == 20:
                all_here.set_result(None)

        delivering = asyncio.ensure_future(near.deliver(hear))
        await next_turn()
        answering = asyncio.ensure_future(far.deliver(far.send_nowait))
        await next_turn()
        for n in range(20):
            near.send_nowait(word(n))
        await all_here
        assert answers == [word(n) for n in range(20)]
        assert counted.writes <= 2, "the first word comes by itself, all others together"
        for task in (delivering, answering):
            task.cancel()
        await asyncio.wait([delivering, answering])
