"""Tiny model folders, built once a session, and pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from aiodisagg.models.synthetic import build_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(moe=True, levels=3, ...)``: a folder from ``build_tiny``, made once for each set of arguments."""
    made: dict[tuple[object, ...], Path] = {}

    def folder(**wanted: object) -> Path:
        key = tuple(sorted(wanted.items()))
        if key not in made:
            made[key] = build_tiny(tmp_path_factory.mktemp("tiny"), **wanted)  # type: ignore[arg-type]
        return made[key]

    return folder
