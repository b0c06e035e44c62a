"""Engine steps told from one process to another: a tower beside an engine, each in a process of its own.

One datagram a step over a socket pair (SOCK_SEQPACKET), a few microseconds for the engine. It never waits for the
other side: what does not get through is lost, and an engine that is not heard of counts as one that does nothing, so a
lost word, a stopped process or a closed socket can hold the tower back for ``SILENCE_S`` at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Callable
from types import TracebackType

from aiodisagg.encode.gate import SlackGate
from aiodisagg.engine.steps import StepWatcher

SILENCE_S = 2.0
_STEP = struct.Struct("<dI")


def step_pair() -> tuple[socket.socket, socket.socket]:
    """Sockets for a :class:`StepSender` and, in the other process, a :class:`StepReader`."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class StepSender(StepWatcher):
    """The engine's side, which does not know what the tower does. Owns the socket until ``close``."""

    def __init__(self, sock: socket.socket, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._sock, self._clock = sock, clock
        self._sock.setblocking(False)
        self._began, self._idle = 0.0, True

    def step_began(self) -> None:
        self._began = self._clock()

    def step_ended(self, decodes: int) -> None:
        if self._idle and not decodes:  # said already
            return
        self._idle = not decodes
        with contextlib.suppress(OSError):
            self._sock.send(_STEP.pack(max(0.0, self._clock() - self._began), decodes))

    def close(self) -> None:
        self._sock.close()


class StepReader:
    """The tower's side: feeds a gate on the loop while it is entered. Owns the socket."""

    def __init__(self, gate: SlackGate, sock: socket.socket, *, silence_s: float = SILENCE_S) -> None:
        self._gate, self._sock, self._silence_s = gate, sock, silence_s
        self._sock.setblocking(False)
        self._timer: asyncio.TimerHandle | None = None
        self.ended = asyncio.Event()
        """The other side has closed its socket, or ended."""

    async def __aenter__(self) -> StepReader:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._sock.fileno(), self._read)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
        self._sock.close()

    def _read(self) -> None:
        while True:
            try:
                told = self._sock.recv(_STEP.size)
            except BlockingIOError:
                break
            except OSError:
                told = b""
            if not told:
                self._end()
                return
            self._gate.stepped(*_STEP.unpack(told))
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._silence_s, self._gate.stepped, 0.0, 0)

    def _end(self) -> None:
        """There is no engine to slow down."""
        self.ended.set()
        self._loop.remove_reader(self._sock.fileno())
        if self._timer is not None:
            self._timer.cancel()
        self._gate.stepped(0.0, 0)
