"""Words that leave a socket together: a write is a system call, and wakes the peer.

The first word of a turn of the loop leaves at once, so that a word alone is as fast as it can be; those that follow in
the same turn wait for its end, and what is said while received words are handled for the end of that. Never more than
a few of them: the peer begins with what it has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

MOST_BYTES: Final = 1024
"""That wait; what is larger waits for nothing. Some fifteen words."""


class Gather:
    """Bytes leave in the order of ``put``, which may be called from ``open`` to ``drop``. Methods belong to the loop's
    thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._write: Callable[[bytes], None] | None = None
        self._waiting, self._holds = b"", False

    def open(self, write: Callable[[bytes], None]) -> None:
        """``write``: to the socket."""
        self._write = write

    def put(self, data: bytes) -> None:
        assert self._write is not None
        if self._holds and len(data) < MOST_BYTES:
            self._waiting += data
            if len(self._waiting) >= MOST_BYTES:
                self._send()
            return
        self._send()
        self._write(data)
        if not self._holds:
            self._holds = True
            self._loop.call_soon(self.release)

    def hold(self) -> None:
        """What is put from now on waits for ``release``."""
        self._holds = True

    def release(self) -> None:
        self._holds = False
        self._send()

    def drop(self) -> None:
        """The socket is not to be written to any more: what waits will not leave."""
        self._waiting, self._write = b"", None

    def _send(self) -> None:
        if self._waiting and self._write is not None:
            data, self._waiting = self._waiting, b""
            self._write(data)
