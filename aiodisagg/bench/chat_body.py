"""Bodies of OpenAI chat requests, made before anything is measured."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random

import msgspec

from aiodisagg.bench.pictures import PictureFormat, make_picture
from aiodisagg.bench.workload import ImageSpec, WorkloadRequest

_TEXT = """
the of and a to in is you that it he was for on are as with his they at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about out many then them
these so some her would make like him into time has look two more write go see number no way could people my than first
water been call who oil its now find long down day did get come made may part
"""
_WORDS = _TEXT.split()
_THREADS = 2


@dataclass(frozen=True, slots=True)
class Body:
    """JSON in pieces, so that pictures are joined with nothing and copied nowhere."""

    pieces: tuple[bytes, ...] = field(repr=False)
    tenant: str = ""
    """Sent as ``X-Tenant`` if there is one."""

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.pieces))


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyStyle:
    """What all bodies of a measurement have in common.

    Args:
        tokens_per_word: how many tokens the server's tokenizer makes of one of our words.
        extra: added to every body; may overwrite anything but the messages.
    """

    model: str
    tokens_per_word: float = 1.0
    form: PictureFormat = "jpeg"
    extra: Mapping[str, object] = field(default_factory=dict)


def make_text(tokens: int, style: BodyStyle, seed: str) -> str:
    """About ``tokens`` tokens of words, at least one; a longer text of the same seed begins with the shorter one."""
    count = max(1, round(tokens / style.tokens_per_word))
    return " ".join(Random(seed).choices(_WORDS, k=count))


def make_body(request: WorkloadRequest, text: str, pictures: Sequence[bytes], style: BodyStyle) -> Body:
    """A streaming request with its pictures first, given as base64. A priority of 0 is not sent."""
    head = b'{"messages":[{"role":"user","content":['
    opening = b'{"type":"image_url","image_url":{"url":"data:image/%s;base64,' % style.form.encode()
    pieces = [head]
    for picture in pictures:
        pieces += [opening, picture, b'"}},']
    rest = {
        "model": style.model,
        "max_tokens": request.output_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"priority": request.priority} if request.priority else {}),
        **style.extra,
    }
    pieces.append(msgspec.json.encode({"type": "text", "text": text}) + b"]}]," + msgspec.json.encode(rest)[1:])
    return Body(tuple(pieces), request.tenant)


async def make_bodies(
    requests: Sequence[WorkloadRequest],
    style: BodyStyle,
    salt: str,
    made: Callable[[int, int], None] = lambda done, total: None,
) -> list[Body]:
    """Draws every picture once, on threads. ``salt``: other salts give other pictures and texts.

    ``made(done, total)`` is told about pictures.
    """
    specs = list({image: None for request in requests for image in request.images})
    loop = asyncio.get_running_loop()
    files: dict[ImageSpec, bytes] = {}

    def draw(spec: ImageSpec) -> bytes:
        return base64.b64encode(make_picture(spec, salt, style.form))

    executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures")
    try:
        for start in range(0, len(specs), 4 * _THREADS):  # few at a time: a cancelled caller does not wait for long
            some = specs[start : start + 4 * _THREADS]
            drawn = await asyncio.gather(*(loop.run_in_executor(executor, draw, spec) for spec in some))
            files.update(zip(some, drawn, strict=True))
            made(len(files), len(specs))
    finally:
        executor.shutdown(cancel_futures=True)
    return [
        make_body(
            request,
            make_text(request.text_tokens, style, f"{salt}/{number}"),
            [files[image] for image in request.images],
            style,
        )
        for number, request in enumerate(requests)
    ]
