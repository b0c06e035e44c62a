"""A receive pool in device memory, and the same pool as another process of the host sees it.

The pool is the twin of an arena: what may be written at an offset of the arena, under a lease, may be written at the
same offset of the twin instead, and the lease is fenced as it is for the arena. So the twin needs no leases, words or
processes of its own; only a chunk says in which of the two it landed.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from aiodisagg.device.copies import Accelerator, DeviceBytes
from aiodisagg.device.cudart import HANDLE_BYTES
from aiodisagg.errors import DeviceError

NAME = "cuda"
"""Under which a hello describes the pool, beside the transports'."""


class _Words(msgspec.Struct, frozen=True, array_like=True):
    handle: Annotated[bytes, msgspec.Meta(min_length=HANDLE_BYTES, max_length=HANDLE_BYTES)]
    size_bytes: Annotated[int, msgspec.Meta(gt=0)]
    bus_id: str


class DevicePool:
    """``size_bytes`` of an accelerator's memory that other processes can open. Raises DeviceError without room."""

    def __init__(self, accelerator: Accelerator, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._runtime = runtime = accelerator.runtime
        runtime.set_device(accelerator.device)
        self._address = runtime.malloc(size_bytes)
        try:
            words = _Words(runtime.export(self._address), size_bytes, runtime.bus_id(accelerator.device))
        except DeviceError:
            runtime.free(self._address)
            raise
        self.description = msgspec.msgpack.encode(words)

    def at(self, offset: int, size_bytes: int) -> DeviceBytes:
        return DeviceBytes(self._address + offset, size_bytes, self)

    def close(self) -> None:
        """Frees the memory; those who have it open keep it until they close it. Idempotent."""
        if self._address:
            self._runtime.free(self._address)
            self._address = 0


class RemotePool:
    """Another process's :class:`DevicePool`, opened for this process's device.

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
        self.address = runtime.open(words.handle)

    def close(self) -> None:
        """After the last copy into it. Idempotent."""
        if self.address:
            self._runtime.close(self.address)
            self.address = 0
