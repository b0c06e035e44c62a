"""How a pool is described to another process: a checksum, the transport's name, and the transport's own fields.

A description travels through a bootstrap server and a control link and is untrusted. The checksum does not defend
against malice; it keeps a damaged one from sending packets to an address nobody meant.
"""

from __future__ import annotations

import ipaddress
import zlib
from functools import cache
from pathlib import Path
from typing import TypeVar

import msgspec

from aiodisagg.errors import TransportUnavailable

MAX_BYTES = 4096

T = TypeVar("T", bound=msgspec.Struct)


def pack(transport: str, fields: msgspec.Struct) -> bytes:
    """The bytes that :func:`unpack` reads back. Raises ValueError over 4 KiB."""
    body = transport.encode() + b"\0" + msgspec.msgpack.encode(fields)
    if len(body) + 4 > MAX_BYTES:
        raise ValueError(f"a description of {len(body)} bytes")
    return zlib.crc32(body).to_bytes(4, "big") + body


def unpack(transport: str, kind: type[T], description: bytes) -> T:
    """The fields of a description of this transport.

    Raises:
        TransportUnavailable: anything else than what ``pack`` made for this transport.
    """
    prefix = transport.encode() + b"\0"
    body = description[4:]
    if len(description) > MAX_BYTES or not body.startswith(prefix):
        raise TransportUnavailable(transport, "the peer's description is not one of this transport")
    if zlib.crc32(body).to_bytes(4, "big") != description[:4]:
        raise TransportUnavailable(transport, "the peer's description is damaged")
    try:
        return msgspec.msgpack.decode(body[len(prefix) :], type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise TransportUnavailable(transport, f"the peer's description cannot be read: {error}") from error


def loopback_of(description: bytes) -> str:
    """The address in a description of a network transport (its first field), if it is loopback; else empty.

    Of anything else, and of bytes that are no description, it is empty as well: ``unpack`` says what is wrong.
    """
    try:
        fields = msgspec.msgpack.decode(description[4:].partition(b"\0")[2], type=list[object])
        return str(fields[0]) if ipaddress.ip_address(str(fields[0])).is_loopback else ""
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError, IndexError):
        return ""


def moved(description: bytes, host: str) -> bytes:
    """The same pool at another address. For what has a ``loopback_of``."""
    name, end, fields = description[4:].partition(b"\0")
    body = name + end + msgspec.msgpack.encode([host, *msgspec.msgpack.decode(fields, type=list[object])[1:]])
    return zlib.crc32(body).to_bytes(4, "big") + body


@cache
def boot_id() -> str:
    """Names this boot of this kernel: two processes with the same one run on the same machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
