"""Model folders, built once a session; every test here must leave nothing of this process behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from aiodisagg.models.synthetic import TINY, build_synthetic
from aiodisagg.scheduler.book import PeerBook
from tests.models.conftest import tiny

__all__ = ["moe", "tiny", "wide"]

# pyzmq keeps one thread with a context of its own for the whole process from its first send without a copy.
zmq.Frame(b"", copy=False)


@pytest.fixture(autouse=True)
def _first_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal encode peers the first by name is asked, not one by chance: many tests hold up one of them."""
    monkeypatch.setattr(PeerBook, "doubt", 0.0)


@pytest.fixture(scope="session")
def moe(tiny: Callable[..., Path]) -> Path:
    """A tiny MoE with three DeepStack levels."""
    return tiny(moe=True, levels=3)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a real model's size (hidden 1024, k = 3); everything else as small as it can be."""
    size = dataclasses.replace(
        TINY, hidden=1024, layers=3, intermediate=64, experts=2, experts_per_token=1, moe_intermediate=16, heads=2,
        kv_heads=1, vision_depth=3, image_pixels=(1024, 1 << 20),
    )  # fmt: skip
    return build_synthetic(tmp_path_factory.mktemp("wide"), size, levels=3)
