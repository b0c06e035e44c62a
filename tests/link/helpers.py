"""Pairs of links, a peer made of a bare socket, and short ways to hellos and messages."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import struct
from collections.abc import AsyncIterator

from aiodisagg.link import Hello, Link, LinkConfig, LinkServer, PeerRole, dial, framing
from aiodisagg.link.address import UnixAddress, connect_unix, parse
from aiodisagg.link.hello import Handshake
from aiodisagg.protocol.messages import Chunk, Commit, ItemKey, Message, Refuse, Release, Want, encode
from aiodisagg.protocol.rows import ModelFingerprint

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


FAST = LinkConfig(heartbeat_s=0.02, timeout_s=0.06)
PATIENT = LinkConfig(heartbeat_s=0.02, timeout_s=60.0)


class Listener:
    """A server whose links come out of a queue and stay open until the test is done."""

    def __init__(self, address: str, config: LinkConfig) -> None:
        self.accepted: asyncio.Queue[Link] = asyncio.Queue()
        self.server = LinkServer(address, lambda: hello("server"), on_link=self._hold, secret=SECRET, config=config)

    async def _hold(self, link: Link) -> None:
        self.accepted.put_nowait(link)
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def listening(address: str, config: LinkConfig | None = None) -> AsyncIterator[Listener]:
    listener = Listener(address, config or LinkConfig())
    async with listener.server:
        yield listener


@contextlib.asynccontextmanager
async def linked(
    address: str, config: LinkConfig | None = None, dialler_config: LinkConfig | None = None
) -> AsyncIterator[tuple[Link, Link]]:
    """(dialler's side, server's side)"""
    async with listening(address, config) as listener:
        dialler = dialler_config or config
        near = await dial(listener.server.address, hello("dialler", PeerRole.LANGUAGE), secret=SECRET, config=dialler)
        far = await listener.accepted.get()
        try:
            yield near, far
        finally:
            await near.aclose()


def large(size_bytes: int) -> Message:
    model = ModelFingerprint("Qwen3VLMoeForConditionalGeneration", 64, 3, "bfloat16", "w")
    media = (bytes(range(256)) * (size_bytes // 256),)
    return Want(ItemKey(1, 0), 1, "d", "image", (1, 2, 2), 1, 0.0, (), (), model, 5.0, media)


async def flood(link: Link, count: list[int]) -> None:
    while True:
        await link.send(large(64 << 10))
        count[0] += 1


async def stuck(link: Link) -> tuple[asyncio.Task[None], list[int]]:
    """A task that floods the link, once it can get nothing more in."""
    sent = [0]
    task = asyncio.create_task(flood(link, sent))
    before = -1
    while link._connection._writing or sent[0] != before:
        before = sent[0]
        for _ in range(50):
            await asyncio.sleep(0)
    return task, sent
