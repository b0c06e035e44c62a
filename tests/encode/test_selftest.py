"""What a peer measures of itself at its start: in virtual time, and that a real tower is measured."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from aiodisagg.encode.selftest import GRIDS, self_test
from aiodisagg.models.base import ItemKind, Patches
from aiodisagg.protocol.rows import ModelFingerprint, RowLayout
from aiodisagg.scheduler.cost import ServiceTimes, Timing


class Timed:
    """A VisionEncoder in virtual time: ``patch_s`` for each patch of the tower, half of it to prepare."""

    def __init__(self, patch_s: float, warm_up_s: float = 0.0) -> None:
        self.fingerprint = ModelFingerprint("Timed", 2, 0, "float32", "timed")
        self.layout = RowLayout.of(self.fingerprint)
        self.now, self._patch_s, self._warm_up_s = 0.0, patch_s, warm_up_s

    def clock(self) -> float:
        return self.now

    def prepare(self, kind: ItemKind, media: Sequence[bytes], grid_thw: tuple[int, int, int], fps: float) -> Patches:
        assert kind is ItemKind.IMAGE and media[0].startswith(b"\xff\xd8")
        patches = Patches(torch.empty(0), grid_thw)
        self.now += self._patch_s * patches.count / 2
        return patches

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        self.now += self._patch_s * sum(patches.count for patches in batch) + self._warm_up_s
        self._warm_up_s = 0.0
        return [torch.empty(1) for _ in batch]


def test_every_size_is_measured_where_the_machine_is_fast_and_warm() -> None:
    encoder = Timed(1e-6, warm_up_s=0.3)
    times = self_test(encoder, 1.0, prepare_threads=3, clock=encoder.clock)
    assert [timing.patches for timing in times.tower] == [196, 1024, 8160]
    assert times.prepare_threads == 3
    for grid, prepare, tower in zip(GRIDS, times.prepare, times.tower, strict=True):
        assert prepare == Timing.of(grid, pytest.approx(grid[1] * grid[2] * 0.5e-6))
        assert tower == Timing.of(grid, pytest.approx(grid[1] * grid[2] * 1e-6))


@pytest.mark.parametrize(("patch_s", "sizes"), [(1e-4, 2), (1e-3, 1), (1.0, 1)])
def test_sizes_that_would_take_too_long_are_left_out(patch_s: float, sizes: int) -> None:
    encoder = Timed(patch_s)
    times = self_test(encoder, 1.0, clock=encoder.clock)
    assert len(times.tower) == len(times.prepare) == sizes
    if sizes > 1:
        assert encoder.now <= 1.0


def test_an_encoder_that_cannot_take_these_pictures_is_a_peer_without_times() -> None:
    class Refusing(Timed):
        def prepare(self, *arguments: object) -> Patches:  # type: ignore[override]
            raise ValueError("patches of 14 pixels")

    assert self_test(Refusing(1.0), 1.0) == ServiceTimes()
