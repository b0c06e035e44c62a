"""A CUDA runtime in the host's memory: copies are late, and every misuse of memory is written down.

A copy moves its bytes only when somebody waits for an event behind it, and not before ``gate`` is open. So whoever
believes that a started copy is a finished one finds stale bytes.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from dataclasses import dataclass, field

from aiodisagg.errors import DeviceError


@dataclass
class FakeCuda:
    """``log``: (what, numbers ...) in order. ``wrong``: misuses; a test asserts that there are none."""

    can_open: bool = True
    log: list[tuple[str, ...]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.fails = self.record_fails = self.lost = False
        self.registered: dict[int, int] = {}
        self.allocated: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.opened: list[int] = []
        self._handles: dict[bytes, int] = {}
        self._streams: dict[int, list[tuple[int, int, int]]] = {}
        self._events: dict[int, tuple[int, int]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._local = threading.local()

    def names(self) -> list[str]:
        return [entry[0] for entry in self.log]

    def _say(self, *words: object) -> None:
        self.log.append(tuple(str(word) for word in words))

    def _known(self, address: int) -> str:
        for start, size in self.registered.items():
            if start <= address < start + size:
                return "pinned"
        for start, memory in self.allocated.items():
            if start <= address < start + len(memory):
                return "device"
        return "other"

    def set_device(self, device: int) -> None:
        self._local.device = device

    def register(self, address: int, size_bytes: int) -> None:
        with self._lock:
            if address in self.registered:
                raise DeviceError("registered already")
            self.registered[address] = size_bytes
            self._say("register", size_bytes)

    def unregister(self, address: int) -> None:
        with self._lock:
            if self.registered.pop(address, None) is None:
                self.wrong.append("unregistered what is not registered")
            self._say("unregister")

    def create_stream(self) -> int:
        stream = next(self._numbers)
        self._streams[stream] = []
        return stream

    def destroy_stream(self, stream: int) -> None:
        if self._streams.pop(stream):
            self.wrong.append("a stream was destroyed before its copies were done")

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        if not hasattr(self._local, "device"):
            self.wrong.append("a copy on a thread without a device")
        if self.fails:
            raise DeviceError("out of order")
        with self._lock:
            self._streams[stream].append((target, source, size_bytes))
            self._say("copy", self._known(source), self._known(target))

    def record(self, stream: int) -> int:
        if self.record_fails or self.lost:
            raise DeviceError("no event to be had")
        with self._lock:
            event = next(self._numbers)
            self._events[event] = stream, len(self._streams[stream])
            self._say("record")
            return event

    def wait(self, event: int) -> None:
        self.waiting.set()
        assert self.gate.wait(30)
        with self._lock:
            self._move(self._events.pop(event)[0])
            self._say("event")

    def synchronize(self, stream: int) -> None:
        if self.lost:
            self._streams[stream].clear()  # nothing runs on it any more
            raise DeviceError("the device is lost")
        self.waiting.set()
        assert self.gate.wait(30)
        with self._lock:
            self._move(stream)
            self._say("synchronize")

    def _move(self, stream: int) -> None:
        for target, source, size_bytes in self._streams[stream]:
            ctypes.memmove(target, source, size_bytes)
        self._streams[stream].clear()

    def malloc(self, size_bytes: int) -> int:
        memory = ctypes.create_string_buffer(size_bytes)
        address = ctypes.addressof(memory)
        self.allocated[address] = memory
        return address

    def free(self, address: int) -> None:
        if self.allocated.pop(address, None) is None:
            self.wrong.append("freed what is not allocated")

    def export(self, address: int) -> bytes:
        handle = next(self._numbers).to_bytes(64, "big")
        self._handles[handle] = address
        return handle

    def open(self, handle: bytes) -> int:
        if not self.can_open or handle not in self._handles:
            raise DeviceError("invalid handle")
        self.opened.append(self._handles[handle])
        self._say("open")
        return self._handles[handle]

    def close(self, address: int) -> None:
        self.opened.remove(address)
        self._say("close")

    def bus_id(self, device: int) -> str:
        return f"0000:{device:02x}:00.0"

    def device_at(self, bus_id: str) -> int:
        return int(bus_id[5:7], 16)

    def enable_peer(self, device: int, peer: int) -> None:
        self._say("enable_peer", device, peer)
