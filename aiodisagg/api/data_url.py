"""``data:`` URLs, strictly: an image type, base64 without a stray character, a bounded size.

Decoding holds the interpreter lock for as long as one call takes, on whatever thread, so large ones go in slices of
about a millisecond: between two of them the event loop's thread gets its turn.
"""

from __future__ import annotations

import binascii

import msgspec

from aiodisagg.errors import MediaError

_SLICE = 1 << 18  # base64 characters; a multiple of 4
_LONGEST_HEADER = 256


def decode_data_url(raw: memoryview, max_bytes: int, param: str) -> bytes:
    """The file in a data URL. ``raw`` is the URL as a JSON string with its quotes. Raises MediaError naming ``param``.

    Blocks for about 10 ms a megabyte; safe on any thread.
    """
    if b"\\" in bytes(raw[: _LONGEST_HEADER + 1]):
        raw = _unescaped(raw, param)
    header = bytes(raw[1 : _LONGEST_HEADER + 1])
    comma = header.find(b",")
    if comma < 0:
        raise MediaError(param, "a data URL is data:image/<type>;base64,<data>")
    mime, *attributes = header[len("data:") : comma].lower().split(b";")
    if not mime.startswith(b"image/"):
        shown = mime[:64].decode("ascii", "backslashreplace") or "text/plain"
        raise MediaError(param, f"{shown} is not an image type")
    if attributes[-1:] != [b"base64"]:
        raise MediaError(param, "a data URL of an image must be base64")
    payload = raw[comma + 2 : -1]
    try:
        return _decode(payload, max_bytes, param)
    except MediaError:
        # Some JSON writers escape every slash, and a slash is a base64 digit. Rare, so looked for only now.
        if b"\\" not in payload.tobytes():
            raise
        return _decode(_unescaped(raw, param)[comma + 2 : -1], max_bytes, param)


def text_of(raw: memoryview, param: str) -> str:
    """What a JSON string says. Raises MediaError: bytes in a ``msgspec.Raw`` have not been decoded before."""
    try:
        return msgspec.json.decode(raw, type=str)
    except ValueError as error:
        raise MediaError(param, "not UTF-8") from error


def _unescaped(raw: memoryview, param: str) -> memoryview:
    """The same string without escapes, in quotes again."""
    return memoryview(b'"' + text_of(raw, param).encode() + b'"')


def _decode(payload: memoryview, max_bytes: int, param: str) -> bytes:
    length = len(payload)
    if not length:
        raise MediaError(param, "the data URL is empty")
    ending = bytes(payload[-4:])
    padding = len(ending) - len(ending.rstrip(b"="))
    if length % 4 or padding > 2:  # binascii's strict mode lets "QUJD====" pass
        raise MediaError(param, "not base64: wrong padding, or spaces or line breaks in it")
    if length // 4 * 3 - padding > max_bytes:
        raise MediaError(param, f"more than {max_bytes} bytes")
    pieces = []
    for start in range(0, length, _SLICE):
        digits = bytes(payload[start : start + _SLICE])
        if start + _SLICE < length and b"=" in digits:
            raise MediaError(param, "not base64: padding before the end")
        try:
            pieces.append(binascii.a2b_base64(digits, strict_mode=True))
        except binascii.Error as error:
            raise MediaError(param, f"not base64: {error}") from error
    return b"".join(pieces)
