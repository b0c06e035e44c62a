"""The encode half of Qwen3-VL: encoded images in, packed rows out.

The tower's blocks attend within one image, or one frame pair of a video, never across; a batch is concatenated
patches and a list of grids. So items of several requests go through the tower together, and each gets the rows it
would get alone (bit for bit on a CPU; on a GPU, matrix products may be tiled by the batch's size).
"""

# torch declares no types for streams, events and some methods.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from aiodisagg.errors import MediaError
from aiodisagg.models.base import ItemKind, Patches
from aiodisagg.models.device_pixels import TORCH, can_resize, fastest_pixels
from aiodisagg.models.loading import fingerprint, load_vision
from aiodisagg.models.preprocessing import PixelSettings, cut_patches, decode_rgb, fits, load_settings, resized
from aiodisagg.models.tower import FusedTower
from aiodisagg.models.tower_kernels import choose_kernels
from aiodisagg.protocol.rows import ModelFingerprint, RowLayout

_SLACK = 4
"""A grid may pass the folder's pixel limit by rounding (thin images); beyond this factor it is not a grid of ours."""


class Qwen3VLVisionEncoder:
    """:class:`~aiodisagg.models.base.VisionEncoder` for a Qwen3-VL or Qwen3-VL-MoE folder.

    Args:
        folder: the checkpoint; only its vision tensors are read.
        dtype: of the tower and so of the rows. device: where the tower runs and its rows are left.

    Raises CheckpointError.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: str | torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
    ) -> None:
        tower = load_vision(folder, dtype=dtype, device=device)
        self._image, self._video = load_settings(Path(folder))
        self._start(tower, fingerprint(folder, dtype), device)

    @classmethod
    def of(
        cls, tower: Any, model: ModelFingerprint, settings: tuple[PixelSettings, PixelSettings]
    ) -> Qwen3VLVisionEncoder:
        """An encoder around a tower that is on its device already. ``settings``: of images and of videos."""
        made = cls.__new__(cls)
        made._image, made._video = settings
        made._start(tower, model, next(tower.parameters()).device)
        return made

    def _start(self, tower: Any, model: ModelFingerprint, device: str | torch.device) -> None:
        self._tower, self.fingerprint, self.layout = tower, model, RowLayout.of(model)
        self.device = torch.device(device)
        self.fused: FusedTower | None = None
        self._on_device = TORCH
        self.cuts_on_device = False
        """Whether ``prepare`` only decodes images, and ``encode`` resizes and cuts them."""
        if self.device.type == "cuda":
            self.use_fused()
            self.cuts_on_device = can_resize(self._image)
            if self.cuts_on_device:
                with torch.inference_mode(), self._here():
                    self._on_device = fastest_pixels(self._image, tower.dtype, self.device)

    def _here(self) -> AbstractContextManager[object]:
        """Makes the tower's device this thread's current one: for kernels, and for what pins memory."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def use_fused(self) -> dict[int, dict[str, float]]:
        """Has the tower run by kernels chosen on its device; times of its attention, see ``choose_kernels``."""
        self.fused = FusedTower(self._tower)
        with torch.inference_mode(), self._here():
            return choose_kernels(self.fused, self._tower.dtype, self.device)

    def __repr__(self) -> str:
        return f"<Qwen3VLVisionEncoder {self.fingerprint.architecture} {self.layout} on {self.device}>"

    def prepare(self, kind: ItemKind, media: Sequence[bytes], grid_thw: tuple[int, int, int], fps: float) -> Patches:
        """Decodes, resizes to the grid and cuts into patches; thread-safe. ``fps`` changes no pixel.

        Raises MediaError if the media are no images, or cannot have been planned with ``grid_thw``.
        """
        settings = self._video if kind is ItemKind.VIDEO else self._image
        _check_grid(kind, len(media), grid_thw, settings)
        frames: list[np.ndarray] = []
        size = (0, 0)
        for i, data in enumerate(media):
            frame = decode_rgb(data, f"{kind.value}[{i}]")
            size = size if frames else frame.size
            if frame.size != size or not fits(frame.height, frame.width, grid_thw, settings):
                what = f"{frame.width} x {frame.height} pixels"
                raise MediaError(f"{kind.value}[{i}]", f"{what} do not give a grid of {grid_thw}")
            if self.cuts_on_device and kind is ItemKind.IMAGE:  # a video is taken apart by its patches: they are needed
                with self._here():
                    return Patches(_bytes_of(frame, pinned=self.device.type == "cuda"), grid_thw)
            frames.append(resized(frame, grid_thw, settings))  # one at a time: files are small, what is in them is not
        return Patches(torch.from_numpy(cut_patches(frames, grid_thw, settings)), grid_thw)

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        """Runs the tower once: for each item packed rows [rows, (1+k)*h] of ``layout.dtype``, contiguous, on
        ``device``. One call at a time; on a GPU by the current stream, which is not waited for."""
        if not batch:
            return []
        with torch.inference_mode(), self._here():
            return self._encode(batch)

    def _encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        grids = [patches.grid_thw for patches in batch]
        parts = [self._pixels(patches) for patches in batch]
        pixels = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.fused is not None:
            packed = self.fused(pixels, grids)
        else:
            out: Any = self._tower(pixels, grid_thw=torch.tensor(grids, device=self.device), return_dict=True)
            packed = torch.cat([out.pooler_output, *out.deepstack_features], dim=-1)
        merged = self._image.merge**2
        return [rows.contiguous() for rows in torch.split(packed, [patches.count // merged for patches in batch])]

    def _pixels(self, patches: Patches) -> torch.Tensor:
        """Patches in the tower's dtype on its device."""
        values = patches.pixel_values.to(self.device, non_blocking=True)
        if values.dtype is not torch.uint8:
            return values.to(self._tower.dtype)
        return self._on_device.cut(values, patches.grid_thw, self._image, self._tower.dtype)


def _bytes_of(frame: Image.Image, *, pinned: bool) -> torch.Tensor:
    """uint8 [1, H, W, 3]; pinned, so that the copy to the device is asynchronous."""
    made = torch.empty(1, frame.height, frame.width, 3, dtype=torch.uint8, pin_memory=pinned)
    np.copyto(made[0].numpy(), np.asarray(frame))
    return made


def _check_grid(kind: ItemKind, media: int, grid_thw: tuple[int, int, int], settings: PixelSettings) -> None:
    t, h, w = grid_thw
    wanted = max(1, -(-media // settings.temporal_patch)) if kind is ItemKind.VIDEO else 1
    if media < 1 or t != wanted or (kind is ItemKind.IMAGE and media != 1):
        raise MediaError(kind.value, f"{media} pictures do not give a grid of {grid_thw}")
    pixels = t * h * w * settings.patch**2 * (settings.temporal_patch if kind is ItemKind.VIDEO else 1)
    limit = max(settings.max_pixels, settings.min_pixels, t * settings.temporal_patch * settings.factor**2 * 200)
    if min(h, w) < 1 or pixels > _SLACK * limit:
        raise MediaError(kind.value, f"a grid of {grid_thw} is larger than this model's {settings.max_pixels} pixels")
