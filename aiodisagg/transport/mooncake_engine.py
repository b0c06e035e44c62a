"""Mooncake's transfer engine behind typed, blocking calls; the only file that imports mooncake.

What its own signatures do not say, and what this file does about it:

* It is configured by environment variables that are read at import or at ``initialize``, so they are set here, before.
* ``initialize(..., "rdma", ...)`` on a host without RDMA runs TCP and says 0. ``MC_FORCE_HCA`` makes it fail instead.
* A sync call, a batch call and everything that opens a peer may block for a minute while they hold the engine's one
  mutex, some of them with the GIL: nothing here may be called on an event loop's thread.
* Its destructor joins a thread that sits in ``accept`` for up to one second, **with the GIL**. The time-out of that
  ``accept`` is an option of the listening socket, which any descriptor of it can change: set to 2 ms, the same
  destructor takes 3-8 ms (measured) instead of 1,000.
* Its memory may be read and written until the destructor returned (TCP) or the range is unregistered (RDMA).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Any

from aiodisagg.errors import ConfigError, TransportUnavailable

log = logging.getLogger(__name__)

DONE, FAILED, PENDING, OVERDUE = 1, -1, 0, -2
"""Outcomes of :meth:`Engine.status`. After DONE and FAILED the id is freed: asking again is a use after free."""

_HCAS = Path("/sys/class/infiniband")
_lock = threading.Lock()
_progress_timeout_s: int | None = None
_parked: list[Engine] = []


def _import(name: str, progress_timeout_s: int) -> Any:  # Any: mooncake has no types
    """mooncake.engine, imported with the variables that this package relies on."""
    global _progress_timeout_s
    if _progress_timeout_s not in (None, progress_timeout_s):
        text = f"this process's engine already runs with {_progress_timeout_s}, which cannot be changed"
        raise ConfigError("progress_timeout_s", text)
    if os.environ.get("MC_LOG_DIR"):
        raise TransportUnavailable(name, "unset MC_LOG_DIR: this engine aborts the process when it is set")
    if "mooncake.engine" in sys.modules and _progress_timeout_s is None:
        log.warning("mooncake.engine was imported before aiodisagg could configure it; time-outs may differ")
    # A failure must be the session's own end, after which the source is at rest: the outer deadline stays far away.
    os.environ["MC_TRANSFER_TIMEOUT"] = "600"
    os.environ["MC_TCP_PROGRESS_TIMEOUT_SEC"] = os.environ["MC_TCP_STATUS_TIMEOUT_SEC"] = str(progress_timeout_s)
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    os.environ.setdefault("MC_TCP_SLICE_SIZE", str(1 << 20))
    try:
        from mooncake import engine
    except ImportError as error:
        hint = 'the extra "mooncake-cpu" of aiodisagg (or "mooncake", with CUDA) or the package libibverbs1 is missing'
        raise TransportUnavailable(name, f"cannot import mooncake.engine: {error}; {hint}") from error
    _progress_timeout_s = progress_timeout_s
    return engine


def _hcas(topology: str) -> list[str]:
    """Names of the RDMA devices in ``get_local_topology``'s answer: ``{"cpu:0": [[preferred], [others]]}``."""
    try:
        return sorted({name for lists in json.loads(topology).values() for names in lists for name in names})
    except (ValueError, AttributeError, TypeError):
        return []


class Engine:
    """One transfer engine in P2P mode. All methods block and release the GIL but where said otherwise.

    Args:
        name: of the transport, for errors.
        protocol: ``"tcp"`` or ``"rdma"``; never anything else than what was asked for.
        host: IPv4 address under which others reach this host. The engine listens on 0.0.0.0 whatever this says.
        devices: RDMA devices, with commas; empty: all.
    Raises:
        TransportUnavailable: no library, no RDMA device, no port.
    """

    def __init__(self, name: str, protocol: str, host: str, devices: str, progress_timeout_s: int) -> None:
        self._name, self._host = name, host
        rdma = protocol == "rdma"
        if rdma and not (_HCAS.is_dir() and any(_HCAS.iterdir())):
            raise TransportUnavailable(name, f"no RDMA device: {_HCAS} is empty")
        with _lock:  # the variables are the process's
            library = _import(name, progress_timeout_s)
            _choose("MC_FORCE_HCA" if rdma else "MC_FORCE_TCP")
            if rdma and not (found := _hcas(library.TransferEngine().get_local_topology(devices))):
                raise TransportUnavailable(name, f"the engine finds no usable RDMA device among {found or devices!r}")
            self._engine: Any = library.TransferEngine()
            code = self._engine.initialize(host, "P2PHANDSHAKE", protocol, devices)
        if code:
            raise TransportUnavailable(
                name, f"the engine does not start with {protocol} ({code}); see its log on stderr"
            )
        self.port: int = self._engine.get_rpc_port()
        self._hasten_accept()

    def _hasten_accept(self) -> None:
        """Makes the destructor quick; see the module's text. Without it everything works, and close takes a second."""
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(fd))) as sock:
                    listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(
                        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
                    )
                    if listens and sock.getsockname()[1] == self.port:
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 2000))
                        self.probe(f"127.0.0.1:{self.port}")  # ends the accept that still has the old time-out
                        return
        log.warning("the engine's listening socket was not found; its end will hold the GIL for a second")

    def register(self, address: int, size_bytes: int) -> None:
        """Lets peers write into a range and this engine read from it. RDMA pins its pages."""
        if code := self._engine.batch_register_memory([address], [size_bytes], "*"):
            text = f"cannot register {size_bytes} bytes ({code}); with RDMA, is `ulimit -l` large enough?"
            raise TransportUnavailable(self._name, text)

    def unregister(self, address: int) -> None:
        """A fence with RDMA. With TCP a request that has begun goes on to its end."""
        if code := self._engine.batch_unregister_memory([address]):
            log.warning("%s: unregister returned %s", self._name, code)

    def probe(self, segment: str) -> bool:
        """Does an engine answer there? Opens a connection of its own and takes no lock; up to 65 s."""
        return bool(self._engine.send_probe(segment) == 0)

    def submit(self, segment: str, source: int, destination: int, size_bytes: int) -> int:
        """Starts a write; 0: it was not started. The first one to a peer shakes hands with it, under the mutex."""
        return int(self._engine.transfer_submit_write(segment, source, destination, size_bytes))

    def status(self, transfer: int) -> int:
        """How a transfer stands; microseconds. Never call it again with an id that was DONE or FAILED."""
        return int(self._engine.transfer_check_status(transfer))

    def close(self) -> None:
        """Destroys the engine unless another thread is still inside it: then that thread's last step does.

        Holds the GIL: 3-8 ms with TCP. After it, nothing is read or written any more."""
        self._engine = None

    def park(self) -> None:
        """Keeps the engine until the process ends, for an RDMA engine with transfers that will never end.

        Its destructor would hold the GIL for ten seconds, now or at the interpreter's exit; the kernel needs none."""
        import ctypes

        _parked.append(self)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._engine))  # not even the interpreter's end destroys it


def _choose(wanted: str) -> None:
    for key in ("MC_FORCE_TCP", "MC_FORCE_HCA"):
        if key == wanted:
            os.environ[key] = "1"
        else:
            os.environ.pop(key, None)
