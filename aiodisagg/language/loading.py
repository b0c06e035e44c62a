"""What a language peer needs of a checkpoint folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiodisagg.models.base import Planner
from aiodisagg.peer.config import LanguageConfig
from aiodisagg.protocol.rows import ModelFingerprint

if TYPE_CHECKING:
    from aiodisagg.models.language import LanguageHalf


def load_language_half(config: LanguageConfig) -> tuple[Planner, LanguageHalf, ModelFingerprint]:
    """Planner, language half and row fingerprint of the folder. Blocking; raises CheckpointError, ConfigError."""
    from aiodisagg.models.loading import check_device, fingerprint, load_language
    from aiodisagg.models.plan import Qwen3VLPlanner

    check_device(config.device)
    planner = Qwen3VLPlanner(config.model, max_pixels=config.max_pixels)  # first: it takes no minute to fail
    half = load_language(config.model, dtype=config.dtype, device=config.device, row_dtype=config.row_dtype)
    return planner, half, fingerprint(config.model, config.row_dtype)
