"""Writing to clients that may take nothing. aiohttp bounds neither a write nor the end of a response that it writes
itself when a handler has returned it: who asks and does not read keeps a connection, a descriptor, and what the kernel
holds of the answer, for as long as it likes. Such questions (``/health``, ``/metrics``) need no key.

A large answer has longer, so that a slow line that takes it all the time is not cut.

A handler whose client is gone, or is cut, ends as if it were cancelled, which aiohttp does itself where it sees the end
first: any other error is a traceback in the log for each such client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from aiohttp import web

SLOWEST_S = 1e-6
"""For each byte of a large piece."""


async def taken(request: web.Request, written: Awaitable[object], timeout_s: float) -> None:
    """Awaits a write. Cuts the connection if the client does not take it in time; raises CancelledError then, and if
    the client is gone."""
    try:
        async with asyncio.timeout(timeout_s):
            await written
    except TimeoutError as error:
        if request.transport is not None:  # to close it would wait for the client to take the rest
            request.transport.abort()
        raise asyncio.CancelledError(f"the client took nothing for {timeout_s:g} s") from error
    except ConnectionError as error:
        raise asyncio.CancelledError("the client is gone") from error


async def send(request: web.Request, response: web.StreamResponse, timeout_s: float) -> web.StreamResponse:
    """A response of a handler, written to its end, which aiohttp then does not do any more; raises as ``taken``."""
    body = response.body if isinstance(response, web.Response) else None
    size_bytes = len(body) if isinstance(body, bytes | bytearray) else 0
    await taken(request, _whole(request, response), timeout_s + size_bytes * SLOWEST_S)
    return response


def wait_for_all(request: web.Request) -> None:
    """Writes to the client of a request wait for its last byte from now on: of the rest, up to 64 KiB, nobody would
    know whether it is ever taken, and to close the connection waits for that."""
    if request.transport is not None:
        request.transport.set_write_buffer_limits(0)


async def _whole(request: web.Request, response: web.StreamResponse) -> None:
    wait_for_all(request)
    await response.prepare(request)
    await response.write_eof()
