"""What a message is made of is checked where it is made."""

from __future__ import annotations

from typing import Any

import pytest

from aiodisagg import ImagePart, VideoPart
from aiodisagg.errors import InvalidRequest


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: ImagePart("cat.jpg"), "ImagePart.data"),  # type: ignore[arg-type]
        (lambda: VideoPart((b"", "cat.jpg")), "VideoPart.frames[1]"),  # type: ignore[arg-type]
        (lambda: VideoPart("cat.mp4"), "VideoPart.frames[0]"),  # type: ignore[arg-type]
    ],
)
def test_a_path_is_no_file(make: Any, param: str) -> None:
    """It was "TypeError: a bytes-like object is required" of some library, much later."""
    with pytest.raises(InvalidRequest, match="takes the bytes of an image file") as caught:
        make()
    assert caught.value.param == param


def test_whatever_holds_bytes_is_good() -> None:
    """As bytes: planning had none of the others' methods, and what a digest names must not change after it."""
    for data in (b"x", bytearray(b"x"), memoryview(bytearray(b"x"))):
        image, video = ImagePart(data), VideoPart((data,))
        if not isinstance(data, bytes):
            data[0] = 0
        assert (image.data, video.frames) == (b"x", (b"x",)) and type(image.data) is type(video.frames[0]) is bytes
