"""How long things take on one device: what a simulation knows of the hardware, from measurement or from a model.

The shapes are those of the real work. A tower batch pays ``tower_base_ms`` once and for each image what the points
say beyond it, so the attention's square is in the points. A prompt costs the same in one piece or in several, but
for ``prefill_base_ms`` (weights, launches), which each step pays once. A decode step costs what its batch does, and
reads every token of every context. Between points lines are straight; beyond the last one they go on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

import msgspec

from aiodisagg.bench.service_times import Points
from aiodisagg.bench.service_times import ServiceTimes as ServiceTimes
from aiodisagg.engine.pace import Reads
from aiodisagg.engine.schedule import most_tokens
from aiodisagg.errors import ConfigError

PATCHES_PER_TOKEN = 4
"""Patches that merge into one visual token."""


class Curve:
    """Straight lines through points; from ``(0, start)`` to the first one, and on beyond the last one."""

    def __init__(self, points: Points, start: float) -> None:
        self._x = [0.0, *(float(x) for x, _ in points)]
        self._y = [start, *(float(y) for _, y in points)]
        if any(b <= a for a, b in zip(self._x, self._x[1:], strict=False)) or min(self._y) < 0:
            raise ConfigError("times", f"sizes must rise and times must not be below 0: {points}")

    def __call__(self, x: float) -> float:
        last = len(self._x) - 1
        if not last:
            return self._y[0]
        i = min(max(bisect_right(self._x, x), 1), last)
        x0, y0 = self._x[i - 1], self._y[i - 1]
        return y0 + (self._y[i] - y0) * (x - x0) / (self._x[i] - x0)


class Costs:
    """Seconds of each kind of work. Raises ConfigError for times that are none."""

    def __init__(self, times: ServiceTimes) -> None:
        self.times = times
        if not times.tower or not times.prefill or not times.decode:
            raise ConfigError("times", f"{times.name}: tower, prefill and decode need at least one point each")
        for key in ("row_bytes", "prepare_threads", "link_bytes_per_s", "shared_speed", "kv_tokens", "token_budget"):
            if getattr(times, key) <= 0:
                raise ConfigError("times", f"{times.name}: {key} must be above 0")
        self._tower = Curve(times.tower, times.tower_base_ms)
        self._prefill = Curve(times.prefill, times.prefill_base_ms)
        self._decode = Curve(times.decode, times.decode[0][1])
        self._prepare = Curve(times.prepare, 0.0)
        self._beside = Curve(times.beside, 0.0) if times.beside else None
        self._base_s = times.prefill_base_ms / 1e3
        self._context_s = times.decode_context_us / 1e6
        self._token_s = (self._prefill(1) - times.prefill_base_ms) / 1e3
        self._decodes: dict[int, float] = {}
        self._images: dict[int, float] = {}
        self._prepares: dict[int, float] = {}

    def tower_s(self, patches: Iterable[int]) -> float:
        """A batch of images of so many patches each."""
        spent = self.times.tower_base_ms / 1e3
        for count in patches:
            more = self._images.get(count)
            if more is None:
                more = self._images[count] = max(self._tower(count) - self.times.tower_base_ms, 0.0) / 1e3
            spent += more
        return spent

    def prepare_s(self, patches: int) -> float:
        spent = self._prepares.get(patches)
        if spent is None:
            spent = self._prepares[patches] = self._prepare(patches) / 1e3
        return spent

    def decode_s(self, requests: int, context: float) -> float:
        """A step of nothing but decodes; ``context``: tokens of all of them."""
        found = self._decodes.get(requests)
        if found is None:
            found = self._decodes[requests] = self._decode(requests) / 1e3
        return found + self._context_s * context

    def mixed_s(self, prefills: Sequence[tuple[int, int]], decodes: int, context: float) -> float:
        """A step that computes ``[start, stop)`` of some prompts and decodes for others."""
        spent = self._base_s + self._beside_s(decodes) + self._context_s * context
        for start, stop in prefills:
            spent += (self._prefill(stop) - self._prefill(start)) / 1e3
        return max(spent, self.decode_s(decodes, context)) if decodes else spent

    def _beside_s(self, decodes: int) -> float:
        if not decodes or self._beside is None:
            return decodes * self._token_s
        return self._beside(decodes) / 1e3

    def prefill_s(self, tokens: int) -> float:
        """One prompt alone, in steps of the token budget."""
        budget = self.times.token_budget
        steps = 1 + max(0, -(-(tokens - most_tokens(budget)) // budget))
        return self._prefill(tokens) / 1e3 + (steps - 1) * self._base_s

    def transfer_s(self, tokens: int) -> float:
        """Moving the rows of an item, without the way there and back."""
        return tokens * self.times.row_bytes / self.times.link_bytes_per_s

    def prompt(self, images: Sequence[int], text: int) -> int:
        """Tokens of a prompt; ``images``: rows of each."""
        around = self.times.prompt_tokens + self.times.image_tokens * len(images)
        return around + sum(images) + max(text, 1)

    def rows(self, visual_tokens: int) -> int:
        """Of an image."""
        return max(visual_tokens, self.times.least_rows)

    def local_s(self, tokens: int) -> float:
        """The same within a peer."""
        rate = self.times.local_bytes_per_s
        return tokens * self.times.row_bytes / rate if rate else 0.0

    def planned_s(self, images: int) -> float:
        """Before anything of a request may begin."""
        return (self.times.request_ms + images * self.times.image_ms) / 1e3

    @property
    def reads(self) -> Reads:
        return Reads(self.times.reads_ms / 1e3, self.times.reads_part)

    @property
    def rtt_s(self) -> float:
        return self.times.link_rtt_ms / 1e3

    def unloaded_s(self, images: Sequence[int], prompt: int) -> float:
        """Time to first token of a request that is alone on a monolith; ``images``: visual tokens of each."""
        patches = [PATCHES_PER_TOKEN * tokens for tokens in images]
        prepared = sum(self.prepare_s(count) for count in patches) / min(
            self.times.prepare_threads, max(len(patches), 1)
        )
        spent = self.planned_s(len(images)) + prepared + self.prefill_s(prompt)
        return spent + (self.tower_s(patches) + self.local_s(images[-1]) if patches else 0.0)


def profile_names() -> list[str]:
    """Of the profiles that come with the package."""
    files = (resources.files("aiodisagg") / "data" / "times").iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def read_times(name: str) -> ServiceTimes:
    """A profile's name or a file. Raises ConfigError."""
    try:
        if name in profile_names():
            data = (resources.files("aiodisagg") / "data" / "times" / f"{name}.json").read_bytes()
        else:
            data = Path(name).read_bytes()
        return msgspec.json.decode(data, type=ServiceTimes)
    except OSError as error:
        known = ", ".join(profile_names())
        raise ConfigError("times", f"{name!r} is no file and none of the profiles {known}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError("times", f"{name}: {error}") from error
