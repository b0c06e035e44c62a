"""Bytes that are nested deeper than a decoder goes: refused like any others that are no message."""

from __future__ import annotations

import asyncio
import zlib
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from aiodisagg.device.cudart import HANDLE_BYTES
from aiodisagg.device.pool import RemotePool
from aiodisagg.errors import DeviceError, TransportUnavailable
from aiodisagg.transport import attach, chunks
from aiodisagg.transport.description import unpack
from aiodisagg.transport.mooncake_side import Attachment, Goodbye, Wire

pytestmark = pytest.mark.anyio

NEST = b"\x91" * 3000 + b"\xc0"


def deep(*fields: object) -> bytes:
    """Fields in their order, and one that nobody knows behind them."""
    return bytes([0x91 + len(fields)]) + b"".join(map(msgspec.msgpack.encode, fields)) + NEST


class Fields(msgspec.Struct, array_like=True):
    port: int


class Nobody:
    """Whom a wire writes to."""

    def get_extra_info(self, name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return True

    async def drain(self) -> None:
        pass


def wire(*frames: bytes) -> Wire:
    """One end of a connection that brings these frames and then nothing more."""
    reader, writer = asyncio.StreamReader(), cast(asyncio.StreamWriter, Nobody())
    for body in frames:
        reader.feed_data(len(body).to_bytes(4, "big") + body)
    return Wire(reader, writer)


def test_words_of_ipc_and_of_the_streams() -> None:
    assert attach.decode(deep("goodbye")) is None
    assert chunks.decode(deep("placed", 1)) is None


def test_a_description() -> None:
    body = b"x\0" + deep(7)
    with pytest.raises(TransportUnavailable, match="cannot be read"):
        unpack("x", Fields, zlib.crc32(body).to_bytes(4, "big") + body)


def test_a_device_pool() -> None:
    accelerator: Any = SimpleNamespace(runtime=None, device=0)
    with pytest.raises(DeviceError, match="cannot be read"):
        RemotePool(accelerator, deep(b"h" * HANDLE_BYTES, 64, "bus"), 64)


async def test_a_word_beside_an_engine() -> None:
    assert await wire(deep("goodbye")).hear() is None


async def test_a_writer_whose_service_breaks_is_quarantined_all_the_same() -> None:
    """Its leases were held for ever where something else than the end of its words ended the loop."""
    ended: list[Attachment] = []
    writer = Attachment(wire(msgspec.msgpack.encode(("check", b"nonce"))), "w", 0.0, ended.append)
    (word,) = writer.bar([1])

    def broken(nonce: bytes) -> bool:
        raise OSError("a bug")

    with pytest.raises(OSError, match="a bug"):
        await writer.serve(broken)
    await asyncio.wait_for(word, 10)
    assert ended == [writer] and not writer.held


async def test_a_goodbye_needs_no_quarantine() -> None:
    writer = Attachment(wire(msgspec.msgpack.encode(Goodbye())), "w", 1000.0, lambda _: None)
    await writer.serve(lambda nonce: True)
    assert writer.ended.done() and writer._timer is None
