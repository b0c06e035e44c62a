"""An encoder that sends zeros for DeepStack: to see, or to test, that these rows arrive and matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiodisagg.models.base import ItemKind, Patches, VisionEncoder

if TYPE_CHECKING:
    import torch


class WithoutDeepStack:
    """A VisionEncoder whose rows have their input embeddings and nothing else."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder
        self.fingerprint, self.layout = encoder.fingerprint, encoder.layout

    def prepare(self, kind: ItemKind, media: Sequence[bytes], grid_thw: tuple[int, int, int], fps: float) -> Patches:
        return self._encoder.prepare(kind, media, grid_thw, fps)

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        found = [rows.clone() for rows in self._encoder.encode(batch)]  # a tower's own may be read-only
        for rows in found:
            rows[:, self.layout.hidden_size :] = 0
        return found
