"""Copies on threads: ``done`` means that no thread is inside the memory any more; turns; stops; errors."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aiodisagg.errors import WriteFailed
from aiodisagg.transport.base import Slice
from aiodisagg.transport.copying import CopyThreads, pieces_of, result_of, settle
from tests.conftest import LOOPS

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]


class Stops(Exception):
    pass


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_done_waits_for_the_slowest_thread(no_leaks: None) -> None:
    threads, go_on, others = CopyThreads("test", 2), threading.Event(), threading.Event()
    placed: list[int] = []

    def place(piece: int) -> None:
        if piece == 0:
            go_on.wait(60)
        placed.append(piece)
        if len(placed) == 4:
            others.set()

    copying = threads.start(iter(range(5)), place)
    await asyncio.to_thread(others.wait, 10)  # the other thread has placed all the rest
    await turns()
    assert not copying.done.done()
    go_on.set()
    await copying.done
    assert placed == [1, 2, 3, 4, 0]
    await threads.aclose(Stops())


@pytest.mark.parametrize("how", ["stop", "fail", "cancel", "close"])
async def test_an_end_before_its_time_waits_for_the_piece_under_way(how: str, no_leaks: None) -> None:
    threads, inside, go_on = CopyThreads("test", 1), threading.Event(), threading.Event()
    placed: list[int] = []

    def place(piece: int) -> None:
        inside.set()
        go_on.wait(60)
        if how == "fail":
            raise Stops
        placed.append(piece)

    copying = threads.start(iter(range(5)), place)
    waiting = asyncio.ensure_future(result_of(copying, WriteFailed("test", "cancelled")))
    await asyncio.to_thread(inside.wait, 10)
    closing = None
    if how == "stop":
        copying.stop(Stops())
    elif how == "cancel":
        waiting.cancel()
    elif how == "close":
        closing = asyncio.ensure_future(threads.aclose(Stops()))
    await turns()
    assert not copying.done.done()
    go_on.set()
    await settle([copying])
    assert placed == ([] if how == "fail" else [0])
    with pytest.raises(asyncio.CancelledError if how == "cancel" else Stops):
        await waiting
    if closing is not None:
        await closing
    await threads.aclose(Stops())


async def test_copies_take_turns(no_leaks: None) -> None:
    threads, both_started = CopyThreads("test", 1), threading.Event()
    placed: list[str] = []

    def place(piece: str) -> None:
        both_started.wait(60)
        placed.append(piece)

    one = threads.start(iter("aaa"), place)
    other = threads.start(iter("bbb"), place)
    both_started.set()
    await asyncio.gather(one.done, other.done)
    assert "".join(placed) == "ababab"
    await threads.aclose(Stops())


async def test_nothing_to_copy_is_done_at_once(no_leaks: None) -> None:
    threads = CopyThreads("test", 2)
    await threads.start(iter(()), lambda piece: None).done
    await threads.aclose(Stops())
    await threads.aclose(Stops())


def test_pieces_cover_every_byte_once(anyio_backend: object) -> None:
    source = memoryview(bytes(range(25)))
    pieces = list(pieces_of([Slice(source[:0], 3, 1), Slice(source[:10], 100, 2), Slice(source[10:], 500, 3)], 10))
    assert [(bytes(one.source), one.offset, one.lease) for one in pieces] == [
        (bytes(range(10)), 100, 2),
        (bytes(range(10, 20)), 500, 3),
        (bytes(range(20, 25)), 510, 3),
    ]
