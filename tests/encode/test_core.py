"""The gate between a step thread and a tower's thread that share a core."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch

from aiodisagg.device.vitals import Vitals
from aiodisagg.encode import tower as tower_module
from aiodisagg.encode.core import NICE, CoreGate
from aiodisagg.encode.tower import Tower
from aiodisagg.models.base import Patches
from aiodisagg.protocol.rows import RowLayout
from aiodisagg.scheduler.order import Claim

pytestmark = pytest.mark.usefixtures("no_leaks")
PATIENCE_S = 60.0


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


class Zeros:
    """A VisionEncoder whose rows exist as soon as they are asked for."""

    layout = RowLayout(8, 0, "float32")

    def encode(self, batch: list[Patches]) -> list[torch.Tensor]:
        return [torch.zeros(patches.count, 8) for patches in batch]


@contextmanager
def tower_beside_prompts() -> Iterator[tuple[Tower, CoreGate, queue.Queue[str]]]:
    """A tower whose batches are one picture or frame pair each, beside an engine that has prompts all the time; and the
    items of its batches, as they are made."""
    made, encoder, gate = queue.Queue[str](), cast(Any, Zeros()), CoreGate()
    gate.prefill_waits(True)
    tower = Tower(
        encoder, batch_patches=4, began=lambda pieces: None, gate=gate, to_host=False, device="cpu",
        made=lambda batch: made.put(batch.pieces[0].digest), vitals=Vitals(made.put), probe=lambda: None,
    )  # fmt: skip
    try:
        yield tower, gate, made
    finally:
        tower.close()


def add(tower: Tower, digest: str, *, frame_pairs: int = 1, due_s: float = PATIENCE_S) -> None:
    patches = Patches(torch.zeros(4 * frame_pairs, 8), (frame_pairs, 2, 2))
    tower.add(digest, Claim(time.monotonic(), time.monotonic() + due_s), patches, 4 * frame_pairs)


@pytest.mark.parametrize("items", [{"a": 4}, {"a": 1, "b": 1, "c": 1, "d": 1}], ids=["a video", "four pictures"])
def test_of_many_batches_only_the_first_waits_for_prompts(
    monkeypatch: pytest.MonkeyPatch, items: dict[str, int]
) -> None:
    monkeypatch.setattr(tower_module, "LONGEST_S", 0.05)
    with tower_beside_prompts() as (tower, gate, made):
        for digest, frame_pairs in items.items():
            add(tower, digest, frame_pairs=frame_pairs)
        tower.start()
        assert "".join(made.get(timeout=PATIENCE_S) for _ in range(4)) in ("aaaa", "abcd")
        assert gate.waits == 1 and gate.waited_s >= 0.05
        add(tower, "later")
        assert made.get(timeout=PATIENCE_S) == "later"
        assert gate.waits == 2, "what comes then has a patience of its own"


def test_what_is_due_waits_for_no_prompts_and_is_waited_for_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower_module, "LONGEST_S", PATIENCE_S)
    with tower_beside_prompts() as (tower, gate, made):
        add(tower, "due", due_s=0.0)
        tower.start()
        assert made.get(timeout=PATIENCE_S / 2) == "due" and gate.waits == 0
        add(tower, "patient")
        while not gate.whole_prompts():
            pass
        assert made.empty()
        add(tower, "also due", due_s=0.0)
        gate.prefill_waits(True)
        assert made.get(timeout=PATIENCE_S / 2) == "also due"
        assert gate.waits == 1 and made.empty()
