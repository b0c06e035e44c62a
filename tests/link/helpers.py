"""A peer made of a bare socket, and short ways to hellos and messages."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import struct

from aiodisagg.link import Hello, LinkServer, PeerRole, framing
from aiodisagg.link.address import UnixAddress, connect_unix, parse
from aiodisagg.link.hello import Handshake
from aiodisagg.protocol.messages import Chunk, Commit, ItemKey, Message, Refuse, Release, encode

SECRET = b"correct horse battery"


def hello(name: str = "e0", role: PeerRole = PeerRole.ENCODE) -> Hello:
    return Hello.here(name=name, incarnation=f"{name}-life", role=role, transports={"memory": b"\x00pool"})


def word(number: int) -> Message:
    """A small message."""
    return Release(ItemKey(number, 0), 1)


def text(size_bytes: int) -> Message:
    """A message of up to 4 KiB."""
    return Refuse(ItemKey(1, 0), 1, "overloaded", "x" * size_bytes, True)


def commit(number: int) -> Message:
    return Commit(ItemKey(7, 0), 1, Chunk(number, 0, 4, 2**64 - 1), None)


class RawPeer:
    """Dials without the library's connection, so a test decides every byte. Every wait is bounded by the test's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, server: LinkServer) -> RawPeer:
        target = parse(server.address)
        if isinstance(target, UnixAddress):
            return cls(*await asyncio.open_unix_connection(sock=connect_unix(target)))
        return cls(*await asyncio.open_connection(target.host, target.port))

    async def shake_hands(
        self, *, secret: bytes | None = SECRET, name: str = "raw", said: Hello | None = None
    ) -> Hello:
        shake = Handshake(
            dialling=True, hello=said or hello(name), secret=secret, nonce=secrets.token_bytes(32), peer="the server"
        )
        self.writer.write(shake.greeting)
        while shake.remote is None:
            kind, payload = await self.frame()
            if (reply := shake.receive(kind, memoryview(payload))) is not None:
                self.writer.write(reply)
        return shake.remote

    async def frame(self) -> tuple[int, bytes]:
        size, kind = struct.unpack(">IB", await self.reader.readexactly(framing.HEADER_BYTES))
        return kind, await self.reader.readexactly(size)

    async def until(self, wanted: int) -> bytes:
        """The payload of the next frame of this kind; others are ignored."""
        while True:
            kind, payload = await self.frame()
            if kind == wanted:
                return payload

    def say(self, message: Message) -> None:
        self.writer.write(framing.frame(framing.MESSAGE, encode(message)))

    async def end(self) -> bytes:
        """Everything until the other side closes."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""

    async def aclose(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
