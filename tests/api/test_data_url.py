"""Data URLs: what they carry, and what is none."""

from __future__ import annotations

import base64
import json

import pytest
from http_fakes import data_url

from aiodisagg.api.data_url import decode_data_url
from aiodisagg.errors import MediaError


def decode(url: str, limit: int = 1 << 24) -> bytes:
    return decode_data_url(memoryview(json.dumps(url).encode()), limit, "p")


@pytest.mark.parametrize("size", [1, 2, 3, 196_607, 196_608, 196_609, 1_000_000])
def test_data_urls_of_any_length(size: int) -> None:
    data = bytes(i * i % 251 for i in range(size))
    url = data_url(data)
    assert decode(url) == data
    assert decode(url.replace("data:image/png;", "DATA:image/svg+xml;charset=utf-8;")) == data
    # PHP and others escape slashes, which JSON allows.
    escaped = json.dumps(url).replace("/", "\\/").encode()
    assert decode_data_url(memoryview(escaped), size, "p") == data
    with pytest.raises(MediaError, match=f"more than {size - 1} bytes"):
        decode(url, size - 1)


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:image/png",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png,abcd",
        "data:;base64,QUJD",
        "data:text/html;base64,QUJD",
        "data:image/png;base64,QUJ",
        "data:image/png;base64,QUJ DRA==",
        "data:image/png;base64,QUJD\nQUJD",
        "data:image/png;base64,QQ==QUJD",
        "data:image/png;base64,QUJD====",
        "data:image/png;base64,QUJ%44",
        "data:image/png;base64,QUJÄ",
        "data:image/png;base64," + base64.b64encode(b"x").decode() * 100_000,
        "data:image/png" + ";x=y" * 100 + ";base64,QUJD",
        data_url(b"x" * 196_607) + "QUJD",  # padding at the end of a slice
    ],
)
def test_data_urls_that_are_not_images(url: str) -> None:
    with pytest.raises(MediaError):
        decode(url)


def test_line_breaks_are_named() -> None:
    """``base64`` and Python's ``encodebytes`` write them; what was said of it was a wrong padding."""
    url = f"data:image/png;base64,{base64.encodebytes(bytes(100)).decode()}"
    with pytest.raises(MediaError, match="line breaks"):
        decode(url)
    assert decode(url.replace("\n", "")) == bytes(100)


@pytest.mark.parametrize("raw", [b'"data:image\\/png;base64,QUJ\xff"', b'"data:image/png;base64,QUJDQUJD\\/\xff"'])
def test_escaped_data_urls_that_are_not_utf8(raw: bytes) -> None:
    with pytest.raises(MediaError, match="p: not UTF-8"):
        decode_data_url(memoryview(raw), 1 << 24, "p")
