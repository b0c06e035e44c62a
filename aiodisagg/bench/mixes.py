"""Named mixes: the usual synthetic ones, and one like the image requests of a large public service.

``servegen_like.json`` holds aggregate statistics of the image workload published with ServeGen, converted to visual
tokens of 32 x 32 pixels; its ``source`` says the same. Arrivals there are burstier than Poisson for many clients
(coefficient of variation 1.0, 4.9 and 12.3 at the 50th, 90th and 99th percentile).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

import msgspec

from aiodisagg.bench.distributions import Quantiles, Ranges, exactly, parse_ranges
from aiodisagg.bench.workload import Mix
from aiodisagg.errors import ConfigError

HD = ((1280, 720),)
FULL_HD = ((1920, 1080),)


class _Published(msgspec.Struct, frozen=True):
    """``servegen_like.json``; other keys are for people."""

    images_per_request: dict[str, float]
    visual_tokens_per_image_quantiles: dict[str, float]
    text_tokens_quantiles: dict[str, float]
    output_tokens_quantiles: dict[str, float]


def servegen_mix() -> Mix:
    """ServeGen-like: 1.6 pictures a request, four in five requests with one, long tails of texts and answers."""
    stored = (resources.files("aiodisagg") / "data" / "servegen_like.json").read_bytes()
    found = msgspec.json.decode(stored, type=_Published)
    shares = ",".join(f"{numbers}:{share}" for numbers, share in found.images_per_request.items())
    return Mix(
        images=parse_ranges("images_per_request", shares),
        sizes=_quantiles(found.visual_tokens_per_image_quantiles),
        text_tokens=_quantiles(found.text_tokens_quantiles),
        output_tokens=_quantiles(found.output_tokens_quantiles),
    )


def _quantiles(points: dict[str, float]) -> Quantiles:
    return Quantiles(tuple(sorted((float(p), value) for p, value in points.items())))


_TEXT, _ANSWER = Ranges(((32, 128, 1.0),)), exactly(128)
_MIXES: dict[str, Callable[[], Mix]] = {
    "images-1-8": lambda: Mix(Ranges(((1, 8, 1.0),)), HD, _TEXT, _ANSWER),
    "servegen": servegen_mix,
    "reuse": lambda: Mix(exactly(1), HD, exactly(400), exactly(150), pool=200, reuse=0.8),
    "documents": lambda: Mix(exactly(5), FULL_HD, exactly(9000), exactly(1024)),
    "mixed": lambda: Mix(Ranges(((0, 0, 1.0), (1, 8, 1.0))), HD, _TEXT, _ANSWER),
    "text": lambda: Mix(exactly(0), HD, _TEXT, _ANSWER),
}
MIX_NAMES = tuple(_MIXES)


def named_mix(name: str) -> Mix:
    """Raises ConfigError for a name that is not in ``MIX_NAMES``.

    - ``images-1-8``: 1 to 8 pictures of 720p, 32 to 128 text tokens, answers of 128 tokens
    - ``servegen``: see :func:`servegen_mix`
    - ``reuse``: a picture of 720p, four in five from a pool of 200, 400 text tokens, answers of 150
    - ``documents``: 5 pictures of 1080p, 9,000 text tokens, answers of 1,024
    - ``mixed``: half as ``images-1-8``, half as ``text``
    - ``text``: no pictures, 32 to 128 text tokens, answers of 128
    """
    make = _MIXES.get(name)
    if make is None:
        raise ConfigError("mix", f"{name!r} is none of {', '.join(MIX_NAMES)}")
    return make()
