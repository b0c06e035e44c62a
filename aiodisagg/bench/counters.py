"""What servers counted while they were measured, from their metrics in Prometheus' text format. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

_LINE = re.compile(r"^([a-zA-Z_:][\w:]*_total)(\{.*\})? (\S+)", re.MULTILINE)


def parse_counters(texts: Iterable[str]) -> dict[str, float]:
    """Every counter by name and labels, summed over the pages of several servers."""
    found: dict[str, float] = {}
    for text in texts:
        for name, labels, value in _LINE.findall(text):
            try:
                number = float(value)
            except ValueError:
                continue
            if math.isfinite(number):
                found[name + labels] = found.get(name + labels, 0.0) + number
    return found


def grown(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """By how much each counter grew; those that did not are left out."""
    return {name: value - before.get(name, 0.0) for name, value in after.items() if value != before.get(name, 0.0)}


def row_bytes(page: str, outcome: str) -> float:
    """Bytes of rows with this outcome."""
    name, label = "aiodisagg_row_bytes_total{", f'outcome="{outcome}"'
    return sum(value for key, value in parse_counters([page]).items() if key.startswith(name) and label in key)
