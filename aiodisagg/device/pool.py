"""A receive pool in device memory, and the same pool as another process of the host sees it.

The pool is the twin of an arena: what may be written at an offset of the arena, under a lease, may be written at the
same offset of the twin instead, and the lease is fenced as it is for the arena. So the twin needs no leases, words or
processes of its own; only a chunk says in which of the two it landed.

CUDA opens no memory of the very process that exported it, so a peer that is both finds its own pool in a table here.
"""

from __future__ import annotations

import threading
from typing import Annotated

import msgspec

from aiodisagg.device.copies import Accelerator, DeviceBytes, Runtime
from aiodisagg.device.cudart import HANDLE_BYTES
from aiodisagg.errors import DeviceError

NAME = "cuda"
"""Under which a hello describes the pool, beside the transports'."""


class _Words(msgspec.Struct, frozen=True, array_like=True):
    handle: Annotated[bytes, msgspec.Meta(min_length=HANDLE_BYTES, max_length=HANDLE_BYTES)]
    size_bytes: Annotated[int, msgspec.Meta(gt=0)]
    bus_id: str


class _Memory:
    """Memory of this process that is freed when the last of its holders lets go."""

    def __init__(self, runtime: Runtime, size_bytes: int) -> None:
        self._runtime, self._holders, self._lock = runtime, 1, threading.Lock()
        self.address = runtime.malloc(size_bytes)

    def hold(self) -> bool:
        """False: it is freed already."""
        with self._lock:
            self._holders += self._holders > 0
            return self._holders > 0

    def let_go(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._runtime.free(self.address)


_ours: dict[bytes, _Memory] = {}
"""Pools of this process by their handles."""


class DevicePool:
    """``size_bytes`` of an accelerator's memory that other processes can open. Raises DeviceError without room."""

    def __init__(self, accelerator: Accelerator, size_bytes: int) -> None:
        self.size_bytes, runtime = size_bytes, accelerator.runtime
        runtime.set_device(accelerator.device)
        self._memory = memory = _Memory(runtime, size_bytes)
        try:
            words = _Words(runtime.export(memory.address), size_bytes, runtime.bus_id(accelerator.device))
        except DeviceError:
            memory.let_go()
            raise
        self._handle, self._open = words.handle, True
        _ours[words.handle] = memory
        self.description = msgspec.msgpack.encode(words)

    def at(self, offset: int, size_bytes: int) -> DeviceBytes:
        return DeviceBytes(self._memory.address + offset, size_bytes, self)

    def close(self) -> None:
        """Frees the memory; those who have it open keep it until they close it. Idempotent."""
        if self._open:
            self._open = False
            _ours.pop(self._handle, None)
            self._memory.let_go()


class RemotePool:
    """A :class:`DevicePool`, mostly another process's, opened for this process's device.

    It is opened *on the device that writes*, with peer access if it lies on another one; opened on its own device,
    as torch does it, a copy from the writer's device goes through the host.

    Raises DeviceError: damaged words, another size than ``size_bytes``, a device that is not visible or not linked.
    """

    def __init__(self, accelerator: Accelerator, description: bytes, size_bytes: int) -> None:
        self._runtime = runtime = accelerator.runtime
        try:
            words = msgspec.msgpack.decode(description, type=_Words)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise DeviceError(f"the peer's device pool cannot be read: {error}") from error
        if words.size_bytes != size_bytes:
            raise DeviceError(f"the peer's device pool has {words.size_bytes} bytes, its arena {size_bytes}")
        there = runtime.device_at(words.bus_id)
        if there != accelerator.device:
            runtime.enable_peer(accelerator.device, there)
        runtime.set_device(accelerator.device)
        memory = _ours.get(words.handle)
        self._memory = memory if memory is not None and memory.hold() else None
        self.address = runtime.open(words.handle) if self._memory is None else self._memory.address

    def close(self) -> None:
        """After the last copy into it. Idempotent."""
        if self.address:
            self.address, address = 0, self.address
            if self._memory is None:
                self._runtime.close(address)
            else:
                self._memory.let_go()
