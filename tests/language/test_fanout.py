"""Rows of one digest, fetched once or twice, for many; chunks come on threads and sharers at any moment."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from typing import Any

import numpy as np
import pytest

from aiodisagg.device.copies import DeviceBytes
from aiodisagg.errors import DeviceError
from aiodisagg.language.fanout import Data, FanOut
from aiodisagg.protocol.messages import ItemKey

pytestmark = pytest.mark.anyio
A, B = ItemKey(1, 0), ItemKey(2, 0)
ROW = 4
ROWS = np.arange(10 * ROW, dtype=np.uint8)


class Taken:
    """What was delivered, by key; ``times``: how often each row was."""

    def __init__(self) -> None:
        self.rows = {key: np.zeros(10 * ROW, np.uint8) for key in (A, B)}
        self.times = {key: np.zeros(10, int) for key in (A, B)}

    def __call__(self, key: ItemKey, start: int, data: Data) -> None:
        raw = ctypes.string_at(data.address, data.size_bytes) if isinstance(data, DeviceBytes) else data
        stop = start + len(raw) // ROW
        self.rows[key][start * ROW : stop * ROW] = np.frombuffer(raw, np.uint8)
        self.times[key][start:stop] += 1

    def whole(self, key: ItemKey) -> bool:
        return bool((self.rows[key] == ROWS).all() and (self.times[key] == 1).all())


class Device:
    """An accelerator whose memory is the host's; its copies to the host fail ``failures`` times."""

    def __init__(self, failures: int) -> None:
        self.failures, self.outward = failures, self

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        if self.failures:
            self.failures -= 1
            raise DeviceError("the copy failed")
        ctypes.memmove(target, source, size_bytes)


def chunk(start: int, stop: int) -> memoryview:
    return memoryview(ROWS[start * ROW : stop * ROW].tobytes())


def on_device(start: int, stop: int) -> DeviceBytes:
    rows = ROWS[start * ROW : stop * ROW].copy()
    return DeviceBytes(rows.ctypes.data, rows.nbytes, rows)


async def test_who_joins_late_gets_what_came_before_and_what_comes() -> None:
    taken = Taken()
    fan = FanOut(10, ROW, taken, keeps=True, accelerator=None)
    assert fan.share(A) == ()
    fan.deliver(0, chunk(0, 3))
    fan.deliver(7, chunk(7, 9))
    owed = fan.share(B)
    assert owed == ((0, 3), (7, 9))
    fan.deliver(3, chunk(3, 7))
    fan.deliver(9, chunk(9, 10))
    assert taken.whole(A) and not fan.complete, "the one that joined is owed something"
    fan.catch_up(B, owed)
    assert taken.whole(B) and fan.complete
    kept = fan.kept()
    assert kept is not None and (kept == ROWS).all()


async def test_a_second_fetch_brings_only_what_the_first_did_not() -> None:
    taken = Taken()
    fan = FanOut(10, ROW, taken, keeps=False, accelerator=None)
    fan.share(A)
    for start, stop in ((0, 4), (0, 2), (6, 8), (3, 9), (0, 10)):
        fan.deliver(start, chunk(start, stop))
    assert taken.whole(A) and fan.complete and fan.here == 10


async def test_who_left_gets_nothing_more() -> None:
    taken = Taken()
    fan = FanOut(10, ROW, taken, keeps=True, accelerator=None)
    fan.share(A)
    fan.share(B)
    fan.deliver(0, chunk(0, 4))
    fan.leave(A)
    fan.deliver(4, chunk(4, 10))
    assert taken.whole(B) and taken.times[A].tolist() == [1] * 4 + [0] * 6


async def test_rows_that_could_not_be_kept_come_again() -> None:
    taken, device = Taken(), Device(failures=1)
    fan = FanOut(10, ROW, taken, keeps=True, accelerator=device)  # type: ignore[arg-type]
    fan.share(A)
    fan.deliver(0, chunk(0, 4))
    with pytest.raises(DeviceError):
        fan.deliver(4, on_device(4, 10))
    assert not fan.complete and fan.here == 4
    fan.deliver(4, on_device(4, 10))
    kept = fan.kept()
    assert kept is not None and (kept == ROWS).all() and (taken.rows[A] == ROWS).all() and fan.complete


async def test_what_was_not_kept_of_a_chunk_in_pieces_comes_again_with_it() -> None:
    """Of a chunk that another fetch brought the middle of, the first piece fails: neither of the two has come."""
    taken, device = Taken(), Device(failures=1)
    fan = FanOut(10, ROW, taken, keeps=True, accelerator=device)  # type: ignore[arg-type]
    fan.share(A)
    fan.deliver(0, chunk(0, 2))
    fan.deliver(4, chunk(4, 6))
    with pytest.raises(DeviceError):
        fan.deliver(0, on_device(0, 10))
    assert fan.here == 4
    fan.deliver(0, on_device(0, 10))
    kept = fan.kept()
    assert kept is not None and (kept == ROWS).all() and (taken.rows[A] == ROWS).all() and fan.complete


@pytest.mark.parametrize("joins", ["before", "meanwhile"])
async def test_who_cannot_be_given_a_chunk_has_failed_and_the_others_have_it(joins: str) -> None:
    """It was as if the chunk had been wrong: nobody got it, however often it came again."""
    taken, error = Taken(), MemoryError("no room")

    def deliver(key: ItemKey, start: int, data: Data) -> None:
        if key == B:
            raise error
        taken(key, start, data)
        if joins == "meanwhile" and not start:
            assert fan.share(B) == ()

    fan = FanOut(10, ROW, deliver, keeps=True, accelerator=None)
    if joins == "before":
        fan.share(B)
    fan.share(A)
    fan.deliver(0, chunk(0, 4))
    assert fan.failed == {B: error} and not fan.shared_by(B)
    fan.deliver(4, chunk(4, 10))
    kept = fan.kept()
    assert taken.whole(A) and fan.complete and kept is not None and (kept == ROWS).all()


async def test_who_cannot_be_given_what_came_before_has_failed_and_the_others_have_not() -> None:
    taken, error, idle = Taken(), MemoryError("no room"), asyncio.Event()

    def deliver(key: ItemKey, start: int, data: Data) -> None:
        if key == B:
            raise error
        taken(key, start, data)

    fan = FanOut(10, ROW, deliver, keeps=True, accelerator=None)
    fan.share(A)
    fan.deliver(0, chunk(0, 4))
    owed = fan.share(B)
    fan.when_idle(idle.set)
    await asyncio.to_thread(fan.catch_up, B, owed)
    await idle.wait()
    assert fan.failed == {B: error}
    fan.deliver(4, chunk(4, 10))
    assert taken.whole(A) and fan.complete


async def test_the_end_waits_for_deliveries_on_other_threads() -> None:
    """The second fetch was told that the rows are here while the first one's thread is still copying them."""
    taken, entered, gate = Taken(), threading.Event(), threading.Event()

    def deliver(key: ItemKey, start: int, data: Data) -> None:
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            assert gate.wait(30)
        taken(key, start, data)

    fan = FanOut(10, ROW, deliver, keeps=True, accelerator=None)
    fan.share(A)
    slow = asyncio.ensure_future(asyncio.to_thread(fan.deliver, 0, chunk(0, 5)))
    await asyncio.to_thread(entered.wait)
    fan.deliver(0, chunk(0, 10))
    idle = asyncio.Event()
    fan.when_idle(idle.set)
    assert not idle.is_set() and not fan.complete
    gate.set()
    await slow
    await idle.wait()
    assert taken.whole(A) and fan.complete


async def test_who_joins_while_a_chunk_is_delivered_gets_it_from_that_delivery() -> None:
    taken, entered, gate = Taken(), threading.Event(), threading.Event()

    def deliver(key: ItemKey, start: int, data: Data) -> None:
        if key == A:
            entered.set()
            assert gate.wait(30)
        taken(key, start, data)

    fan = FanOut(10, ROW, deliver, keeps=True, accelerator=None)
    fan.share(A)
    work = asyncio.ensure_future(asyncio.to_thread(fan.deliver, 0, chunk(0, 10)))
    await asyncio.to_thread(entered.wait)
    assert fan.share(B) == ()
    gate.set()
    await work
    assert taken.whole(A) and taken.whole(B) and fan.complete


async def test_sharers_that_join_while_threads_deliver_miss_nothing_and_get_nothing_twice() -> None:
    for _ in range(50):
        taken = Taken()
        fan = FanOut(10, ROW, taken, keeps=True, accelerator=None)
        fan.share(A)
        barrier = threading.Barrier(3)

        def bring(rows: range, fan: FanOut = fan, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(30)
            for row in rows:
                fan.deliver(row, chunk(row, row + 1))

        work = [asyncio.ensure_future(asyncio.to_thread(bring, rows)) for rows in (range(10), range(9, -1, -1))]
        await asyncio.to_thread(barrier.wait)
        if owed := fan.share(B):
            await asyncio.to_thread(fan.catch_up, B, owed)
        await asyncio.gather(*work)
        assert taken.whole(A) and taken.whole(B) and fan.complete


class Named:
    """A key that counts with how many others it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        type(self).compared += 1
        return self is other

    def __hash__(self) -> int:
        return id(self)


async def test_a_picture_that_hundreds_wait_for_costs_each_of_them_the_same() -> None:
    """Each was compared with all others, for each chunk and at the end: four thousand held the loop up for a second."""
    given: list[object] = []
    fan = FanOut(10, ROW, lambda key, *_: given.append(key), keeps=True, accelerator=None)
    keys: list[Any] = [Named() for _ in range(300)]
    for key in keys:
        fan.share(key)
    fan.deliver(0, chunk(0, 5))
    fan.deliver(5, chunk(5, 10))
    compared = Named.compared
    assert fan.complete and given == 2 * keys
    for key in keys:
        fan.leave(key)
        assert not fan.shared_by(key)
    assert compared < 10 and Named.compared < 10
