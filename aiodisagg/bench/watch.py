"""How long an event loop is held: a clock that the loop itself reads, and the kernel's word on what was not its fault.

A timer descriptor expires every millisecond and the loop reads it; how late it does so is how long the loop was
kept from it by something: a callback, a blocking call, a thread that held the GIL, or the kernel that let another
process run. The last is no transport's fault and is told apart: the kernel counts for how long a thread was ready to
run and did not (``schedstat``), and that is subtracted. An idle loop, watched in the same way, is the control.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time

import msgspec

TICK_S = 0.001
_MONOTONIC, _ABSOLUTE = 1, 1


class _Times(ctypes.Structure):
    """``struct itimerspec``: interval and first expiry, seconds and nanoseconds."""

    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns")]


class Held(msgspec.Struct, frozen=True):
    """The worst of a watched time, in milliseconds."""

    late_ms: float
    """From when the loop should have turned until it did, whatever the reason."""
    held_ms: float
    """The same less the time in which its thread was ready and another process ran."""

    def worse(self, other: Held) -> Held:
        """The worst of two times, each number by itself."""
        return Held(max(self.late_ms, other.late_ms), max(self.held_ms, other.held_ms))


QUIET = Held(0.0, 0.0)


class LoopWatch:
    """Watches the running loop, on its thread, until ``close``."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.timerfd_create(_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._tick_ns = int(TICK_S * 1e9)
        self._due_ns = time.monotonic_ns() + self._tick_ns
        times = _Times(0, self._tick_ns, *divmod(self._due_ns, 10**9))
        libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(times), None)
        self._stat = -1
        with contextlib.suppress(OSError):  # a kernel without it: what others take counts as held
            self._stat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        self._waited_ns = self._waited()
        self._worst = QUIET
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._tick)

    def take(self) -> Held:
        """The worst since the last call."""
        worst, self._worst = self._worst, QUIET
        return worst

    def _waited(self) -> int:
        """Nanoseconds that this thread has been ready to run and did not."""
        return int(os.pread(self._stat, 128, 0).split()[1]) if self._stat >= 0 else 0

    def _tick(self) -> None:
        expired = int.from_bytes(os.read(self._fd, 8), "little")
        late_ns = time.monotonic_ns() - self._due_ns
        self._due_ns += expired * self._tick_ns
        waited_ns = self._waited()
        held_ns = max(0, late_ns - (waited_ns - self._waited_ns))
        self._waited_ns = waited_ns
        self._worst = self._worst.worse(Held(late_ns / 1e6, held_ns / 1e6))

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        if self._stat >= 0:
            os.close(self._stat)
