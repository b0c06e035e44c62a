"""Whole numbers by chance, as a workload is described: weighted ranges, or the quantiles that somebody published.

Pure: whoever draws brings the generator. A distribution is written as text like ``4``, ``1-8`` (each equally likely),
``1,2,4`` or, with weights, ``0:0.5,1-8:0.5``.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from random import Random

from aiodisagg.errors import ConfigError

TOKEN_SIDE = 32
"""Pixels of a visual token's side."""
_RANGE = re.compile(r"(\d+)(?:-(\d+))?(?::(\d+(?:\.\d+)?))?")


@dataclass(frozen=True, slots=True)
class Ranges:
    """``parts``: (low, high, weight), both ends included; a part by its weight, then a number in it uniformly.

    Raises ConfigError for parts that are none.
    """

    parts: tuple[tuple[int, int, float], ...]

    def __post_init__(self) -> None:
        if not any(weight > 0 for _, _, weight in self.parts):
            raise ConfigError("ranges", "at least one needs a weight above 0")
        for low, high, weight in self.parts:
            if not 0 <= low <= high or not 0 <= weight < math.inf:
                raise ConfigError("ranges", f"{low}-{high}:{weight:g} is none")

    def draw(self, random: Random) -> int:
        low, high, _ = random.choices(self.parts, [weight for _, _, weight in self.parts])[0]
        return random.randint(low, high)

    def scaled(self, factor: float) -> Ranges:
        """All numbers times ``factor``, at least 1; a 0 stays one."""
        return Ranges(tuple((_scaled(low, factor), _scaled(high, factor), weight) for low, high, weight in self.parts))


@dataclass(frozen=True, slots=True)
class Quantiles:
    """``points``: (probability, value) in rising order, at least two, all values above 0.

    Between two points the logarithm of the value is linear in the probability; the first and the last piece go on to
    the probabilities 0 and 1, so values are bounded. Draws are rounded and at least 1. Raises ConfigError.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        chances = [p for p, _ in self.points]
        values = [value for _, value in self.points]
        if len(chances) < 2 or chances != sorted(set(chances)) or not 0 <= chances[0] <= chances[-1] <= 1:
            raise ConfigError("quantiles", f"probabilities must rise within 0..1: {chances}")
        if values != sorted(values) or values[0] <= 0:
            raise ConfigError("quantiles", f"values must be above 0 and must not fall: {values}")

    def at(self, probability: float) -> float:
        """The value that this share of all draws stays below."""
        chances = [p for p, _ in self.points]
        place = min(max(bisect_right(chances, probability), 1), len(chances) - 1)
        (left, low), (right, high) = self.points[place - 1], self.points[place]
        return float(low * (high / low) ** ((probability - left) / (right - left)))

    def draw(self, random: Random) -> int:
        return max(1, round(self.at(random.random())))

    def scaled(self, factor: float) -> Quantiles:
        """All values times ``factor``."""
        return Quantiles(tuple((p, value * factor) for p, value in self.points))


Distribution = Ranges | Quantiles


def exactly(value: int) -> Ranges:
    return Ranges(((value, value, 1.0),))


def parse_ranges(key: str, text: str) -> Ranges:
    """``4``, ``1-8``, ``1,2,4``, ``0:0.5,1-8:0.5``. A part without a weight weighs as much as it has numbers, so that
    ``1-3,8`` are four equally likely ones. Raises ConfigError with ``key``."""
    parts = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            raise ConfigError(key, f"{part.strip()!r} is no number, range or range:weight")
        low = int(found[1])
        high = int(found[2] or low)
        parts.append((low, high, float(found[3]) if found[3] else float(high - low + 1)))
    try:
        return Ranges(tuple(parts))
    except ConfigError as error:
        raise ConfigError(key, f"{text!r}: {error}") from error


def parse_sizes(key: str, text: str) -> tuple[tuple[int, int], ...]:
    """``1280x720,1920x1080``: (width, height) in pixels. Raises ConfigError with ``key``."""
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part.strip())
        if found is None:
            raise ConfigError(key, f"{part.strip()!r} is no WIDTHxHEIGHT")
        sizes.append((int(found[1]), int(found[2])))
    return tuple(sizes)


def size_of_tokens(tokens: int) -> tuple[int, int]:
    """(width, height) in pixels of a picture of about ``tokens`` >= 1 visual tokens of 32 x 32 pixels each: the nearest
    product of two sides of at most 2:1, the widest among equals."""
    shapes = []
    for rows in range(max(1, math.isqrt(tokens // 2)), math.isqrt(tokens) + 2):
        shapes += [(min(max(columns, rows), 2 * rows), rows) for columns in (tokens // rows, -(-tokens // rows))]
    columns, rows = min(shapes, key=lambda shape: abs(shape[0] * shape[1] - tokens))
    return columns * TOKEN_SIDE, rows * TOKEN_SIDE


def visual_tokens(width: int, height: int) -> int:
    """Of a picture that no pixel limit changes."""
    return max(1, round(width / TOKEN_SIDE)) * max(1, round(height / TOKEN_SIDE))


def _scaled(value: int, factor: float) -> int:
    return max(1, round(value * factor)) if value else 0
