"""The table of limits says what holds."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from aiodisagg.api import HttpConfig

PAGE = Path(__file__).parents[2] / "docs" / "http.md"
UNITS = {"": 1, "MiB": 1 << 20, "Mi": 1 << 20}


def test_the_table_of_limits_has_all_of_them() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) ?(\w*) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    told = {name: int(count) * UNITS[unit] for name, count, unit in rows}
    config = HttpConfig()
    numbers = {own.name: getattr(config, own.name) for own in fields(config)}
    assert told == {name: value for name, value in numbers.items() if isinstance(value, int | float)}
