"""What a picture's file says besides its pixels costs next to nothing, however much it is."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import PngImagePlugin

from aiodisagg.errors import MediaError
from aiodisagg.models.preprocessing import decode_rgb, header_size
from tests.models.halves import encoded, noise
from tests.models.test_png_turns import SOURCES, picture, piece

MIB = 1 << 20
BOMBS: dict[str, Callable[[int], bytes]] = {
    "text": lambda size: piece(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(size), 9)),
    "international text": lambda size: piece(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(size), 9)),
    "profile": lambda size: piece(b"iCCP", b"sRGB\0\0" + zlib.compress(bytes(size), 9)),
    "turn": lambda size: piece(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(size), 9)),
}


@pytest.mark.parametrize("kind", [kind for kind in BOMBS if kind != "turn"])
def test_a_picture_with_a_long_compressed_text_is_read(kind: str) -> None:
    """It was refused: Pillow reads texts of up to 1 MiB, also where nobody wants them."""
    long = BOMBS[kind](3 * MIB)
    for data in (picture(before=long), picture(behind=long), picture(long + SOURCES["exif"](6), long)):
        turned = b"eXIf" in data
        assert header_size(data, "image") == ((160, 64) if turned else (64, 160))
        plain = np.asarray(noise(160, 64))
        assert np.array_equal(np.asarray(decode_rgb(data, "image")), np.rot90(plain, -1) if turned else plain)


@pytest.mark.parametrize("kind", BOMBS)
def test_texts_are_not_unpacked(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """64 KB took a second to plan: a request of 64 MiB a quarter of an hour."""
    unpack, unpacked = PngImagePlugin._safe_zlib_decompress, []
    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", lambda s: unpacked.append(s) or unpack(s))
    many = BOMBS[kind](MIB - 100) * 60
    assert len(many) < 100_000
    for data in (picture(before=many), picture(behind=many)):
        for read in (header_size, decode_rgb):
            unpacked.clear()
            read(data, "image")
            assert len(unpacked) == (kind == "turn")


def test_exif_in_thousands_of_pieces_is_refused() -> None:
    """Each was added to those before: 1 MB took seconds and 32 MB many minutes."""
    data = encoded(noise(60, 50), "JPEG")
    one = b"\xff\xe1" + struct.pack(">H", 9) + b"Exif\0\0a"
    assert header_size(data[:2] + 10 * one + data[2:], "image") == (50, 60)
    with pytest.raises(MediaError, match=r"image: .*EXIF is in more than"):
        header_size(data[:2] + 1000 * one + data[2:], "image")


@pytest.mark.parametrize("source", SOURCES)
def test_a_turn_with_a_wrong_checksum_is_refused(source: str) -> None:
    """As every chunk before the pixels: one bit of it turns a picture that was never turned."""
    turn = SOURCES[source](6)
    broken = turn[:-1] + bytes([turn[-1] ^ 1])
    assert header_size(picture(before=turn), "image") == (160, 64)
    for read in (header_size, decode_rgb):
        with pytest.raises(MediaError, match="checksum"):
            read(picture(before=broken), "image")
