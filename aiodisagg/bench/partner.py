"""The other process of ``bench transport``: it receives. One JSON word a line on stdin, one answer each on stdout.

Run as ``python -m aiodisagg.bench.partner``; it ends with its stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import uvloop
import xxhash

from aiodisagg.bench.echo import Echo
from aiodisagg.bench.watch import LoopWatch
from aiodisagg.errors import AiodisaggError, TransportUnavailable
from aiodisagg.link.hello import Hello, PeerRole
from aiodisagg.link.link import Link, dial
from aiodisagg.peer.planes import make_transport
from aiodisagg.protocol.messages import Commit, Grant, Lend, Message, Offer
from aiodisagg.transport.arena import Arena

T = TypeVar("T", bound=msgspec.Struct)

NAME = "partner"
_LINE_BYTES = 1 << 20


class Open(msgspec.Struct, frozen=True, tag=True):
    """Receive by these transports, and by what each is measured against."""

    pool_bytes: int
    host: str
    transports: tuple[str, ...]


class Opened(msgspec.Struct, frozen=True):
    pools: dict[str, bytes]
    """Descriptions, by transport."""
    sinks: dict[str, str]
    """Addresses of bare ends, by transport."""
    missing: dict[str, str]
    """Why a transport is not there."""


class Wipe(msgspec.Struct, frozen=True, tag=True):
    """Zero the front of the pool."""

    size_bytes: int


class Sum(msgspec.Struct, frozen=True, tag=True):
    """xxh3-64 of the front of the pool."""

    size_bytes: int


class Hog(msgspec.Struct, frozen=True, tag=True):
    """Let so many threads compute in pure Python, holding the GIL whenever they can."""

    threads: int


class Ask(msgspec.Struct, frozen=True, tag=True):
    """How long was your loop held since I asked?"""


class Join(msgspec.Struct, frozen=True, tag=True):
    """Dial this link and answer there: an offer with a grant, a commit by noting when it came, others as they are."""

    address: str


class Reflect(msgspec.Struct, frozen=True, tag=True):
    """Dial this bare address, ``unix:PATH`` or ``tcp:HOST:PORT``, and send back whatever comes."""

    address: str


class Came(msgspec.Struct, frozen=True, tag=True):
    """When did the commits come?"""


class Done(msgspec.Struct, frozen=True):
    number: int = 0
    times_s: tuple[float, ...] = ()


Word = Open | Wipe | Sum | Hog | Ask | Join | Reflect | Came


class PartnerEnded(AiodisaggError):
    """The other process ended, or did not do what it was asked to."""


class Partner:
    """The other process as this one sees it; an async context manager.

    ``prefix``: a command that runs another in its own process, such as ``ip netns exec NAME``.
    """

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._prefix = tuple(prefix)
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> Partner:
        pipe = asyncio.subprocess.PIPE
        command = (*self._prefix, sys.executable, "-m", "aiodisagg.bench.partner")
        self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=_LINE_BYTES)
        return self

    async def ask(self, word: Word, kind: type[T]) -> T:
        """Raises PartnerEnded if the process ends instead."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(msgspec.json.encode(word) + b"\n")
            await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise PartnerEnded(f"the receiving process ended with {await self._process.wait()} at {word}")
        return msgspec.json.decode(line, type=kind)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(30):
                await self._process.communicate()
        except TimeoutError:
            self._process.kill()
            await self._process.communicate()


class _Receiver:
    """What the process has opened."""

    def __init__(self, stack: contextlib.AsyncExitStack, watch: LoopWatch) -> None:
        self._stack, self._watch = stack, watch
        self._arena: Arena
        self._came: list[float] = []
        self._hogs: list[threading.Thread] = []
        self._hogging = False

    async def handle(self, word: Word) -> msgspec.Struct:
        match word:
            case Open():
                return await self._open(word)
            case Wipe(size):
                await asyncio.to_thread(self._wipe, size)
            case Sum(size):
                return Done(await asyncio.to_thread(xxhash.xxh3_64_intdigest, self._arena.view[:size]))
            case Hog(threads):
                await self._hog(threads)
            case Ask():
                return self._watch.take()
            case Join(address):
                link = await dial(address, Hello.here(name=NAME, incarnation=NAME, role=PeerRole.LANGUAGE))
                self._stack.push_async_callback(link.aclose)
                serving = asyncio.get_running_loop().create_task(self._serve(link))
                self._stack.callback(serving.cancel)
            case Reflect(address):
                await self._reflect(address)
            case Came():
                came, self._came = tuple(self._came), []
                return Done(0, came)
        return Done()

    async def _open(self, word: Open) -> Opened:
        self._arena = await asyncio.to_thread(Arena, word.pool_bytes)
        self._stack.callback(self._arena.close)
        opened = Opened({}, {}, {})
        for name in word.transports:
            try:
                transport = make_transport(name, word.host)
                await transport.open(self._arena, lambda offset, size, lease: True, incarnation=NAME)
            except TransportUnavailable as error:
                opened.missing[name] = str(error)
                continue
            self._stack.push_async_callback(transport.aclose)
            opened.pools[name] = transport.describe()
            opened.sinks[name] = await self._sink(name, word.host)
        return opened

    async def _sink(self, name: str, host: str) -> str:
        from aiodisagg.bench import bare

        made: Any
        if name == "stream":
            server, address = await bare.TcpSink.listen(self._arena, host)
            self._stack.callback(server.close)
            return address
        if name == "zmq":
            made = bare.ZmqSink(self._arena, host)
        elif name.startswith("mooncake"):
            protocol = "tcp" if name == "mooncake-tcp" else "rdma"
            made = await asyncio.to_thread(bare.EngineSink, self._arena, host, protocol)
        else:
            return ""
        self._stack.push_async_callback(asyncio.to_thread, made.close)
        return str(made.address)

    async def _reflect(self, address: str) -> None:
        loop = asyncio.get_running_loop()
        kind, _, where = address.partition(":")
        if kind == "unix":
            transport, _ = await loop.create_unix_connection(Echo, where)
        else:
            host, _, port = where.rpartition(":")
            transport, _ = await loop.create_connection(Echo, host, int(port))
        self._stack.callback(transport.close)

    def _wipe(self, size_bytes: int) -> None:
        self._arena.view[:size_bytes] = bytes(size_bytes)

    async def _hog(self, threads: int) -> None:
        self._hogging = False
        for thread in self._hogs:
            await asyncio.to_thread(thread.join)
        self._hogging = bool(threads)
        self._hogs = [threading.Thread(target=self._compute, daemon=True) for _ in range(threads)]
        for thread in self._hogs:
            thread.start()

    def _compute(self) -> None:
        number = 0
        while self._hogging:
            number = (number * 31 + 7) % 1_000_003

    async def _serve(self, link: Link) -> None:
        def handle(message: Message) -> None:
            match message:
                case Offer():
                    link.send_nowait(Grant(message.key, message.epoch, (Lend(0, 0, 0, message.rows),), ()))
                case Commit():
                    self._came.append(time.monotonic())
                case _:
                    link.send_nowait(message)

        await link.deliver(handle)


async def _main() -> None:
    loop = asyncio.get_running_loop()
    words = asyncio.StreamReader(_LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(words), sys.stdin)
    decoder = msgspec.json.Decoder(Word)
    async with contextlib.AsyncExitStack() as stack:
        watch = LoopWatch()
        stack.callback(watch.close)
        receiver = _Receiver(stack, watch)
        while line := await words.readline():
            answer = await receiver.handle(decoder.decode(line))
            sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    uvloop.run(_main())
