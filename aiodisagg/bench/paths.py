"""Every way from this process's memory into the partner's pool: the transports, and beside each its bare limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import xxhash

from aiodisagg.bench import bare
from aiodisagg.bench.bare import Ranges
from aiodisagg.bench.partner import NAME, Done, Open, Opened, Partner, Sum, Wipe
from aiodisagg.errors import AiodisaggError
from aiodisagg.peer.once import EnteredOnce
from aiodisagg.peer.planes import make_transport
from aiodisagg.transport.base import Remote, Slice, Transport

TRANSPORTS = ("ipc", "stream", "zmq", "mooncake-tcp", "mooncake")
LIMITS = {
    "ipc": "memcpy, numpy, one thread",
    "stream": "bare BufferedProtocol pump",
    "zmq": "bare pyzmq pump",
    "mooncake-tcp": "bare submit and poll",
    "mooncake": "bare submit and poll",
}


class WrongBytes(AiodisaggError):
    """What is in the partner's pool is not what was sent."""


class Path(Protocol):
    """One way. Ranges are the same in the source and in the pool."""

    async def run(self, ranges: Ranges, times: int) -> float:
        """Seconds of ``times`` rounds of all ranges, one round after the other, until the last byte is there."""
        ...

    async def aclose(self) -> None: ...


class TransportPath:
    """A transport of this package; the ranges of a round are concurrent writes."""

    def __init__(self, transport: Transport, remote: Remote, source: memoryview) -> None:
        self.transport, self.remote, self._source = transport, remote, source

    async def write(self, offset: int, size: int) -> None:
        await self.transport.write(self.remote, [Slice(self._source[offset : offset + size], offset, 0)])

    async def run(self, ranges: Ranges, times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            await asyncio.gather(*(self.write(offset, size) for offset, size in ranges))
        return time.perf_counter() - began

    async def aclose(self) -> None:
        await self.transport.aclose()


class Paths(EnteredOnce):
    """An async context manager: what this machine has of ``names``, connected to ``partner``.

    Args:
        pool_bytes: of the source here and of the pool there.
        here: address on which this process listens. there: the partner's.
        limits: also connect the bare limits.
    """

    def __init__(
        self,
        partner: Partner,
        pool_bytes: int,
        *,
        names: tuple[str, ...] = TRANSPORTS,
        here: str = "127.0.0.1",
        there: str = "127.0.0.1",
        limits: bool = True,
    ) -> None:
        super().__init__()
        self.partner, self.pool_bytes = partner, pool_bytes
        self.transports: dict[str, TransportPath] = {}
        self.limits: dict[str, Path] = {}
        """By the transport that is measured against it."""
        self.missing: dict[str, str] = {}
        self._names, self._here, self._there, self._bare = names, here, there, limits

    async def _open(self) -> None:
        opened = await self.partner.ask(Open(self.pool_bytes, self._there, self._names), Opened)
        self.missing = dict(opened.missing)
        self._source = await asyncio.to_thread(_random, self.pool_bytes)
        for name in opened.pools:
            transport = make_transport(name, self._here)
            await transport.open(None, lambda offset, size, lease: False, incarnation="writer")
            self._stack.push_async_callback(transport.aclose)
            remote = await transport.connect(opened.pools[name], peer=NAME)
            self.transports[name] = TransportPath(transport, remote, self._source.data)
            if self._bare:
                self.limits[name] = limit = await asyncio.to_thread(self._limit(name, opened.sinks[name]))
                self._stack.push_async_callback(limit.aclose)

    def _limit(self, name: str, address: str) -> Callable[[], Path]:
        source = self._source
        match name:
            case "ipc":
                return lambda: bare.Memcpy(source)
            case "stream":
                return lambda: bare.TcpPump(source.data, address)
            case "zmq":
                return lambda: bare.ZmqPump(source.data, address)
            case _:
                protocol = "tcp" if name == "mooncake-tcp" else "rdma"
                return lambda: bare.EnginePump(source, address, self._here, protocol)

    async def check(self, name: str, size_bytes: int) -> float:
        """Seconds of one write of the source's front, after which the pool holds exactly that. Raises WrongBytes."""
        await self.partner.ask(Wipe(size_bytes), Done)
        seconds = await self.transports[name].run([(0, size_bytes)], 1)
        found = (await self.partner.ask(Sum(size_bytes), Done)).number
        if found != await asyncio.to_thread(xxhash.xxh3_64_intdigest, self._source.data[:size_bytes]):
            raise WrongBytes(f"{name}: {size_bytes} bytes were written, and others arrived")
        return seconds


def _random(size_bytes: int) -> np.ndarray:
    """uint8 [size_bytes] of which no page is like another."""
    return np.random.default_rng(0).integers(0, 256, size_bytes, np.uint8)
