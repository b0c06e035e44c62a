"""CUDA's runtime by ctypes, as far as torch does not offer it or offers it only on the wrong thread.

The only file that calls it. The library is the one that torch has already brought into this process, so both see the
same contexts; a process without it has no business here and gets a DeviceError. Every call lets go of the GIL. A call
that fails is taken out of the runtime's own memory of errors: torch looks there after each kernel it starts.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

from aiodisagg.errors import DeviceError

HANDLE_BYTES = 64

_REGISTER_PORTABLE = 1
_STREAM_NON_BLOCKING = 1
_EVENT_BLOCKING_SYNC_NO_TIMING = 1 | 2
_COPY_DEFAULT = 4
_LAZY_PEER_ACCESS = 1
_PEER_ACCESS_ALREADY_ENABLED = 704


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


class Cudart:
    """The runtime. Thread-safe; the *current device* belongs to the calling thread. Addresses are plain integers.

    Raises DeviceError: from ``load`` if the library or a device is missing, from every other method if the call fails.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("cudaGetErrorString", "cudaGetErrorName"):
            getattr(library, name).restype = ctypes.c_char_p
        library.cudaIpcOpenMemHandle.argtypes = [ctypes.POINTER(ctypes.c_void_p), _IpcHandle, ctypes.c_uint]

    @classmethod
    def load(cls) -> Cudart:
        for path in _candidates():
            try:
                library = ctypes.CDLL(path)
            except OSError:
                continue
            runtime = cls(library)
            count = ctypes.c_int()
            runtime._call("cudaGetDeviceCount", ctypes.byref(count))
            return runtime
        raise DeviceError("no CUDA runtime library is loaded: this torch is built without CUDA")

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._library.cudaGetLastError()
            raise DeviceError(f"{name}: {self._library.cudaGetErrorString(code).decode()} ({code})")

    def set_device(self, device: int) -> None:
        """Of the calling thread."""
        self._call("cudaSetDevice", ctypes.c_int(device))

    # -- host memory ---------------------------------------------------------------------------------------------

    def register(self, address: int, size_bytes: int) -> None:
        """Locks mapped host pages and tells all devices of them: copies run at full speed, without a bounce buffer."""
        size = ctypes.c_size_t(size_bytes)
        self._call("cudaHostRegister", ctypes.c_void_p(address), size, ctypes.c_uint(_REGISTER_PORTABLE))

    def unregister(self, address: int) -> None:
        self._call("cudaHostUnregister", ctypes.c_void_p(address))

    # -- copies --------------------------------------------------------------------------------------------------

    def create_stream(self) -> int:
        """On the current device; never waits for the default stream, nor the other way round. It goes before all that
        is computed: a copy inside of a device is a kernel, takes microseconds, and somebody waits for it."""
        stream, least, first = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        self._call("cudaDeviceGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(first))
        self._call("cudaStreamCreateWithPriority", ctypes.byref(stream), ctypes.c_uint(_STREAM_NON_BLOCKING), first)
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Starts a copy between any two memories. Returns before it is done if host memory is registered."""
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size_bytes),
            ctypes.c_int(_COPY_DEFAULT),
            ctypes.c_void_p(stream),
        )

    def record(self, stream: int) -> int:
        """An event behind everything that the stream has so far."""
        event = ctypes.c_void_p()
        self._call("cudaEventCreateWithFlags", ctypes.byref(event), ctypes.c_uint(_EVENT_BLOCKING_SYNC_NO_TIMING))
        try:
            self._call("cudaEventRecord", event, ctypes.c_void_p(stream))
        except DeviceError:
            self._call("cudaEventDestroy", event)
            raise
        return event.value or 0

    def wait(self, event: int) -> None:
        """Blocks the thread, asleep, until the event has come; the event is used up."""
        try:
            self._call("cudaEventSynchronize", ctypes.c_void_p(event))
        finally:
            self._call("cudaEventDestroy", ctypes.c_void_p(event))

    def synchronize(self, stream: int) -> None:
        """Blocks the thread until everything that the stream has is done; needs no event, and may keep a processor."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    # -- device memory, here and in other processes --------------------------------------------------------------

    def malloc(self, size_bytes: int) -> int:
        """An allocation of its own on the current device: torch's may be a part of one, which no handle can name."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        return address.value or 0

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def export(self, address: int) -> bytes:
        """The handle of an allocation, for another process of this host."""
        handle = _IpcHandle()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """Maps another process's allocation for the *current device*, with peer access if it lies on another one."""
        address = ctypes.c_void_p()
        words = _IpcHandle.from_buffer_copy(handle)
        self._call("cudaIpcOpenMemHandle", ctypes.byref(address), words, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return address.value or 0

    def close(self, address: int) -> None:
        self._call("cudaIpcCloseMemHandle", ctypes.c_void_p(address))

    def bus_id(self, device: int) -> str:
        """Names a device the same in every process, whichever devices that one was shown."""
        text = ctypes.create_string_buffer(32)
        self._call("cudaDeviceGetPCIBusId", text, ctypes.c_int(32), ctypes.c_int(device))
        return text.value.decode()

    def device_at(self, bus_id: str) -> int:
        """This process's number of a device. Raises DeviceError if it is not visible here."""
        device = ctypes.c_int()
        self._call("cudaDeviceGetByPCIBusId", ctypes.byref(device), ctypes.c_char_p(bus_id.encode()))
        return device.value

    def enable_peer(self, device: int, peer: int) -> None:
        """Lets ``device`` reach the memory of ``peer`` without the host. Raises DeviceError if they are not linked."""
        able = ctypes.c_int()
        self._call("cudaDeviceCanAccessPeer", ctypes.byref(able), ctypes.c_int(device), ctypes.c_int(peer))
        if not able.value:
            raise DeviceError(f"device {device} cannot reach the memory of device {peer}")
        self.set_device(device)
        code = self._library.cudaDeviceEnablePeerAccess(ctypes.c_int(peer), ctypes.c_uint(0))
        if code:
            self._library.cudaGetLastError()
        if code not in (0, _PEER_ACCESS_ALREADY_ENABLED):
            raise DeviceError(f"cudaDeviceEnablePeerAccess: {self._library.cudaGetErrorString(code).decode()}")


def _candidates() -> Iterator[str]:
    with open("/proc/self/maps") as maps:
        loaded = {line.split(None, 5)[5].strip() for line in maps if "libcudart" in line}
    return itertools.chain(sorted(loaded), ("libcudart.so.13", "libcudart.so.12"))
