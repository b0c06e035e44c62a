"""The pipeline with a tower that stands still when told to: batches, order, partial rows, cancelling, failures."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from stepped import PATIENCE_S, Stepped, bench

from aiodisagg.encode import pipeline as pipeline_module
from aiodisagg.encode import tower as tower_module
from aiodisagg.encode.gate import SlackGate
from aiodisagg.errors import MediaError
from aiodisagg.models.base import PATCH_BYTES, Patches
from aiodisagg.protocol.events import EncodeStopped, RowsReady, StageEntered, StartEncode
from aiodisagg.scheduler.slack import Slack

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


async def test_batches_are_full_under_load() -> None:
    """Whatever keeps items from meeting in front of the tower, a lock or a stage that waits for another, fails here."""
    async with bench(encoder := Stepped()) as made:
        digests = [made.start(0)]
        assert await made.call() == [(0, 16)]
        digests += [made.start(n) for n in range(1, 9)]
        await made.prepared(*digests)  # preparing goes on while the tower works
        encoder.permits.release(3)
        for digest in digests:
            await made.until(RowsReady(digest, 4))
        assert made.pipeline.batch_sizes == {1: 1, 4: 2}
        assert made.pipeline.items_encoded == 9 and not made.pipeline.waiting
        assert all(made.read(d, 0, 4) == [[float(d), i] for i in range(4)] for d in digests)


async def test_rows_of_a_finished_image_leave_before_its_neighbours_are_done() -> None:
    async with bench(encoder := Stepped(), batch_patches=16) as made:
        first, _ = await made.in_order(1), await made.in_order(2)
        encoder.permits.release()
        await made.until(RowsReady(first, 4))
        assert [await made.call(), await made.call()] == [[(1, 16)], [(2, 16)]]
        assert made.read(first, 0, 4)[3] == [1, 3] and made.pipeline.waiting == 1


async def test_rows_of_a_video_leave_by_groups_of_frame_pairs() -> None:
    async with bench(encoder := Stepped(), batch_patches=48) as made:
        video = made.start(5, t=8)  # 16 patches a frame pair, 3 to a batch
        for pairs in (3, 6, 8):
            assert await made.call() == [(5, 16 * min(3, pairs if pairs < 8 else 2))]
            encoder.permits.release()
            await made.until(RowsReady(video, 4 * pairs))
            assert made.read(video, 0, 4 * pairs) == [[5, i] for i in range(4 * pairs)]
        assert [e.stop for e in made.told if isinstance(e, RowsReady)] == [12, 24, 32]
        stages = [e.stage for e in made.told if isinstance(e, StageEntered)]
        assert stages == sorted(stages, key=["preparing", "prepared", "encoding"].index) and stages[-1] == "encoding"
        assert made.pipeline.items_encoded == 1


async def test_what_finds_the_tower_idle_is_not_said_to_wait_for_it() -> None:
    """A word less for each item to the language peer, which reads and answers it; who waits is said to."""
    async with bench(encoder := Stepped()) as made:
        for n in range(10):
            encoder.permits.release()
            await made.until(RowsReady(made.start(n), 4))
        assert {event.stage for event in made.told if isinstance(event, StageEntered)} <= {"preparing", "encoding"}
        made.start(10)
        assert [await made.call() for _ in range(11)][-1] == [(10, 16)]
        spent_s, behind = made.pipeline.prepare_s, made.start(11)
        await made.prepared(behind)
        assert made.pipeline.prepare_s > spent_s
        assert [e.stage for e in made.told if isinstance(e, StageEntered) and e.digest == behind][-1] == "prepared"


async def test_an_image_behind_a_video_shares_its_last_batch() -> None:
    async with bench(encoder := Stepped(), batch_patches=48) as made:
        video, image = await made.in_order(5, t=4), await made.in_order(6)
        encoder.permits.release(2)
        await made.until(RowsReady(image, 4))
        assert [await made.call(), await made.call()] == [[(5, 48)], [(5, 16), (6, 16)]]
        assert made.read(video, 12, 16) == [[5, i] for i in range(12, 16)]


async def test_cancelling_reaches_a_video_in_the_middle_of_its_batches() -> None:
    async with bench(encoder := Stepped(), batch_patches=16) as made:
        video, image = await made.in_order(5, t=100), await made.in_order(6)
        encoder.permits.release()
        await made.until(RowsReady(video, 4))
        assert [await made.call(), await made.call()] == [[(5, 16)]] * 2  # one is done, one is in the tower
        made.pipeline.cancel(video)
        assert made.ends() == {}
        encoder.permits.release()
        await made.until(EncodeStopped(video, "cancelled", "nobody wants it any more", True))
        assert [e.stop for e in made.told if isinstance(e, RowsReady)] == [4]
        assert await made.call() == [(6, 16)]
        encoder.permits.release()
        await made.until(RowsReady(image, 4))
        assert made.pipeline.prepared_patches == 0


async def test_an_image_that_is_cancelled_in_the_tower_is_complete_all_the_same() -> None:
    async with bench(encoder := Stepped()) as made:
        image = made.start(1)
        await made.call()
        made.pipeline.cancel(image)
        encoder.permits.release()
        await made.until(RowsReady(image, 4))
        assert made.ends() == {}


async def test_cancelled_items_never_reach_the_tower() -> None:
    encoder = Stepped()
    encoder.slow[2] = threading.Event()
    async with bench(encoder, prepare_threads=1) as made:
        digests = [made.start(0)]
        await made.call()
        digests += [made.start(n) for n in range(1, 5)]
        await made.prepared("1")
        await made.until(("preparing", "2"))
        for digest in digests[1:]:
            made.pipeline.cancel(digest)
        assert set(made.ends()) == {"1", "3", "4"}  # 2 is on a thread
        encoder.slow[2].set()
        encoder.permits.release()
        await made.until(RowsReady("0", 4))
        await made.until(EncodeStopped("2", "cancelled", "nobody wants it any more", True))
        assert made.encoder.calls.empty() and made.pipeline.waiting == 0


async def test_a_bad_item_fails_alone() -> None:
    encoder = Stepped()
    encoder.bad = {2}
    async with bench(encoder) as made:
        digests = [made.start(0)]
        await made.call()
        digests += [made.start(n) for n in range(1, 4)]
        await made.prepared(*digests)
        encoder.permits.release(10)
        for digest in ("0", "1", "3"):
            await made.until(RowsReady(digest, 4))
        assert made.ends() == {"2": "encode_failed"}
        one_by_one = [[(1, 16)], [(2, 16)], [(0, 16)], [(3, 16)]]  # after the one that failed, what worked before
        assert [await made.call() for _ in range(5)] == [[(1, 16), (2, 16), (3, 16)], *one_by_one]


async def test_a_bad_item_does_not_end_an_encoder_that_takes_only_grids_of_its_own() -> None:
    """The picture that is tried after a failure was refused, and that was taken for a device that is broken."""

    class Own(Stepped):
        def prepare(self, *arguments: Any) -> Patches:
            if arguments[2] != (1, 4, 4):
                raise MediaError("image", f"{arguments[2]} is no grid of mine")
            return super().prepare(*arguments)

    encoder, broke = Own(100), list[str]()
    async with bench(encoder, broke=broke.append) as made:
        encoder.bad = {1, 3}
        for number, end in ((1, "encode_failed"), (2, ""), (3, "encode_failed")):
            digest = made.start(number)
            await made._told(lambda: not made.pipeline.waiting)
            assert made.ends().get(digest, "") == end
            assert not broke and not made.pipeline.broken
        encoder.bad = {2, 4}  # also what worked before
        made.start(4)
        await made._told(lambda: bool(made.ends().get("4")))
        assert broke == [made.pipeline.broken] == ["what it tried failed, 2 in a row, this one with ValueError"]


async def test_rows_that_are_not_finite_are_told_apart_from_other_failures() -> None:
    """A receiver has another rule for them: what two towers say is the item's fault."""

    class Overflowing(Stepped):
        def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
            return [rows / 0 for rows in super().encode(batch)]

    async with bench(Overflowing(permits=1)) as made:
        digest = made.start(1)
        await made.until(EncodeStopped(digest, "not_finite", "the encoder made values that are not finite", True))


async def test_a_video_that_fails_in_the_middle_stops_there() -> None:
    async with bench(encoder := Stepped(), batch_patches=16) as made:
        video = made.start(5, t=3)
        await made.call()
        encoder.permits.release()
        await made.until(RowsReady(video, 4))
        await made.call()
        encoder.bad = {5}
        encoder.permits.release(2)  # and for what worked before
        await made.until(EncodeStopped(video, "encode_failed", "ValueError: cannot encode {5}", True))
        assert await made.call() == [(5, 16)] and encoder.calls.empty() and made.pipeline.waiting == 0
        assert made.pipeline.prepared_patches == 0


async def test_rows_that_are_not_the_plans_stop_the_item_for_good() -> None:
    async with bench(Stepped(10)) as made:
        made.pipeline.start(StartEncode("9", "image", (1, 4, 4), 5, 0.0, (b"9",)))
        said = "the encoder made (4, 2, 'float32'), the plan says (5, 2, 'float32')"
        await made.until(EncodeStopped("9", "wrong_shape", said, False))


async def test_media_that_cannot_be_prepared_are_the_clients_fault() -> None:
    async with bench(Stepped(10)) as made:
        bad, good = made.start(-1), made.start(1)
        await made.until(RowsReady(good, 4))
        await made.until(EncodeStopped(bad, "invalid_media", "image: negative", False))


async def test_preparing_waits_while_enough_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "PREPARED_PATCHES", 0)
    # Room for two batches. One thread: on two a later item may be prepared first, and an idle tower takes it.
    async with bench(encoder := Stepped(), batch_patches=16, prepare_threads=1) as made:
        digests = [made.start(n) for n in range(5)]
        await made.call()
        await made.prepared("1")
        for n in range(5):
            seen = {e.digest for e in made.told if isinstance(e, StageEntered)}
            assert len(seen) <= 2 + 1 + n
            encoder.permits.release()
            await made.until(RowsReady(digests[n], 4))


async def test_preparing_waits_for_what_decoded_pictures_take(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(Stepped):
        """Its patches are made of pictures that have eight times as many pixels."""

        prepared, encoded = set[int](), set[int]()

        def prepare(self, *arguments: Any) -> Patches:
            patches = super().prepare(*arguments)
            assert not self.prepared - self.encoded, "there is no room"
            self.prepared.add(int(arguments[1][0]))
            values = torch.nn.functional.pad(patches.pixel_values, (0, 6144))
            assert values.nbytes > 127 * PATCH_BYTES
            return Patches(values, patches.grid_thw)

        def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
            rows = super().encode([Patches(patches.pixel_values[:, :2], patches.grid_thw) for patches in batch])
            self.encoded |= {int(one[0, 0]) for one in rows}
            return rows

    monkeypatch.setattr(pipeline_module, "PREPARED_PATCHES", 0)
    async with bench(encoder := Large(), batch_patches=32, prepare_threads=1) as made:
        digests = [made.start(n) for n in range(3)]
        await made.call()
        assert made.pipeline.prepared_patches == 129
        encoder.permits.release(3)
        for digest in digests:
            await made.until(RowsReady(digest, 4))
        assert made.pipeline.prepared_patches == 0


async def test_a_tower_without_slack_waits_and_then_takes_what_is_wanted_most() -> None:
    clock = iter([0.0, 0.01, *[0.5] * 100])
    gate = SlackGate(Slack(0.05), clock=lambda: next(clock))
    encoder = Stepped(100)
    encoder.slow[1] = threading.Event()
    gate.step_began()
    gate.step_ended(3)  # earned 40 ms
    gate.spent(0.2)  # and overdrew
    async with bench(encoder, batch_patches=16, gate=gate) as made:
        slow, quick = made.start(1), made.start(2)
        await made.prepared(quick)
        encoder.slow[1].set()
        await made.prepared(slow)
        assert encoder.calls.empty()
        gate.step_ended(0)  # the last stream ended
        assert [await made.call(), await made.call()] == [[(1, 16)], [(2, 16)]]
        await made.until(RowsReady(quick, 4))


async def test_a_closed_pipeline_does_not_wait_for_slack() -> None:
    gate = SlackGate(Slack(0.05))
    gate.step_began()
    gate.step_ended(3)
    gate.spent(1000.0)
    async with bench(encoder := Stepped(100), gate=gate) as made:
        await made.prepared(made.start(1))
    assert encoder.calls.empty()


class Event:
    """Of a device: computing is behind it until ``done``. ``error``: it has failed."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: Exception | None = None

    def synchronize(self) -> None:
        if not self.done.wait(PATIENCE_S):
            raise TimeoutError
        if self.error is not None:
            raise self.error


async def test_on_a_device_the_next_batch_is_launched_while_one_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []

    def event_behind(rows: object) -> Event:
        events.append(event := Event())
        return event

    monkeypatch.setattr(tower_module, "_event_behind", event_behind)
    async with bench(encoder := Stepped(), batch_patches=16, keep_on_device=True) as made:
        for n in range(3):
            await made.in_order(n)
        encoder.permits.release(10)
        assert [await made.call(), await made.call()] == [[(0, 16)], [(1, 16)]]
        assert not any(isinstance(event, RowsReady) for event in made.told)
        events[0].done.set()
        await made.until(RowsReady("0", 4))
        assert await made.call() == [(2, 16)]
        assert [e.digest for e in made.told if isinstance(e, RowsReady)] == ["0"]
        for event in events[1:]:
            event.done.set()
        await made.until(RowsReady("1", 4))
        while len(events) < 3:
            await asyncio.to_thread(lambda: None)
        events[2].done.set()
        await made.until(RowsReady("2", 4))


@pytest.mark.parametrize("first_fails", [False, True])
async def test_a_video_that_is_given_up_and_fails_is_not_complete_by_its_last_piece(
    monkeypatch: pytest.MonkeyPatch, first_fails: bool
) -> None:
    """Rows that nobody computed were published, and kept for whoever would ask next."""
    events: queue.Queue[Event] = queue.Queue()

    def event_behind(rows: object) -> Event:
        events.put(event := Event())
        return event

    monkeypatch.setattr(tower_module, "_event_behind", event_behind)
    async with bench(Stepped(2), batch_patches=16, keep_on_device=True) as made:
        video = made.start(5, t=2)
        first, last = [await asyncio.to_thread(events.get, timeout=PATIENCE_S) for _ in range(2)]
        if not first_fails:
            made.pipeline.cancel(video)
        first.error = RuntimeError("the device failed")
        first.done.set()
        if first_fails:
            job = made.pipeline._jobs[video]
            while job.end is None:  # noqa: ASYNC110 - it is told once the last piece is not in the tower any more
                await asyncio.sleep(0)
            made.pipeline.cancel(video)
        last.done.set()
        await made._told(lambda: not made.pipeline.waiting)
        assert made.ends() == {video: "encode_failed"}
        assert not made.pipeline._rows and made.pipeline.prepared_patches == 0


@pytest.mark.parametrize("sick", [False, True])
async def test_a_videos_pieces_come_in_order_though_the_next_batch_cannot_be_launched(
    monkeypatch: pytest.MonkeyPatch, sick: bool
) -> None:
    """The last piece came before the one that was still in the tower: as if all rows were there and finite."""

    class Sick(Stepped):
        def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
            rows = super().encode(batch)
            if sick and len(batch) == 1 and rows[0].shape == (8, 2):
                rows[0][3] = torch.nan
            return rows

    def event_behind(rows: object) -> Event:
        event = Event()
        event.done.set()
        return event

    monkeypatch.setattr(tower_module, "_event_behind", event_behind)
    async with bench(encoder := Sick(), batch_patches=32) as made:
        first = made.start(0)
        assert await made.call() == [(0, 16)]
        video = await made.in_order(5, t=3)
        made.pipeline.start(StartEncode("9", "image", (1, 4, 4), 5, 0.0, (b"9",)))  # of other rows than are made
        await made.prepared("9")
        encoder.permits.release(10)
        await made._told(lambda: not made.pipeline.waiting)
        assert [await made.call(), await made.call()] == [[(5, 32)], [(5, 16), (9, 16)]]
        ready = [(e.digest, e.stop) for e in made.told if isinstance(e, RowsReady)]
        assert ready == ([(first, 4)] if sick else [(first, 4), (video, 8), (video, 12)])
        assert made.ends() == ({video: "not_finite"} if sick else {}) | {"9": "wrong_shape"}
        assert made.pipeline.prepared_patches == 0
        if not sick:
            assert made.read(video, 0, 12) == [[5, i] for i in range(12)]
