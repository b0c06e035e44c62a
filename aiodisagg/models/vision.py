"""The encode half of Qwen3-VL: encoded images in, packed rows out.

The tower's blocks attend within one image, or one frame pair of a video, never across; a batch is concatenated
patches and a list of grids. So items of several requests go through the tower together, and each gets the rows it
would get alone (bit for bit on a CPU; on a GPU, matrix products may be tiled by the batch's size).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aiodisagg.errors import MediaError
from aiodisagg.models.base import ItemKind, Patches
from aiodisagg.models.loading import fingerprint, load_vision
from aiodisagg.models.preprocessing import PixelSettings, cut_patches, decode_rgb, fits, load_settings
from aiodisagg.protocol.rows import RowLayout

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
        self._image, self._video = load_settings(Path(folder))
        self._tower = load_vision(folder, dtype=dtype, device=device)
        self.fingerprint = fingerprint(folder, dtype)
        self.layout = RowLayout.of(self.fingerprint)
        self.device = torch.device(device)

    def __repr__(self) -> str:
        return f"<Qwen3VLVisionEncoder {self.fingerprint.architecture} {self.layout} on {self.device}>"

    def prepare(self, kind: ItemKind, media: Sequence[bytes], grid_thw: tuple[int, int, int], fps: float) -> Patches:
        """Decodes, resizes to the grid and cuts into patches; thread-safe. ``fps`` changes no pixel.

        Raises MediaError if the media are no images, or cannot have been planned with ``grid_thw``.
        """
        settings = self._video if kind is ItemKind.VIDEO else self._image
        _check_grid(kind, len(media), grid_thw, settings)
        frames = [decode_rgb(data, f"{kind.value}[{i}]") for i, data in enumerate(media)]
        for i, frame in enumerate(frames):
            if frame.size != frames[0].size or not fits(frame.height, frame.width, grid_thw, settings):
                size = f"{frame.width} x {frame.height} pixels"
                raise MediaError(f"{kind.value}[{i}]", f"{size} do not give a grid of {grid_thw}")
        return Patches(torch.from_numpy(cut_patches(frames, grid_thw, settings)), grid_thw)

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        """Runs the tower once: for each item packed rows [rows, (1+k)*h] of ``layout.dtype``, contiguous, on
        ``device``. One call at a time."""
        if not batch:
            return []
        with torch.inference_mode():
            pixels = torch.cat([patches.pixel_values for patches in batch]).to(self.device, self._tower.dtype)
            grids = torch.tensor([patches.grid_thw for patches in batch], device=self.device)
            out: Any = self._tower(pixels, grid_thw=grids, return_dict=True)
            packed = torch.cat([out.pooler_output, *out.deepstack_features], dim=-1)
        merged = self._image.merge**2
        counts = [patches.count // merged for patches in batch]
        return [rows.contiguous() for rows in torch.split(packed, counts)]


def _check_grid(kind: ItemKind, media: int, grid_thw: tuple[int, int, int], settings: PixelSettings) -> None:
    t, h, w = grid_thw
    wanted = max(1, -(-media // settings.temporal_patch)) if kind is ItemKind.VIDEO else 1
    if media < 1 or t != wanted or (kind is ItemKind.IMAGE and media != 1):
        raise MediaError(kind.value, f"{media} pictures do not give a grid of {grid_thw}")
    pixels = t * h * w * settings.patch**2 * (settings.temporal_patch if kind is ItemKind.VIDEO else 1)
    limit = max(settings.max_pixels, settings.min_pixels, t * settings.temporal_patch * settings.factor**2 * 200)
    if min(h, w) < 1 or pixels > _SLACK * limit:
        raise MediaError(kind.value, f"a grid of {grid_thw} is larger than this model's {settings.max_pixels} pixels")
