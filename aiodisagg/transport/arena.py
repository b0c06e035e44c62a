"""One registered memory arena: allocated once, its pages touched once, shared by every transport of a process.

The arena is an anonymous shared mapping (memfd): it has no name in the file system, another process can map it only
through a file descriptor that was handed over, and the kernel frees it with the last process that maps it, however
that one ends. A fresh mapping copies at a tenth of memory speed because of page faults, so all pages are made
resident at the start (``MADV_POPULATE_WRITE``, Linux 5.14; older kernels: one write per page). Its pages are huge ones
where ``/sys/kernel/mm/transparent_hugepage/shmem_enabled`` lets those have them who ask. Its size is sealed: nobody
who holds the descriptor can cut it short under another process's mapping, which would be a fatal SIGBUS there.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os

POOL_NAME = "aiodisagg-pool"
"""What the kernel calls the mapping in ``/proc/PID/maps``."""

_POPULATE_WRITE = 23
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_libc = ctypes.CDLL(None, use_errno=True)


def populate(address: int, size_bytes: int) -> bool:
    """Maps every page of a shared mapping for writing, without the GIL; False on kernels that cannot."""
    return bool(_libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), _POPULATE_WRITE) == 0)


def unmap(mapping: mmap.mmap, fd: int) -> None:
    """Gives a shared mapping back, and then its file. For a thread: it takes 0.1 to 0.3 s a GiB, nearly all of it
    without the GIL, which ``mmap.close`` alone would hold for all that time."""
    anchor = ctypes.c_char.from_buffer(mapping)
    _libc.madvise(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(len(mapping)), mmap.MADV_DONTNEED)
    del anchor
    with contextlib.suppress(BufferError):  # a traceback somewhere refers to a piece; the mapping goes with it
        mapping.close()
    os.close(fd)  # here the pages go, if nobody else has the file


def want_huge_pages(mapping: mmap.mmap) -> None:
    """Asks for them, before the pages are made or mapped. Kernels without them refuse, which changes nothing."""
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)


def is_sealed(fd: int) -> bool:
    """True for a descriptor whose size can never change again, as an arena's."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False


class Arena:
    """``size_bytes`` of shared, pre-faulted memory. Not thread-safe to close; reads and writes are the users'."""

    def __init__(self, size_bytes: int) -> None:
        if size_bytes <= 0:
            raise ValueError(f"size_bytes must be positive, not {size_bytes}")
        self.size_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd = os.memfd_create(POOL_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.size_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._mapping = mmap.mmap(self.fd, self.size_bytes)
            want_huge_pages(self._mapping)
        except BaseException:
            os.close(self.fd)
            raise
        self._anchor: ctypes.c_char | None = ctypes.c_char.from_buffer(self._mapping)
        self.address = ctypes.addressof(self._anchor)
        self.view = memoryview(self._mapping)
        if not populate(self.address, self.size_bytes):
            for offset in range(0, self.size_bytes, mmap.PAGESIZE):
                self._mapping[offset] = 0

    def close(self) -> None:
        """Closes the file and unmaps, at the latest when the last view that others still hold is gone. Idempotent."""
        if self._anchor is None:
            return
        self.view.release()
        self._anchor = None
        unmap(self._mapping, self.fd)
        del self._mapping

    def __repr__(self) -> str:
        state = "closed" if self._anchor is None else f"at {self.address:#x}"
        return f"<Arena {self.size_bytes} bytes, {state}>"
