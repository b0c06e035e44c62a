"""The tower's thread beside a gate that changes its mind, on a device that computes by itself."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aiodisagg.device.vitals import LIMIT, Vitals
from aiodisagg.encode import tower as tower_module
from aiodisagg.encode.gate import OpenGate, endless
from aiodisagg.encode.queue import Piece
from aiodisagg.encode.tower import Made, NotFinite, Tower
from aiodisagg.errors import MediaError
from aiodisagg.models.base import Patches
from aiodisagg.protocol.rows import RowLayout
from aiodisagg.scheduler.order import Claim

pytestmark = pytest.mark.usefixtures("no_leaks")
PATIENCE_S = 60.0


def nothing() -> Patches:
    raise MediaError("image", "not one of mine")


class Zeros:
    """A VisionEncoder whose rows exist as soon as they are asked for."""

    layout = RowLayout(8, 0, "float32")

    def encode(self, batch: list[Patches]) -> list[torch.Tensor]:
        return [torch.zeros(patches.count, 8) for patches in batch]


class Script:
    """A gate: lets as many begin as it has permits. ``second``: called before the second answer."""

    open = True  # what it said a moment ago
    waited_s = 0.0

    def __init__(self, permits: int, second: Callable[[], object] = lambda: None) -> None:
        self.permits = threading.Semaphore(permits)
        self._before = iter((lambda: None, second))
        self.gave_ups = 0

    def wait(self, patience_s: Callable[[], float] = endless, *, block: bool = True) -> bool:
        next(self._before, lambda: None)()
        return self.permits.acquire(blocking=block)

    def spent(self, tower_s: float) -> None: ...

    def gave_up(self) -> None:
        self.gave_ups += 1

    def close(self) -> None:
        self.permits.release()


@contextmanager
def running(
    gate: Script, monkeypatch: pytest.MonkeyPatch, began: Callable[[list[Piece]], None] = lambda pieces: None
) -> Iterator[tuple[Tower, queue.Queue[str]]]:
    """A tower whose batches are one item each and can be launched ahead, and the items that were brought, or why there
    will be no more."""

    class Event:
        def synchronize(self) -> None: ...

    brought: queue.Queue[str] = queue.Queue()

    def made(made: Made) -> None:
        for piece in made.pieces:
            brought.put(piece.digest)

    monkeypatch.setattr(tower_module, "_event_behind", lambda rows: Event())
    encoder: Any = Zeros()
    tower = Tower(
        encoder, batch_patches=4, began=began, made=made, gate=gate, to_host=False, device="cpu",
        vitals=Vitals(brought.put), picture=nothing,
    )  # fmt: skip
    for n, digest in enumerate(("first", "second")):
        tower.add(digest, Claim(n), Patches(torch.zeros(4, 8), (1, 2, 2)), 4)
    try:
        yield tower, brought
    finally:
        tower.close()


def test_a_launched_batch_is_brought_while_the_next_one_has_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate closed between the look at it and the wait: rows that existed stayed with the thread that waited."""
    gate = Script(permits=1)
    with running(gate, monkeypatch) as (tower, brought):
        tower.start()
        assert brought.get(timeout=PATIENCE_S) == "first"
        gate.permits.release()
        assert brought.get(timeout=PATIENCE_S) == "second"


def test_a_launched_batch_is_brought_when_the_next_one_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Script(permits=2, second=lambda: tower.cancel("second"))
    with running(gate, monkeypatch) as (tower, brought):
        tower.start()
        assert brought.get(timeout=PATIENCE_S) == "first"
    assert gate.gave_ups == 1 and brought.empty()


def test_what_is_to_be_alone_is_not_launched_before_the_rest_was_dealt_with(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Piece] = []
    with running(Script(permits=3), monkeypatch, launched.extend) as (tower, brought):
        tower.change("second", Claim(1), alone=True)
        tower.start()
        assert brought.get(timeout=PATIENCE_S) == "first"
        (first,) = launched
        tower.brought(first)
        assert brought.get(timeout=PATIENCE_S) == "second"


def test_a_thread_that_ends_by_a_bug_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Script(permits=2, second=lambda: {}["nowhere"])
    with running(gate, monkeypatch) as (tower, brought):
        tower.start()
        assert brought.get(timeout=PATIENCE_S) == "its thread ended with KeyError"
    assert brought.empty()


def test_a_tower_that_computes_what_nobody_planned_is_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan, which came with the item, may be wrong: only what raises by itself says something of the device."""
    with running(Script(permits=3 * LIMIT), monkeypatch) as (tower, brought):
        wrong = {str(n) for n in range(2, 2 * LIMIT)}
        for digest in wrong:
            tower.add(digest, Claim(int(digest)), Patches(torch.zeros(4, 8), (1, 2, 2)), 5)
        tower.start()
        expected = {"first", "second", *wrong}
        assert {brought.get(timeout=PATIENCE_S) for _ in expected} == expected


@pytest.mark.parametrize("launched_ahead", [True, False])
def test_rows_that_are_not_finite_fail_their_item_and_not_the_batch(
    monkeypatch: pytest.MonkeyPatch, launched_ahead: bool
) -> None:
    class Sick(Zeros):
        def encode(self, batch: list[Patches]) -> list[torch.Tensor]:
            return [torch.where(patches.pixel_values == 7, torch.nan, patches.pixel_values) for patches in batch]

    found: queue.Queue[tuple[str, torch.Tensor | Exception]] = queue.Queue()
    if launched_ahead:
        monkeypatch.setattr(tower_module, "_event_behind", lambda rows: SimpleNamespace(synchronize=lambda: None))

    def take(made: Made) -> None:
        for piece, rows in zip(made.pieces, made.rows, strict=True):
            found.put((piece.digest, rows))

    encoder: Any = Sick()
    tower = Tower(
        encoder, batch_patches=64, began=lambda pieces: None, gate=OpenGate(), to_host=False, device="cpu",
        made=take,
        vitals=Vitals(lambda why: None), picture=nothing,
    )  # fmt: skip
    for n, value in enumerate((1.0, 7.0, 2.0)):
        tower.add(f"{n}", Claim(n), Patches(torch.full((4, 8), value), (1, 2, 2)), 4)
    tower.start()
    try:
        made = dict(found.get(timeout=PATIENCE_S) for _ in range(3))
    finally:
        tower.close()
    assert isinstance(made["1"], NotFinite) and "not finite" in str(made["1"])
    assert isinstance(made["0"], torch.Tensor) and isinstance(made["2"], torch.Tensor)
