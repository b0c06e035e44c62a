"""The JSON files of a model folder. Everything wrong with one is a CheckpointError that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from aiodisagg.errors import CheckpointError


def fail(folder: Path, name: str, message: str) -> NoReturn:
    raise CheckpointError(str(folder), name, message)


def read_json(folder: Path, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file of the folder; ``default`` stands in for a missing file. Raises CheckpointError."""
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is not None:
            return default
        raise CheckpointError(str(folder), name, "no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(str(folder), name, f"cannot be read: {error}") from error
    if not isinstance(value, dict):
        fail(folder, name, "is not a JSON object")
    return value
