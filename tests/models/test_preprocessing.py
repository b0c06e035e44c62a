"""Pixels equal transformers' for every kind of picture, and hostile files cost an error, not memory."""

from __future__ import annotations

import io
import struct
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from aiodisagg.errors import MediaError
from aiodisagg.models import preprocessing
from aiodisagg.models.base import ImagePart, ItemKind
from aiodisagg.models.preprocessing import MAX_SOURCE_PIXELS, decode_rgb, header_size, image_grid, load_settings
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from tests.models.halves import chat, encoded, halves, noise, png

Tiny = Callable[..., Path]


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _palette() -> bytes:
    image = noise(80, 60).convert("P")
    return encoded(image, "PNG", transparency=3)


PICTURES: dict[str, Callable[[], bytes]] = {
    "png": lambda: png(100, 70),
    "jpeg": lambda: encoded(noise(123, 77), "JPEG"),
    "webp": lambda: encoded(noise(123, 77), "WEBP"),
    "gif": lambda: encoded(noise(90, 50), "GIF"),
    "bmp": lambda: encoded(noise(90, 50), "BMP"),
    "grey": lambda: encoded(noise(64, 70).convert("L"), "PNG"),
    "alpha": lambda: encoded(Image.merge("RGBA", [*noise(64, 70).split(), noise(64, 70, 9).split()[0]]), "PNG"),
    "grey with alpha": lambda: encoded(noise(64, 70).convert("LA"), "PNG"),
    "palette with a transparent colour": _palette,
    "cmyk": lambda: encoded(noise(64, 70).convert("CMYK"), "JPEG"),
    "turned": lambda: encoded(noise(160, 64), "JPEG", exif=_exif(6)),
    "mirrored": lambda: encoded(noise(160, 64), "PNG", exif=_exif(2)),
    "much too large": lambda: png(900, 700),
    "tiny": lambda: png(5, 3),
}


def _old_transformers() -> bool:
    return tuple(int(n) for n in transformers.__version__.split(".")[:2]) < (5, 23)


@pytest.mark.parametrize("picture", PICTURES)
def test_pixels_are_transformers_bit_for_bit(tiny: Tiny, picture: str) -> None:
    if picture == "alpha" and _old_transformers():
        pytest.skip("older transformers drop transparency instead of laying the picture on white")
    folder = tiny(moe=True, levels=3)
    data = PICTURES[picture]()
    grid = image_grid(*header_size(data, "image"), load_settings(folder)[0])
    mine = halves(folder).encoder.prepare(ItemKind.IMAGE, [data], grid, 0.0)
    # As transformers loads a file: turned by EXIF, and flattened by the processor.
    image = Image.open(io.BytesIO(data))
    transposed = load_image(image) if image.mode == "RGB" else image
    expected = Qwen2VLImageProcessorPil.from_pretrained(folder)(transposed, return_tensors="pt")
    assert expected["image_grid_thw"].tolist() == [list(grid)]
    assert torch.equal(mine.pixel_values, expected["pixel_values"])


@pytest.mark.parametrize("picture", ["alpha", "grey with alpha", "palette with a transparent colour"])
def test_a_transparent_picture_is_laid_on_white_in_pieces(monkeypatch: pytest.MonkeyPatch, picture: str) -> None:
    """At once, one of 64 megapixels in a file of 66 KB took 768 MiB in each thread that prepares."""
    data = PICTURES[picture]()
    whole, lay, laid = np.asarray(decode_rgb(data, "image")), Image.alpha_composite, []

    def noted(white: Image.Image, part: Image.Image) -> Image.Image:
        laid.append(part.width * part.height)
        return lay(white, part)

    monkeypatch.setattr(preprocessing, "_STRIP_PIXELS", 500)
    monkeypatch.setattr(Image, "alpha_composite", noted)
    assert np.array_equal(np.asarray(decode_rgb(data, "image")), whole)
    assert len(laid) > 1 and max(laid) <= 500 and sum(laid) == whole.shape[0] * whole.shape[1]


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises width x height pixels."""

    def piece(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", header) + piece(b"IDAT", pixels) + piece(b"IEND", b"")


@pytest.mark.parametrize("size", [(8193, 8193), (10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_pixels_are_counted_before_any_is_decoded(tiny: Tiny, size: tuple[int, int]) -> None:
    assert size[0] * size[1] > MAX_SOURCE_PIXELS or 0 in size
    bomb = _bomb(*size)
    with pytest.raises(MediaError) as caught:
        header_size(bomb, "messages[3].content[1]")
    assert caught.value.param == "messages[3].content[1]"
    with pytest.raises(MediaError):
        halves(tiny(moe=True, levels=3)).encoder.prepare(ItemKind.IMAGE, [bomb], (1, 2, 2), 0.0)


def test_grey_of_sixteen_bits_is_refused_and_not_read_as_white(tiny: Tiny) -> None:
    deep = encoded(Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16), "PNG")
    both = halves(tiny(moe=True, levels=3))
    with pytest.raises(MediaError, match=r"content\[0\]: grey of more than 8 bits \(mode I;16"):
        both.planner.plan(chat(ImagePart(deep)))
    with pytest.raises(MediaError, match="grey of more than 8 bits"):
        both.encoder.prepare(ItemKind.IMAGE, [deep], (1, 4, 4), 0.0)


def test_broken_files_are_media_errors_wherever_they_break(tiny: Tiny) -> None:
    encoder: Qwen3VLVisionEncoder = halves(tiny(moe=True, levels=3)).encoder
    random = np.random.default_rng(0)
    whole = {kind: encoded(noise(64, 64), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")}
    refused = 0
    for data in whole.values():
        for _ in range(40):
            broken = bytearray(data[: random.integers(1, len(data))])
            for at in random.integers(0, len(broken), 3):
                broken[at] ^= 255
            try:
                patches = encoder.prepare(ItemKind.IMAGE, [bytes(broken)], (1, 4, 4), 0.0)
            except MediaError:
                refused += 1
            else:  # a decoder may make do with what is there
                assert patches.pixel_values.shape == (16, 1536)
    assert refused > 100


@pytest.mark.parametrize(
    ("kind", "media", "grid"),
    [
        (ItemKind.IMAGE, [png(64, 64)], (1, 4, 12)),
        (ItemKind.IMAGE, [png(64, 64)], (1, 3, 3)),
        (ItemKind.IMAGE, [png(64, 64)], (2, 4, 4)),
        (ItemKind.IMAGE, [png(64, 64)] * 2, (1, 4, 4)),
        (ItemKind.IMAGE, [], (1, 4, 4)),
        (ItemKind.IMAGE, [png(64, 64)], (1, 0, 0)),
        (ItemKind.IMAGE, [png(64, 64)], (1, 4000, 4000)),
        (ItemKind.IMAGE, [png(64, 64)], (1, -4, -4)),
        (ItemKind.VIDEO, [png(64, 64)] * 4, (1, 4, 4)),
        (ItemKind.VIDEO, [png(64, 64), png(64, 160)], (1, 4, 4)),
    ],
    ids=[
        "another aspect", "no whole tokens", "two times", "two images", "none", "empty grid", "huge grid", "negative",
        "too few frame pairs", "frames of two sizes",
    ],
)  # fmt: skip
def test_a_grid_that_the_media_do_not_give_is_refused(
    tiny: Tiny, kind: ItemKind, media: list[bytes], grid: tuple[int, int, int]
) -> None:
    with pytest.raises(MediaError):
        halves(tiny(moe=True, levels=3)).encoder.prepare(kind, media, grid, 2.0)


def test_a_file_is_decoded_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between pieces others take the interpreter's lock, and in a burst a picture comes out twice as late."""
    data = encoded(noise(600, 400), "JPEG", quality=95)
    assert len(data) > 3 * 65536
    read: list[int] = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            read.append(len(found := super().read(size)))
            return found

    monkeypatch.setattr(preprocessing.io, "BytesIO", Counted)
    decode_rgb(data, "it")
    assert max(read) > 0.99 * len(data)


def test_a_video_is_decoded_frame_by_frame(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files may hold large frames: hundreds of them do not fit into any memory at once."""
    alive, most = 0, 0

    def counted(data: bytes, param: str) -> Image.Image:
        nonlocal alive, most
        frame = decode_rgb(data, param)
        alive, most = alive + 1, max(most, alive + 1)
        weakref.finalize(frame, freed)
        return frame

    def freed() -> None:
        nonlocal alive
        alive -= 1

    monkeypatch.setattr("aiodisagg.models.vision.decode_rgb", counted)
    patches = halves(tiny(moe=True, levels=3)).encoder.prepare(ItemKind.VIDEO, [png(64, 64)] * 12, (6, 4, 4), 2.0)
    assert patches.count == 96
    assert most <= 2


def test_every_planned_grid_is_accepted(tiny: Tiny) -> None:
    """Whatever limit the planner lowered the folder's to."""
    both = halves(tiny(moe=True, levels=3))
    settings = load_settings(tiny(moe=True, levels=3))[0]
    random = np.random.default_rng(1)
    for _ in range(60):
        width, height = (int(2 ** random.uniform(1, 9)) for _ in range(2))
        if max(width, height) > 200 * min(width, height):
            continue
        grid = image_grid(height, width, settings, int(2 ** random.uniform(10, 16)))
        patches = both.encoder.prepare(ItemKind.IMAGE, [png(width, height)], grid, 0.0)
        assert patches.pixel_values.shape[0] == patches.count


def test_sides_of_two_hundred_to_one_are_the_longest_there_are(tiny: Tiny) -> None:
    settings = load_settings(tiny(moe=True, levels=3))[0]
    assert image_grid(4, 800, settings)[0] == image_grid(800, 4, settings)[0] == 1
    with pytest.raises(ValueError, match="200:1"):
        image_grid(4, 801, settings)
