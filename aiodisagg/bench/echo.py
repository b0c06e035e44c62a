"""The limit of a link: the same bytes sent to and fro by two uvloop protocols that do nothing with them."""

from __future__ import annotations

import asyncio
import time
from typing import cast


class Echo(asyncio.Protocol):
    """Sends back what it gets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


class Caller(asyncio.Protocol):
    """The other end: sends the next one from the callback that got the last one's answer. No task, no future each."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    async def round_trips(self, data: bytes, count: int) -> list[float]:
        """Seconds of each."""
        self._data, self._count, self._missing = data, count, len(data)
        self._times: list[float] = []
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._began = time.perf_counter()
        self._transport.write(data)
        await self._done
        return self._times

    def data_received(self, data: bytes) -> None:
        self._missing -= len(data)
        if self._missing:
            return
        now = time.perf_counter()
        self._times.append(now - self._began)
        if len(self._times) == self._count:
            self._done.set_result(None)
            return
        self._began, self._missing = now, len(self._data)
        self._transport.write(self._data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(exc or ConnectionResetError("the other end is gone"))

    def close(self) -> None:
        self._transport.close()
