"""Encode/language disaggregation for vision-language models on asyncio.

The public names below are imported when they are first used, so that ``import aiodisagg`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from aiodisagg.both.service import BothService
    from aiodisagg.encode.service import EncodeService
    from aiodisagg.engine.types import Delta, FinishReason, SamplingParams, Usage
    from aiodisagg.errors import AiodisaggError
    from aiodisagg.language.service import LanguageService
    from aiodisagg.models.base import ChatMessage, ImagePart, TextPart, VideoPart
    from aiodisagg.peer.config import EncodeConfig, LanguageConfig

_HOMES = {
    "AiodisaggError": "errors",
    "BothService": "both.service",
    "ChatMessage": "models.base",
    "Delta": "engine.types",
    "EncodeConfig": "peer.config",
    "EncodeService": "encode.service",
    "FinishReason": "engine.types",
    "ImagePart": "models.base",
    "LanguageConfig": "peer.config",
    "LanguageService": "language.service",
    "SamplingParams": "engine.types",
    "TextPart": "models.base",
    "Usage": "engine.types",
    "VideoPart": "models.base",
}

__all__ = [
    "AiodisaggError",
    "BothService",
    "ChatMessage",
    "Delta",
    "EncodeConfig",
    "EncodeService",
    "FinishReason",
    "ImagePart",
    "LanguageConfig",
    "LanguageService",
    "SamplingParams",
    "TextPart",
    "Usage",
    "VideoPart",
    "__version__",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
