"""Copies to, from and on an accelerator, beside what it computes.

One stream carries the copies of a direction; threads put copies on it and sleep on an event behind their own, so while
one thread wakes up the device is busy with the next thread's copy. Nothing here may run on an event loop's thread.
A copy that was started touches its memory until its event: ``copy`` therefore returns, or raises, only after that. If
there is no event to be had, the whole stream is waited for.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from aiodisagg.errors import DeviceError


class Runtime(Protocol):
    """What is needed of :class:`~aiodisagg.device.cudart.Cudart`; tests bring another."""

    def set_device(self, device: int) -> None: ...
    def register(self, address: int, size_bytes: int) -> None: ...
    def unregister(self, address: int) -> None: ...
    def create_stream(self) -> int: ...
    def destroy_stream(self, stream: int) -> None: ...
    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None: ...
    def record(self, stream: int) -> int: ...
    def wait(self, event: int) -> None: ...
    def synchronize(self, stream: int) -> None: ...
    def malloc(self, size_bytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def export(self, address: int) -> bytes: ...
    def open(self, handle: bytes) -> int: ...
    def close(self, address: int) -> None: ...
    def bus_id(self, device: int) -> str: ...
    def device_at(self, bus_id: str) -> int: ...
    def enable_peer(self, device: int, peer: int) -> None: ...


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """Bytes in an accelerator's memory. ``owner`` keeps them alive; what they say was computed before this was made."""

    address: int
    size_bytes: int
    owner: object = field(repr=False, default=None)


def address_of(data: memoryview) -> int:
    """Where contiguous bytes begin; valid as long as they are."""
    return int(np.frombuffer(data, np.uint8).ctypes.data)


class SideStream:
    """A stream for copies on one device. Thread-safe; ``close`` after the last copy."""

    def __init__(self, runtime: Runtime, device: int) -> None:
        self._runtime, self._device = runtime, device
        runtime.set_device(device)
        self.handle = runtime.create_stream()

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Returns when the bytes are at ``target``. Blocks the thread. Host memory should be registered.

        Raises DeviceError; also then neither end is touched any more, unless the message says that the stream could
        not be waited for either: of a device that refuses even that, nobody can say it.
        """
        self._runtime.set_device(self._device)
        self._runtime.copy(target, source, size_bytes, self.handle)
        self.wait()

    def wait(self) -> None:
        """Returns when all that is on the stream now is done. Blocks the thread. Raises DeviceError, as ``copy``."""
        try:
            self._runtime.wait(self._runtime.record(self.handle))
        except DeviceError as error:
            try:
                self._runtime.synchronize(self.handle)
            except DeviceError as again:
                raise DeviceError(f"{error}; and the stream could not be waited for: {again}") from error
            raise

    def close(self) -> None:
        self._runtime.destroy_stream(self.handle)


class Pinned:
    """Registered host memory. ``close`` before it is unmapped; idempotent. Slow (0.1 s a GiB): not for the loop."""

    def __init__(self, runtime: Runtime, address: int, size_bytes: int) -> None:
        self._runtime, self._address, self._open = runtime, address, True
        runtime.register(address, size_bytes)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._runtime.unregister(self._address)


class Accelerator:
    """One device of this process, and its two streams: ``outward`` carries its memory to others, ``inward`` back.

    Two, because a device copies both ways at once.
    """

    def __init__(self, runtime: Runtime, device: int) -> None:
        self.runtime, self.device = runtime, device
        self.outward = SideStream(runtime, device)
        self.inward = SideStream(runtime, device)
        self._lock = threading.Lock()
        self._closed = False

    def pin(self, address: int, size_bytes: int) -> Pinned:
        """Raises DeviceError: no right to lock that much, or registered already."""
        self.runtime.set_device(self.device)
        return Pinned(self.runtime, address, size_bytes)

    def close(self) -> None:
        """After the last copy. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.outward.close()
        self.inward.close()


def open_accelerator(device: str) -> Accelerator | None:
    """The accelerator of a torch device name: ``cuda`` or ``cuda:1``; None for any other kind of device.

    Raises DeviceError if there is none.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None
    from aiodisagg.device.cudart import Cudart

    if index and not index.isdecimal():
        raise DeviceError(f"{device!r} names no device")
    return Accelerator(Cudart.load(), int(index or 0))
