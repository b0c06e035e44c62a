"""The tower in fixed buffers, as graphs have it, run on the CPU: a stand-in for a capture computes again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from aiodisagg.models.base import ItemKind, Patches
from aiodisagg.models.tower import FusedTower, sdpa
from aiodisagg.models.tower_graphs import LEAST_STEP, SLOTS, room_for
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from tests.models.halves import png

Tiny = Callable[..., Path]
IMAGE = (ItemKind.IMAGE, (png(100, 70),), (1, 4, 6))
SQUARE = (ItemKind.IMAGE, (png(64, 64, 3),), (1, 4, 4))
WIDE = (ItemKind.IMAGE, (png(33, 128, 5),), (1, 8, 2))
VIDEO = (ItemKind.VIDEO, tuple(png(64, 96, i) for i in range(5)), (3, 6, 4))


def attend(qkv: torch.Tensor, bounds: torch.Tensor, most: int) -> torch.Tensor:
    """Nothing is known of what is behind the last segment."""
    out = torch.full((qkv.shape[0], *qkv.shape[2:]), float("nan"))
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        if stop > start:
            assert stop - start <= most
            sdpa(None)(qkv[start:stop], 1, stop - start, out[start:stop], qkv.shape[3] ** -0.5)
    return out.reshape(qkv.shape[0], -1)


class Rig:
    """An encoder with graphs, and what was captured and replayed."""

    def __init__(self, folder: Path, *, most: int = 512, broken: bool = False) -> None:
        self.encoder = Qwen3VLVisionEncoder(folder, dtype=torch.float32)
        self.plain = Qwen3VLVisionEncoder(folder, dtype=torch.float32)
        self.encoder.fused = FusedTower(self.encoder._tower)
        self.captures = self.replays = 0
        self.broken = broken

        def capture(compute: Callable[[], None]) -> Callable[[], None]:
            self.captures += 1
            if self.broken:
                raise RuntimeError("operation not permitted when stream is capturing")

            def replay() -> None:
                self.replays += 1
                compute()

            return replay

        self.encoder.fused.use_graphs(attend, most=most, capture=capture)
        assert self.encoder.fused.graphs is not None
        self.graphs = self.encoder.fused.graphs

    def prepare(self, items: Sequence[tuple[ItemKind, tuple[bytes, ...], tuple[int, int, int]]]) -> list[Patches]:
        return [self.encoder.prepare(kind, media, grid, 2.0) for kind, media, grid in items]

    def check(self, *items: tuple[ItemKind, tuple[bytes, ...], tuple[int, int, int]]) -> list[torch.Tensor]:
        batch = self.prepare(items)
        found = self.encoder.encode(batch)
        for rows, wanted in zip(found, self.plain.encode(batch), strict=True):
            torch.testing.assert_close(rows, wanted, atol=2e-5, rtol=1e-5)
        return found


def test_rows_are_the_towers_for_any_batch_and_earlier_rows_stay(tiny: Tiny) -> None:
    rig = Rig(tiny())
    kept = rig.check(IMAGE)
    before = [rows.clone() for rows in kept]
    for _ in range(3):
        rig.check(SQUARE)
        rig.check(WIDE, IMAGE, SQUARE)
        rig.check(VIDEO)
        rig.check(SQUARE, VIDEO, WIDE)
        rig.check(IMAGE)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


def test_batches_of_about_one_size_share_a_graph_that_is_captured_when_the_size_is_met_again(tiny: Tiny) -> None:
    rig = Rig(tiny())
    rig.check(IMAGE)
    assert rig.captures == 0 and rig.graphs.sizes == ()
    rig.check(SQUARE)  # another picture of that size
    rig.check(WIDE)
    assert (rig.captures, rig.replays) == (1, 2) and rig.graphs.sizes == ((LEAST_STEP, SLOTS[0]),)
    rig.check(IMAGE, SQUARE)
    rig.check(SQUARE, IMAGE, WIDE)
    assert (rig.captures, rig.replays) == (2, 3) and rig.graphs.sizes[-1] == (LEAST_STEP, SLOTS[1])


def test_what_is_too_large_or_has_too_many_segments_is_launched(tiny: Tiny) -> None:
    rig = Rig(tiny(), most=32)
    for _ in range(3):
        rig.check(IMAGE, SQUARE)
    assert rig.captures == 0
    many = Rig(tiny())
    batch = [SQUARE] * (max(SLOTS) + 1)
    many.graphs._most = 16 * len(batch)
    for _ in range(2):
        many.check(*batch)
    assert many.captures == 0


def test_a_capture_that_fails_is_the_last_and_costs_nothing_else(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(tiny(), broken=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            rig.check(IMAGE)
    assert rig.captures == 1 and rig.graphs.sizes == ()
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "not permitted" in caplog.text


def test_only_so_many_are_kept(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiodisagg.models.tower_graphs.KEPT", 1)
    rig = Rig(tiny())
    for _ in range(2):
        rig.check(IMAGE)
        rig.check(IMAGE)
        rig.check(IMAGE, SQUARE)
    assert len(rig.graphs.sizes) <= 1 and rig.captures == 2


def test_sizes_waste_little() -> None:
    for count in range(4, 16385, 4):
        size = room_for(count)
        assert count <= size < count + max(LEAST_STEP, count // 16 + 1) and size % 4 == 0
    assert room_for(3520) == 3584 and room_for(8160) == 8192
    assert len({room_for(count) for count in range(1, 16385)}) < 100
