"""The gate between a step thread and a tower's thread that share a core."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from aiodisagg.encode.core import NICE, CoreGate

pytestmark = pytest.mark.usefixtures("no_leaks")
PATIENCE_S = 60.0


def test_a_batch_waits_for_a_prefill_and_for_decodes_it_does_not() -> None:
    gate, told = CoreGate(longest_s=PATIENCE_S), list[bool]()
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


def test_prefills_without_end_do_not_stop_all_images() -> None:
    gate = CoreGate(longest_s=0.01)
    gate.prefill_waits(True)
    assert gate.wait() and gate.waits == 1


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
    gate, told = CoreGate(longest_s=PATIENCE_S), list[bool]()
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
