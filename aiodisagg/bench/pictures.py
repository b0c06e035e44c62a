"""Pictures nobody has seen before: soft colours, shapes and grain from a seed, as files of a realistic size."""

from __future__ import annotations

import hashlib
import io
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from aiodisagg.bench.workload import ImageSpec

PictureFormat = Literal["jpeg", "png"]
_GRAIN = 12
"""Levels of noise; a JPEG of quality 85 then takes about two bits a pixel."""


def make_picture(spec: ImageSpec, salt: str, form: PictureFormat = "jpeg") -> bytes:
    """An encoded file of ``spec.width`` x ``spec.height`` pixels; equal salts and identities give equal pictures,
    others differ all over, so that no server's cache takes one for another. A megapixel takes tens of milliseconds."""
    seed = hashlib.blake2b(f"{salt}/{spec.identity}".encode(), digest_size=8).digest()
    draw = np.random.default_rng(int.from_bytes(seed, "big"))
    size = (spec.width, spec.height)
    small = draw.integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(image)
    for number in range(12):
        x, y = (sorted(int(side * part) for part in draw.random(2)) for side in size)
        colour = tuple(int(c) for c in draw.integers(0, 256, 3))
        (pen.ellipse if number % 2 else pen.rectangle)([x[0], y[0], x[1], y[1]], fill=colour)
    grain = draw.integers(0, 2 * _GRAIN + 1, (spec.height, spec.width), np.uint8)
    noisy = ImageChops.add(image, Image.merge("RGB", [Image.fromarray(grain)] * 3), offset=-_GRAIN)
    out = io.BytesIO()
    if form == "jpeg":
        noisy.save(out, format="JPEG", quality=85)
    else:
        noisy.save(out, format="PNG", compress_level=1)
    return out.getvalue()
