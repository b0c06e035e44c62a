"""Requests to be sent or simulated: when they come, what pictures they carry, how long they read and write.

Pure and seeded: equal descriptions and seeds give equal requests, on every machine. Each field is drawn from a
generator of its own, so that changing one (another rate, other texts) leaves the others as they were; arrival times
at another rate are the same ones, stretched. A trace file holds one request a line as JSON; whoever replays it, a
load generator or a simulator, gets the same requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import msgspec

from aiodisagg.bench.distributions import Distribution, size_of_tokens, visual_tokens
from aiodisagg.errors import ConfigError


def check(key: str, values: Iterable[float], *, least: float = -math.inf, above: float = -math.inf) -> None:
    """Raises ConfigError if one of an option's numbers is out of range, or none."""
    for value in values:
        if not (least <= value < math.inf and value > above):
            wanted = f"above {above:g}" if above > least else f"at least {least:g}"
            raise ConfigError(key, f"must be {wanted}, not {value:g}")


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """A picture of ``width`` x ``height`` pixels. Equal identities within one workload are the same picture."""

    identity: int
    width: int
    height: int

    @property
    def visual_tokens(self) -> int:
        """For a model with tokens of 32 x 32 pixels, unless its pixel limits resize the picture."""
        return visual_tokens(self.width, self.height)


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """``arrival_s``: after the start; in a closed loop all are there from the start and wait for their turn."""

    arrival_s: float
    images: tuple[ImageSpec, ...]
    text_tokens: int
    output_tokens: int
    tenant: str = ""
    priority: int = 0
    """Lower goes first."""

    @property
    def visual_tokens(self) -> int:
        return sum(image.visual_tokens for image in self.images)


# -- when ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Closed:
    """``concurrency`` requests at a time: whenever one ends, the next is sent."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError("concurrency", f"must be at least 1, not {self.concurrency}")

    def arrivals(self, random: Random) -> Iterator[float]:
        while True:
            yield 0.0


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gaps between requests from a gamma distribution of mean ``1 / rate_per_s`` and coefficient of variation ``cv``:
    1 is a Poisson process, more is burstier, 0 is a metronome."""

    rate_per_s: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.rate_per_s < math.inf:
            raise ConfigError("rate", f"must be above 0, not {self.rate_per_s:g}")
        if not 0 <= self.cv < math.inf:
            raise ConfigError("cv", f"must be at least 0, not {self.cv:g}")

    def arrivals(self, random: Random) -> Iterator[float]:
        at = 0.0
        while True:
            if self.cv == 0:
                gap = 1.0
            elif self.cv == 1:
                gap = random.expovariate(1.0)
            else:
                gap = random.gammavariate(self.cv**-2, self.cv**2)
            at += gap / self.rate_per_s
            yield at


Arrivals = Closed | Gamma


# -- what ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tenant:
    """``share``: of all requests, in proportion to the other tenants'."""

    name: str
    share: float = 1.0
    priority: int = 0


def parse_tenants(key: str, text: str) -> tuple[Tenant, ...]:
    """``big:3,small:1,urgent:1:-1``: name, share and priority. Raises ConfigError with ``key``."""
    found = []
    for part in text.split(","):
        name, *numbers = part.strip().split(":")
        try:
            share, priority = float(numbers[0]) if numbers else 1.0, int(numbers[1]) if len(numbers) > 1 else 0
        except ValueError as error:
            raise ConfigError(key, f"{part.strip()!r} is no name:share:priority") from error
        if not name or len(numbers) > 2 or not 0 < share < math.inf:
            raise ConfigError(key, f"{part.strip()!r} is no name:share:priority")
        found.append(Tenant(name, share, priority))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Mix:
    """What requests are made of; fields are drawn independently.

    ``sizes``: of pictures, either (width, height) in pixels, each equally likely, or visual tokens.
    ``pool`` and ``reuse``: so many pictures are shared, and each picture of a request is one of them with this chance.
    """

    images: Distribution
    sizes: tuple[tuple[int, int], ...] | Distribution
    text_tokens: Distribution
    output_tokens: Distribution
    pool: int = 0
    reuse: float = 0.0
    tenants: tuple[Tenant, ...] = ()

    def __post_init__(self) -> None:
        if self.sizes == ():
            raise ConfigError("sizes", "at least one is needed")
        if not 0 <= self.reuse <= 1:
            raise ConfigError("reuse", f"must be within 0..1, not {self.reuse:g}")
        if self.pool < 0 or (self.reuse > 0 and self.pool == 0):
            raise ConfigError("pool", "reuse needs a pool of at least one picture")

    def scaled(self, *, visual: float = 1.0, text: float = 1.0, output: float = 1.0) -> Mix:
        """The same mix for a smaller machine: visual tokens of each picture, text and answers times a factor."""
        if isinstance(self.sizes, tuple):
            sides = math.sqrt(visual)
            pixels = ((round(width * sides), round(height * sides)) for width, height in self.sizes)
            sizes: tuple[tuple[int, int], ...] | Distribution = tuple((max(1, w), max(1, h)) for w, h in pixels)
        else:
            sizes = self.sizes.scaled(visual)
        texts, outputs = self.text_tokens.scaled(text), self.output_tokens.scaled(output)
        return Mix(self.images, sizes, texts, outputs, self.pool, self.reuse, self.tenants)


def generate(mix: Mix, arrivals: Arrivals, count: int, seed: int = 0) -> tuple[WorkloadRequest, ...]:
    """``count`` requests in the order of their arrival."""
    when, how_many, sizes, shared, texts, outputs, who = (
        Random(f"{seed}/{field}") for field in ("arrivals", "images", "sizes", "pool", "text", "output", "tenants")
    )
    tenants = mix.tenants or (Tenant(""),)
    pool = [_image(mix, identity, shared) for identity in range(mix.pool)]
    unique = len(pool)
    made = []
    for _, arrival_s in zip(range(count), arrivals.arrivals(when), strict=False):
        images = []
        for _ in range(mix.images.draw(how_many)):
            if mix.reuse > shared.random():
                images.append(pool[shared.randrange(len(pool))])
            else:
                images.append(_image(mix, unique, sizes))
                unique += 1
        tenant = who.choices(tenants, [one.share for one in tenants])[0]
        text, output = mix.text_tokens.draw(texts), max(1, mix.output_tokens.draw(outputs))
        made.append(WorkloadRequest(arrival_s, tuple(images), text, output, tenant.name, tenant.priority))
    return tuple(made)


def _image(mix: Mix, identity: int, random: Random) -> ImageSpec:
    if isinstance(mix.sizes, tuple):
        return ImageSpec(identity, *random.choice(mix.sizes))
    return ImageSpec(identity, *size_of_tokens(mix.sizes.draw(random)))


# -- traces -------------------------------------------------------------------------------------------------------

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(WorkloadRequest).decode


def write_trace(file: Path, requests: Iterable[WorkloadRequest]) -> None:
    """One JSON object a line."""
    file.write_bytes(b"".join(_encode(request) + b"\n" for request in requests))


def read_trace(file: Path) -> tuple[WorkloadRequest, ...]:
    """Requests in the order of their arrival. Raises ConfigError, which names the line, for what is no trace."""
    found = []
    try:
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            if line.strip():
                found.append(_checked(_decode(line), number))
    except (OSError, msgspec.MsgspecError) as error:
        where = f"line {number}: " if isinstance(error, msgspec.MsgspecError) else ""
        raise ConfigError("trace", f"{file}: {where}{error}") from error
    if not found:
        raise ConfigError("trace", f"{file} holds no request")
    return tuple(sorted(found, key=lambda request: request.arrival_s))


def _checked(request: WorkloadRequest, line: int) -> WorkloadRequest:
    sides = [side for image in request.images for side in (image.width, image.height)]
    if not 0 <= request.arrival_s < math.inf or request.text_tokens < 0 or request.output_tokens < 1:
        raise ConfigError("trace", f"line {line}: a time or a length is out of range")
    if any(side < 1 for side in sides):
        raise ConfigError("trace", f"line {line}: a picture has no pixels")
    return request
