"""The path of accelerators, run on the CPU: rows of the fused tower, and pixels cut by tensor operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from aiodisagg.device.alone import Alone
from aiodisagg.models import tower as tower_module
from aiodisagg.models import tower_kernels as kernels_module
from aiodisagg.models import triton_pixels, triton_vision
from aiodisagg.models.base import ItemKind
from aiodisagg.models.device_pixels import TORCH, Pixels, fastest_pixels
from aiodisagg.models.tower import (
    GRIDS_KEPT,
    Attend,
    BySize,
    FusedTower,
    add_norm,
    grow,
    grow_at_once,
    sdpa,
    turn,
)
from aiodisagg.models.tower_kernels import SIZES
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from tests.models.halves import noise, png

Tiny = Callable[..., Path]
TRITON = Pixels(triton_pixels.resize_along, triton_pixels.patches)
ITEMS = [
    (ItemKind.IMAGE, (png(100, 70),), (1, 4, 6)),
    (ItemKind.IMAGE, (png(64, 64, 3),), (1, 4, 4)),
    (ItemKind.IMAGE, (png(64, 64, 4),), (1, 4, 4)),
    (ItemKind.VIDEO, tuple(png(64, 96, i) for i in range(5)), (3, 6, 4)),
    (ItemKind.IMAGE, (png(33, 128, 5),), (1, 8, 2)),
]


@pytest.mark.parametrize("moe", [True, False])
def test_rows_are_transformers(tiny: Tiny, moe: bool) -> None:
    encoder = Qwen3VLVisionEncoder(tiny(moe=moe), dtype=torch.float32)
    patches = [encoder.prepare(kind, media, grid, 2.0) for kind, media, grid in ITEMS]
    expected = encoder.encode(patches)
    encoder.fused = FusedTower(encoder._tower)
    for found, wanted in zip(encoder.encode(patches), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    for patch, wanted in zip(patches, expected, strict=True):  # alone, with positions that are kept by now
        torch.testing.assert_close(encoder.encode([patch])[0], wanted, atol=2e-5, rtol=1e-5)


def test_positions_of_a_few_grids_are_kept(tiny: Tiny) -> None:
    tower = FusedTower(Qwen3VLVisionEncoder(tiny(), dtype=torch.float32)._tower)
    first = tower.positions((1, 4, 4))
    assert tower.positions((1, 4, 4)) is first
    for i in range(1, GRIDS_KEPT):
        tower.positions((1, 2, 2 * i))
    assert tower.positions((1, 4, 4)) is first
    for i in range(1, GRIDS_KEPT):
        tower.positions((1, 6, 2 * i))
    assert tower.positions((1, 4, 4)) is first  # it was asked for after those that have left
    for i in range(GRIDS_KEPT):
        tower.positions((1, 8, 2 * i + 2))
    assert tower.positions((1, 4, 4)) is not first


@pytest.mark.parametrize("head_dim", [16, 72, 80])
@pytest.mark.parametrize("way", [triton_vision.Tiles(64, 32, 4, 2), sdpa(None, 96)], ids=["triton", "padded"])
def test_attention_within_segments(way: Attend, head_dim: int) -> None:
    qkv = torch.randn(2 * 70, 3, 1, head_dim)
    wanted, found = torch.empty(2, 140, 1, head_dim)
    sdpa(None)(qkv, 2, 70, wanted, 0.2)
    way(qkv, 2, 70, found, 0.2)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [12, 72])
def test_rope_in_place(head_dim: int) -> None:
    qkv, (cos, sin) = torch.randn(3, 3, 5, head_dim), torch.randn(2, 3, head_dim)
    wanted = turn(qkv.clone(), cos, sin)
    assert triton_vision.turn(qkv, cos, sin) is qkv
    torch.testing.assert_close(qkv, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [32, 72])
def test_a_residual_and_its_norm(size: int) -> None:
    norm = torch.nn.LayerNorm(size, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, delta = 3 + torch.randn(5, size), torch.randn(5, size)
    wanted, normed = add_norm(x, delta, norm)
    with torch.inference_mode():
        found, out = triton_vision.add_norm(x, delta, norm)
    assert found is x, "it takes no other memory"
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(out, normed, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("patches", "every"), [(24, 2), (12, 4), (600, 1)])
def test_a_tower_looks_whether_a_step_wants_the_device(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, patches: int, every: int
) -> None:
    """The more often, the longer a block takes, and before the first one in any case."""
    monkeypatch.setattr(tower_module, "WAIT_PATCHES", 48)
    tower = FusedTower(Qwen3VLVisionEncoder(tiny(), dtype=torch.float32)._tower)
    done: list[str] = []

    class Recorded(Alone):
        def wait(self) -> None:
            done.append("wait")

    tower.alone = Recorded(torch.zeros(2, dtype=torch.int32))
    grid = (1, 2, patches // 2)
    hidden = tower.block.norm1.weight.shape[0]
    values = tower._patch.shape[1]

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        done.append("block")
        return torch.zeros(patches, hidden)

    tower.compute(torch.zeros(patches, values), tower.positions(grid), attend)
    blocks = done.count("block")
    assert blocks > 1
    assert done == [what for i in range(blocks) for what in (["wait", "block"] if i % every == 0 else ["block"])]


def test_an_activation_inside_of_its_product(tiny: Tiny) -> None:
    mlp = FusedTower(Qwen3VLVisionEncoder(tiny(), dtype=torch.float32)._tower).block.mlp
    x = 3 * torch.randn(7, mlp.linear_fc1.in_features)
    # On a CPU torch's product has GELU by erf in it, on an accelerator by tanh; they differ in the fourth digit.
    torch.testing.assert_close(grow_at_once(mlp, x), grow(mlp, x), atol=1e-3, rtol=1e-3)


def test_kernels_that_disagree_are_not_used(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Qwen3VLVisionEncoder(tiny(), dtype=torch.float32)
    patches = [encoder.prepare(kind, media, grid, 2.0) for kind, media, grid in ITEMS]
    wanted = encoder.encode(patches)
    encoder._tower.blocks[0].mlp.act_fn = torch.nn.ReLU()  # not what is in the product
    right = triton_vision.add_norm
    monkeypatch.setattr(triton_vision, "add_norm", lambda x, delta, norm: (right(x, delta, norm)[0], 2 * x))
    monkeypatch.setattr(triton_vision, "turn", lambda qkv, cos, sin: 1 / 0)
    encoder.use_fused()
    for what in (
        "rope kernel is not used: ZeroDivisionError",
        "norm kernel is not used: it is off",
        "activation kernel",
    ):
        assert what in caplog.text
    encoder._tower.blocks[0].mlp.act_fn = encoder._tower.blocks[1].mlp.act_fn
    for found, expected in zip(encoder.encode(patches), wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "used"), [("gelu_pytorch_tanh", True), ("quick_gelu", False)])
def test_another_activation_is_not_taken_for_the_one_that_a_product_has(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str, used: bool
) -> None:
    """Also not one that would pass the comparison."""

    def alike(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        return grow(mlp, x)

    monkeypatch.setattr(kernels_module, "grow_at_once", alike)
    # The others are slow where they are interpreted.
    monkeypatch.setattr(kernels_module, "candidates", lambda *_: {"sdpa": sdpa(None)})
    monkeypatch.setattr(triton_vision, "turn", turn)
    monkeypatch.setattr(triton_vision, "add_norm", add_norm)
    encoder = Qwen3VLVisionEncoder(tiny(), dtype=torch.float32)
    encoder._tower.config.hidden_act = name
    encoder.use_fused()
    assert encoder.fused is not None and (encoder.fused.grow is alike) is used


@pytest.mark.parametrize(
    ("pixels", "height", "width"),
    [(TORCH, 64, 96), (TORCH, 70, 96), (TORCH, 64, 90), (TORCH, 160, 224), (TRITON, 80, 90), (TRITON, 33, 20)],
)
def test_resize_is_pillows(pixels: Pixels, height: int, width: int) -> None:
    exact = int(PIL.__version__.split(".")[0]) < 13 or height == 70 or width == 90
    for image in (noise(90, 70), noise(9, 7).resize((90, 70), Image.Resampling.BICUBIC)):
        wanted = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        off = np.abs(pixels.resize(torch.from_numpy(np.array(image))[None], height, width)[0].numpy() - wanted)
        # Pillow 13 may take the columns first: other bytes in between, and others are clipped where there is noise.
        assert off.max() == 0 if exact else np.mean(off) < 0.5
    if not exact:
        assert off.max() <= 2  # of what looks like a picture


@pytest.mark.parametrize("pixels", [TORCH, TRITON], ids=["torch", "triton"])
@pytest.mark.parametrize("item", range(len(ITEMS)))
def test_pixels_cut_on_the_device(tiny: Tiny, item: int, pixels: Pixels) -> None:
    """``prepare`` leaves the bytes of an image, and the tower gets what it would have got."""
    kind, media, grid = ITEMS[item]
    encoder = Qwen3VLVisionEncoder(tiny(), dtype=torch.float32)
    encoder._on_device = pixels
    wanted = encoder._pixels(encoder.prepare(kind, media, grid, 2.0))
    encoder.cuts_on_device = True
    patches = encoder.prepare(kind, media, grid, 2.0)
    assert patches.pixel_values.dtype is (torch.uint8 if kind is ItemKind.IMAGE else torch.float32)
    assert patches.count == wanted.shape[0]
    difference = (encoder._pixels(patches) - wanted).abs()
    assert difference.max() <= 0.0079  # one level of 255, on a scale of -1 to 1
    assert difference.mean() <= 0.002


@pytest.mark.parametrize("frames", [2, 3])
def test_patches_of_frames_by_a_kernel(tiny: Tiny, frames: int) -> None:
    """Of several frames, too, and the last one twice where one is missing."""
    settings = Qwen3VLVisionEncoder(tiny(), dtype=torch.float32)._image
    pictures = torch.randint(256, (frames, 70, 90, 3), dtype=torch.uint8)
    grid = -(-frames // settings.temporal_patch), 2 * settings.merge, 3 * settings.merge
    found, wanted = (way.cut(pictures, grid, settings, torch.bfloat16) for way in (TRITON, TORCH))
    assert found.dtype is torch.bfloat16 and torch.equal(found, wanted)


def test_pixels_by_kernels_that_agree(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Qwen3VLVisionEncoder(tiny(), dtype=torch.float32)._image
    cpu = torch.device("cpu")
    assert fastest_pixels(settings, torch.float32, cpu) == TRITON
    right = triton_pixels.resize_along
    monkeypatch.setattr(triton_pixels, "resize_along", lambda *what: right(*what) ^ 1)
    assert fastest_pixels(settings, torch.float32, cpu) is TORCH
    assert "kernels for pixels are not used: they disagree" in caplog.text
    monkeypatch.setattr(triton_pixels, "patches", lambda *what: 1 / 0)
    assert fastest_pixels(settings, torch.float32, cpu) is TORCH
    assert "kernels for pixels are not used: ZeroDivisionError" in caplog.text


def test_each_size_of_a_segment_is_attended_to_by_what_was_fastest_there(tiny: Tiny) -> None:
    asked: list[tuple[str, int]] = []

    def way(name: str) -> Attend:
        return lambda qkv, segments, size, out, scaling: asked.append((name, size))

    attend = BySize(((100, way("few")), (1000, way("some")), (5000, way("many"))))
    for size in (1, 999, 1000, 4999, 5000, 10**6):
        attend(torch.empty(0), 1, size, torch.empty(0), 1.0)
    assert [name for name, _ in asked] == ["few", "few", "some", "some", "many", "many"]

    encoder = Qwen3VLVisionEncoder(tiny(), dtype=torch.float32)
    patches = [encoder.prepare(kind, media, grid, 2.0) for kind, media, grid in ITEMS]
    wanted = encoder.encode(patches)
    measured = encoder.use_fused()
    assert set(measured) == set(SIZES) and all("sdpa" in found for found in measured.values())
    for found, expected in zip(encoder.encode(patches), wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
