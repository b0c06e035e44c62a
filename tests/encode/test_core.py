"""The gate between a step thread and a tower's thread that share a core."""

from __future__ import annotations

import os
import sys
import threading

import pytest
from stepped import Stepped, bench

from aiodisagg.encode import tower
from aiodisagg.encode.core import NICE, CoreGate
from aiodisagg.protocol.events import ChangeEncode, RowsReady
from aiodisagg.protocol.messages import Urgency
from tests.services.system import eventually

pytestmark = pytest.mark.usefixtures("no_leaks")
PATIENCE_S = 60.0
PATIENT = Urgency(PATIENCE_S)


def test_a_batch_waits_for_a_prefill_and_for_decodes_it_does_not() -> None:
    gate, told = CoreGate(), list[bool]()
    gate.step_ended(3)
    assert gate.wait(), "streams that decode hold nothing up"
    gate.spent(0.1)
    gate.prefill_waits(True)
    thread = threading.Thread(target=lambda: told.append(gate.wait()))
    thread.start()
    while not gate.whole_prompts():
        pass
    assert not gate.open and not told
    gate.prefill_waits(False)
    thread.join(PATIENCE_S)
    assert told == [True] and gate.waits == 1


@pytest.mark.parametrize("left", [(0.01,), (PATIENCE_S, 0.0)], ids=["in time", "at the next step"])
def test_prefills_without_end_do_not_stop_all_images(left: tuple[float, ...]) -> None:
    """``left``: the patience of what waits for the tower, as it is asked; then there is none."""
    gate, told, patience_s = CoreGate(), list[bool](), iter(left)
    gate.prefill_waits(True)
    assert gate.wait(lambda: 0.0) and gate.waits == 0, "it had none"
    gate.gave_up()
    assert not gate.whole_prompts(), "there is nothing in the tower"
    thread = threading.Thread(target=lambda: told.append(gate.wait(lambda: next(patience_s, 0.0))))
    thread.start()
    if len(left) > 1:
        while not gate.whole_prompts():
            pass
        gate.prefill_waits(True)
    thread.join(PATIENCE_S)
    assert told == [True] and gate.waits == 1


def test_prompts_are_computed_in_one_piece_while_the_tower_has_work() -> None:
    gate = CoreGate()
    assert not gate.whole_prompts()
    assert gate.wait() and gate.whole_prompts()
    for _ in range(3):  # the batch failed: once more, piece by piece
        gate.spent(0.1)
    assert not gate.whole_prompts()
    assert gate.wait()
    gate.close()
    assert not gate.whole_prompts() and not gate.wait(), "nothing is held back by a tower that is closed"


def test_closing_ends_a_wait() -> None:
    gate, told = CoreGate(), list[bool]()
    gate.prefill_waits(True)
    thread = threading.Thread(target=lambda: told.append(gate.wait()))
    thread.start()
    gate.close()
    thread.join(PATIENCE_S)
    assert told == [False]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_the_engines_thread_steps_back_once_and_no_other() -> None:
    gate, found = CoreGate(), list[int]()

    def steps() -> None:
        for _ in range(3):
            gate.step_began()
            gate.step_ended(1)
            found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join(PATIENCE_S)
    assert found == [min(before + NICE, 19)] * 3
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


@pytest.mark.anyio
@pytest.mark.parametrize("sizes", [[4], [1, 1, 1, 1]], ids=["a video", "four pictures"])
async def test_of_many_batches_only_the_first_waits_for_prompts(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(tower, "LONGEST_S", 0.05)
    gate, encoder = CoreGate(), Stepped()
    async with bench(encoder, batch_patches=16, gate=gate) as made:
        made.start(100)
        await made.call()
        for number, frame_pairs in enumerate(sizes):
            await made.prepared(made.start(number, t=frame_pairs, urgency=PATIENT))
        gate.prefill_waits(True)
        encoder.permits.release(5)
        numbers = [number for _ in range(4) for number, _ in await made.call()]
        assert numbers == [number for number, frame_pairs in enumerate(sizes) for _ in range(frame_pairs)]
        assert gate.waits == 1 and gate.waited_s >= 0.05
        made.start(101, urgency=PATIENT)
        await made.call()
        assert gate.waits == 2, "what comes then has a patience of its own"


@pytest.mark.anyio
async def test_what_is_due_waits_for_no_prompts_nor_for_who_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "LONGEST_S", PATIENCE_S)
    gate, encoder = CoreGate(), Stepped(permits=9)
    gate.prefill_waits(True)
    async with bench(encoder, batch_patches=16, gate=gate) as made:
        due = made.start(1, urgency=Urgency(0.0))
        assert await made.call() == [(1, 16)] and gate.waits == 0
        await made.until(RowsReady(due, 4))
        await made.prepared(made.start(2, urgency=PATIENT))
        await eventually(gate.whole_prompts, "it waits for prompts")
        await made.prepared(made.start(3, urgency=Urgency(0.0)))
        assert encoder.calls.empty()
        gate.prefill_waits(True)  # another step with prompts
        assert await made.call() == [(3, 16)] and gate.waits == 1
        gate.prefill_waits(False)
        assert await made.call() == [(2, 16)]


@pytest.mark.anyio
async def test_what_becomes_due_while_it_waits_for_prompts_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else asks for the same picture, and cannot wait."""
    monkeypatch.setattr(tower, "LONGEST_S", PATIENCE_S)
    gate, encoder = CoreGate(), Stepped(permits=9)
    gate.prefill_waits(True)
    async with bench(encoder, batch_patches=16, gate=gate) as made:
        await made.prepared(digest := made.start(2, urgency=PATIENT))
        await eventually(gate.whole_prompts, "it waits for prompts")
        made.pipeline.change(ChangeEncode(digest, Urgency(0.0), False))
        assert encoder.calls.empty()
        gate.prefill_waits(True)  # another step with prompts
        assert await made.call() == [(2, 16)]
        gate.prefill_waits(False)
