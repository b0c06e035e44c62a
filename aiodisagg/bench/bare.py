"""The limits that transports are measured against: the same bytes moved by the shortest program that can move them.

No leases, no checks, no turns: one range after the other straight into the other process's pool, one answer each.
A sink is the receiving end, a pump the sending one.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Sequence

import numpy as np
import zmq

from aiodisagg.transport.arena import Arena
from aiodisagg.transport.mooncake_engine import DONE, PENDING, Engine

Ranges = Sequence[tuple[int, int]]
"""Offsets and sizes in bytes, the same in the source and in the pool."""

CHUNK_BYTES = 4 << 20
ENGINE_BYTES = 256 << 20
_HEAD = struct.Struct("<QQ")
_DEPTH = 4
_TICK_S = 50e-6


class Memcpy:
    """numpy's copy on one thread, into private memory that is warm."""

    def __init__(self, source: np.ndarray) -> None:
        self._source, self._target = source, np.ones_like(source)

    async def run(self, ranges: Ranges, times: int) -> float:
        """Seconds of ``times`` rounds of all ranges. It holds the loop: that is what makes it the bare limit."""
        began = time.perf_counter()
        for _ in range(times):
            for offset, size in ranges:
                np.copyto(self._target[offset : offset + size], self._source[offset : offset + size])
        return time.perf_counter() - began

    async def aclose(self) -> None:
        del self._target


class TcpSink(asyncio.BufferedProtocol):
    """Receives into the pool whatever it is told to, and answers one byte per range."""

    def __init__(self, pool: memoryview) -> None:
        self._pool, self._head = pool, bytearray(_HEAD.size)
        self._view, self._got = memoryview(self._head), 0
        self._target: memoryview | None = None

    @classmethod
    async def listen(cls, arena: Arena, host: str) -> tuple[asyncio.Server, str]:
        server = await asyncio.get_running_loop().create_server(lambda: cls(arena.view), host, 0)
        return server, f"{host}:{server.sockets[0].getsockname()[1]}"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return (self._view if self._target is None else self._target)[self._got :]

    def buffer_updated(self, nbytes: int) -> None:
        self._got += nbytes
        if self._target is None and self._got == len(self._view):
            offset, size = _HEAD.unpack(self._head)
            self._target, self._got = self._pool[offset : offset + size], 0
        elif self._target is not None and self._got == len(self._target):
            self._target, self._got = None, 0
            self._transport.write(b"\1")  # type: ignore[attr-defined]  # uvloop's transports inherit from nothing

    def connection_lost(self, error: Exception | None) -> None:
        self._target = None


class TcpPump:
    """``sock_sendall`` of whole ranges."""

    def __init__(self, source: memoryview, address: str) -> None:
        self._source = source
        host, _, port = address.rpartition(":")
        self._sock = socket.create_connection((host, int(port)))
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def run(self, ranges: Ranges, times: int) -> float:
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        for _ in range(times):
            for offset, size in ranges:
                await loop.sock_sendall(self._sock, _HEAD.pack(offset, size))
                await loop.sock_sendall(self._sock, self._source[offset : offset + size])
            answers = len(ranges)
            while answers:
                answers -= len(await loop.sock_recv(self._sock, answers))
        return time.perf_counter() - began

    async def aclose(self) -> None:
        self._sock.close()


class ZmqSink:
    """A thread: ``recv_into`` the pool, chunk by chunk."""

    def __init__(self, arena: Arena, host: str) -> None:
        self._pool = arena.view
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.RCVHWM, 8)
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self._thread = threading.Thread(target=self._run, name="bare-zmq", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                offset, size = _HEAD.unpack(self._socket.recv())
                stop = offset + size
                while offset < stop:
                    offset += self._socket.recv_into(self._pool[offset:stop])
                self._socket.send(b"\1")
        except zmq.ContextTerminated:
            self._socket.close(linger=0)

    def close(self) -> None:
        self._context.term()
        self._thread.join()


class ZmqPump:
    """Chunks of 4 MiB without a copy, on a thread."""

    def __init__(self, source: memoryview, address: str) -> None:
        self._source = source
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, 8)
        self._socket.connect(address)

    async def run(self, ranges: Ranges, times: int) -> float:
        return await asyncio.to_thread(self._work, ranges, times)

    def _work(self, ranges: Ranges, times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            for offset, size in ranges:
                self._socket.send(_HEAD.pack(offset, size))
                for start in range(offset, offset + size, CHUNK_BYTES):
                    self._socket.send(self._source[start : min(start + CHUNK_BYTES, offset + size)], copy=False)
            for _ in ranges:
                self._socket.recv()
        return time.perf_counter() - began

    async def aclose(self) -> None:
        self._socket.close(linger=0)
        await asyncio.to_thread(self._context.term)


class EngineSink:
    """An engine with the pool registered."""

    def __init__(self, arena: Arena, host: str, protocol: str) -> None:
        self._engine = Engine("bare", protocol, host, "", 5)
        self._engine.register(arena.address, arena.size_bytes)
        self.address = f"{host}:{self._engine.port}@{arena.address}"

    def close(self) -> None:
        self._engine.close()


class EnginePump:
    """One submit per range (per 256 MiB of it) and a thread that asks every 50 us how they stand, four at a time."""

    def __init__(self, source: np.ndarray, address: str, host: str, protocol: str) -> None:
        self._address = source.ctypes.data
        self._engine = Engine("bare", protocol, host, "", 5)
        self._engine.register(self._address, source.nbytes)
        self._segment, _, base = address.partition("@")
        self._base = int(base)

    async def run(self, ranges: Ranges, times: int) -> float:
        return await asyncio.to_thread(self._work, ranges, times)

    def _work(self, ranges: Ranges, times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            pieces = [
                (start, min(ENGINE_BYTES, offset + size - start))
                for offset, size in reversed(ranges)
                for start in reversed(range(offset, offset + size, ENGINE_BYTES))
            ]
            under_way: list[int] = []
            while pieces or under_way:
                while pieces and len(under_way) < _DEPTH:
                    offset, size = pieces.pop()
                    under_way.append(
                        self._engine.submit(self._segment, self._address + offset, self._base + offset, size)
                    )
                states = [(one, self._engine.status(one)) for one in under_way]
                if any(state not in (DONE, PENDING) for _, state in states):
                    raise OSError("a bare transfer failed")
                under_way = [one for one, state in states if state == PENDING]
                if under_way:
                    time.sleep(_TICK_S)
        return time.perf_counter() - began

    async def aclose(self) -> None:
        await asyncio.to_thread(self._engine.close)
