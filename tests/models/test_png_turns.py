"""A PNG may say behind its pixels how it is to be turned: planning finds that without decoding, as decoding does."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from aiodisagg.errors import MediaError
from aiodisagg.models.base import ImagePart
from aiodisagg.models.preprocessing import decode_rgb, header_size
from tests.models.halves import chat, encoded, halves, noise

Tiny = Callable[..., Path]


def piece(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def exif(orientation: int) -> bytes:
    made = Image.Exif()
    made[0x0112] = orientation
    return made.tobytes()


def profile(orientation: int) -> bytes:
    return b"\nexif\n%8d\n%s\n" % (len(exif(orientation)), exif(orientation).hex().encode())


def xmp(orientation: int) -> bytes:
    return b'<rdf:Description tiff:Orientation="%d"/>' % orientation


SOURCES: dict[str, Callable[[int], bytes]] = {
    "exif": lambda value: piece(b"eXIf", exif(value)[6:]),
    "raw profile": lambda value: piece(b"tEXt", b"Raw profile type exif\0" + profile(value)),
    "packed raw profile": lambda value: piece(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile(value))),
    "xmp": lambda value: piece(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(value)),
    "packed xmp": lambda value: piece(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(value))),
    "text called exif": lambda value: piece(b"tEXt", b"exif\0" + exif(value)),
}


def picture(before: bytes = b"", behind: bytes = b"", data: bytes | None = None) -> bytes:
    """A lying PNG with chunks before and behind all of its pixels."""
    data = data or encoded(noise(160, 64))
    head = data.index(b"IDAT") - 4
    return data[:head] + before + data[head:-12] + behind + data[-12:]


def as_pillow_turns(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Until it is called, decoding raises."""
    kept = ImageFile.ImageFile.load

    def load(self: Image.Image) -> None:
        raise AssertionError("pixels are decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    return lambda: monkeypatch.setattr(ImageFile.ImageFile, "load", kept)


@pytest.mark.parametrize("value", range(10))
@pytest.mark.parametrize("is_behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("source", SOURCES)
def test_wherever_a_turn_is_said_it_is_planned_and_decoded(
    no_pixels: Callable[[], None], source: str, is_behind: bool, value: int
) -> None:
    chunk = SOURCES[source](value)
    data = picture(behind=chunk) if is_behind else picture(before=chunk)
    size = header_size(data, "image")
    no_pixels()
    assert size == ((160, 64) if value in (5, 6, 7, 8) else (64, 160))
    assert np.array_equal(np.asarray(decode_rgb(data, "image")), as_pillow_turns(data))


def test_a_picture_with_exif_behind_its_pixels_is_planned_and_prepared_upright(
    tiny: Tiny, no_pixels: Callable[[], None]
) -> None:
    both = halves(tiny(moe=True, levels=3))
    (item,) = both.planner.plan(chat(ImagePart(picture(behind=SOURCES["exif"](6))))).items
    no_pixels()
    assert item.grid_thw == (1, 10, 4)
    assert both.encoder.prepare(item.kind, item.media, item.grid_thw, item.fps).grid_thw == (1, 10, 4)


@pytest.mark.parametrize(("first", "last"), [(1, 6), (6, 1), (6, 3)])
def test_of_two_turns_the_last_counts_for_both(first: int, last: int) -> None:
    """Planning took the first and decoding the last: the picture did not give its grid."""
    data = picture(SOURCES["exif"](first), SOURCES["exif"](last))
    decoded = np.asarray(decode_rgb(data, "image"))
    assert header_size(data, "image") == decoded.shape[:2] == as_pillow_turns(data).shape[:2]
    assert np.array_equal(decoded, as_pillow_turns(data))


def test_of_an_animation_only_what_comes_before_its_second_frame_counts() -> None:
    out = io.BytesIO()
    noise(160, 64).save(out, "PNG", save_all=True, append_images=[noise(160, 64, 1)])
    frames = out.getvalue()
    late = picture(behind=SOURCES["exif"](6), data=frames)
    assert header_size(late, "image") == (64, 160)
    assert np.array_equal(np.asarray(decode_rgb(late, "image")), as_pillow_turns(frames))
    second = frames.index(b"fcTL", frames.index(b"IDAT")) - 4
    early = frames[:second] + SOURCES["exif"](6) + frames[second:]
    assert header_size(early, "image") == (160, 64)
    assert np.array_equal(np.asarray(decode_rgb(early, "image")), as_pillow_turns(early))


def test_a_palette_with_transparency_is_turned_with_its_colours() -> None:
    data = encoded(noise(40, 24).convert("P"), transparency=3)
    plain = np.asarray(decode_rgb(data, "image"))
    turned = decode_rgb(picture(behind=SOURCES["exif"](6), data=data), "image")
    assert np.array_equal(np.asarray(turned), np.rot90(plain, -1))


@pytest.mark.parametrize(
    "chunk",
    [
        piece(b"eXIf", b"MM\0*"),
        piece(b"eXIf", b"no TIFF at all"),
        piece(b"tEXt", b"Raw profile type exif\0\n\n\nno hex"),
        piece(b"zTXt", b"exif\0\0" + zlib.compress(exif(6))),
        piece(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2**21))),
        struct.pack(">I4s", 10**6, b"eXIf"),
        struct.pack(">I4s", 2**32 - 1, b"tEXt") + b"exif\0",
    ],
    ids=["cut", "no exif", "no hex", "a text for bytes", "a bomb", "a cut chunk", "a chunk of 4 GB"],
)
def test_a_broken_turn_is_an_error_of_the_picture_for_both(chunk: bytes) -> None:
    data = picture(behind=chunk)
    for read in (header_size, decode_rgb):
        with pytest.raises(MediaError, match="broken"):
            read(data, "image")


def test_words_that_look_like_a_turn_are_none(no_pixels: Callable[[], None]) -> None:
    comment = piece(b"tEXt", b"Comment\0eXIf, Raw profile type exif, XML:com.adobe.xmp")
    assert header_size(picture(comment, comment), "image") == (64, 160)
