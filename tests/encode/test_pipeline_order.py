"""Whose items are prepared and encoded first."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from stepped import PATIENCE_S, Stepped, bench, plain

from aiodisagg.protocol.events import ChangeEncode, RowsReady, StageEntered
from aiodisagg.protocol.messages import ARRIVAL, Urgency

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


async def test_a_picture_alone_is_prepared_before_what_waits_of_a_request_with_many() -> None:
    encoder = Stepped()
    encoder.slow[3] = threading.Event()
    many, one = Urgency(PATIENCE_S, 0, 6 * 16), Urgency(PATIENCE_S, 0, 16)
    async with bench(encoder, batch_patches=16, prepare_threads=1) as made:
        for number in (1, 2, 3, 4):
            made.start(number, urgency=many)
        assert await made.call() == [(1, 16)]
        await made.until(("preparing", "3"))
        made.start(5, urgency=one)
        encoder.slow[3].set()
        await made.prepared("4", "5")
        ready = [event.digest for event in made.told if isinstance(event, StageEntered) and event.stage == "prepared"]
        assert ready[-2:] == ["5", "4"]
        encoder.permits.release(5)
        assert [(await made.call())[0][0] for _ in range(4)] == [2, 3, 4, 5]  # the tower goes by arrival


async def test_who_is_due_waits_for_nobody_that_came_later() -> None:
    encoder = Stepped()
    async with bench(encoder, batch_patches=16, prepare_threads=1) as made:
        await made.in_order(1)
        assert await made.call() == [(1, 16)]
        made.start(2, urgency=Urgency(0.0, 0, 6 * 16))
        made.start(3, urgency=Urgency(PATIENCE_S, -8, 16))
        await made.prepared("2", "3")
        encoder.permits.release(3)
        assert [(await made.call())[0][0] for _ in range(2)] == [2, 3]


async def test_who_is_due_stays_so_whatever_is_said_of_it_later() -> None:
    encoder = Stepped()
    async with bench(encoder, batch_patches=16, prepare_threads=1) as made:
        await made.in_order(1)
        assert await made.call() == [(1, 16)]
        made.start(2, urgency=Urgency(0.0, 0, 16))
        made.start(3, urgency=Urgency(PATIENCE_S, -8, 16))
        await made.prepared("2", "3")
        made.pipeline.change(ChangeEncode("2", Urgency(PATIENCE_S, 0, 16), True))  # another one wants it to be alone
        encoder.permits.release(3)
        assert [(await made.call())[0][0] for _ in range(2)] == [2, 3]


async def test_what_is_needed_first_is_encoded_first_whatever_is_prepared_first() -> None:
    encoder = Stepped()
    encoder.slow[1] = threading.Event()
    async with bench(encoder, batch_patches=16) as made:
        held = made.start(0)
        await made.call()
        slow, quick, last = made.start(1), made.start(2), made.start(3)
        await made.prepared(quick, last)
        encoder.slow[1].set()
        await made.prepared(slow)
        encoder.permits.release(4)
        assert [(await made.call())[0][0] for _ in range(3)] == [1, 2, 3]
        await made.until(RowsReady(held, 4))


async def test_who_is_wanted_sooner_passes_what_is_not_in_the_tower_yet() -> None:
    """A request of the lower class that shared a picture with a batch had to wait for the batch."""
    encoder = Stepped()
    encoder.slow[4] = threading.Event()
    patient, urgent = Urgency(PATIENCE_S, 0, 6 * 16), Urgency(PATIENCE_S, -1, 16)
    async with bench(encoder, batch_patches=16, prepare_threads=1) as made:
        for number in range(7):
            made.start(number, urgency=patient)
        assert await made.call() == [(0, 16)]
        await made.prepared("1", "2", "3")
        await made.until(("preparing", "4"))
        for digest in ("3", "6", "4"):  # prepared, in the line before that, and on its way
            made.pipeline.change(ChangeEncode(digest, urgent, False))
        encoder.slow[4].set()
        await made.prepared("4", "5", "6")
        ready = [event.digest for event in made.told if isinstance(event, StageEntered) and event.stage == "prepared"]
        assert ready[-2:] == ["6", "5"]
        encoder.permits.release(7)
        assert [(await made.call())[0][0] for _ in range(6)] == [3, 4, 6, 1, 2, 5]


@pytest.mark.parametrize(("cancelled", "calls"), [(False, [1, 1, 2]), (True, [2])])
async def test_what_is_said_of_a_video_as_the_tower_takes_it_counts_for_the_rest_of_it(
    cancelled: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tower had begun by the time that the loop knew it was prepared: the rest went by the class of before."""
    encoder = Stepped()
    async with bench(encoder, batch_patches=16, prepare_threads=1) as made:
        add, given, said, begun = made.pipeline._tower.add, threading.Event(), threading.Event(), threading.Event()

        def give(*what: Any, **how: Any) -> None:
            given.set()
            assert said.wait(PATIENCE_S)
            add(*what, **how)
            assert begun.wait(PATIENCE_S)

        monkeypatch.setattr(made.pipeline._tower, "add", give)
        video = made.start(1, t=3, urgency=Urgency(PATIENCE_S, -1 if cancelled else 1, 48))
        assert await asyncio.to_thread(given.wait, PATIENCE_S)
        if cancelled:
            made.pipeline.cancel(video)
        else:
            made.pipeline.change(ChangeEncode(video, Urgency(PATIENCE_S, -1, 48), False))
        said.set()
        assert await made.call() == [(1, 16)]
        begun.set()
        await made.prepared(made.start(2, urgency=Urgency(PATIENCE_S, 0, 16)))
        encoder.permits.release(4)
        assert [(await made.call())[0][0] for _ in calls] == calls
        await made.until(RowsReady("2", 4))
        assert made.ends() == ({video: "cancelled"} if cancelled else {})


@pytest.mark.parametrize("late", [False, True])
async def test_what_is_to_be_alone_has_the_tower_for_itself(late: bool) -> None:
    """They fit a batch. Nothing begins before the end of what was there before was told."""
    encoder = Stepped()
    async with bench(encoder, batch_patches=64) as made:
        held = made.start(0)
        assert await made.call() == [(0, 16)]
        made.start(1, alone=not late)
        made.start(2)
        await made.prepared("1", "2")
        if late:
            made.pipeline.change(ChangeEncode("1", ARRIVAL, True))
        for number, before in ((1, held), (2, "1")):
            encoder.permits.release()
            assert await made.call() == [(number, 16)]
            assert RowsReady(before, 4) in [plain(event) for event in made.told]
        assert encoder.calls.empty()
