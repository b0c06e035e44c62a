"""Copies whose stores go past the processor's caches, by libpmem where the host has it.

A store into memory that is in no cache first reads it; a large copy so moves three bytes for each one, and throws out
of the caches what others work with. Stores that go past them do neither. glibc's ``memcpy`` has them from a size on
that it guesses (over 128 MiB on some machines, in one call), libpmem when asked. Ordinary memory will do for it.

Only on x86-64: elsewhere (aarch64) libpmem has no such stores, does as if it had not been asked, and writes every line
of the target back to memory one by one, which is slower than ``memcpy``.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform

import numpy as np

log = logging.getLogger(__name__)

LIBRARY = "libpmem.so.1"
_NONTEMPORAL = 1 << 1
"""libpmem.h, PMEM_F_MEM_NONTEMPORAL. Without PMEM_F_MEM_NODRAIN the copy ends with a fence: whoever is told of its
end, on whichever processor, sees its bytes."""


def copy_past_caches(target: memoryview, source: memoryview) -> None:
    """One copy without the GIL. Both are contiguous bytes of the same size. Without ``load`` a plain one."""
    into, out_of = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    if (library := load()) is None:
        np.copyto(into, out_of)
    else:
        library.pmem_memcpy(into.ctypes.data, out_of.ctypes.data, out_of.nbytes, _NONTEMPORAL)


@functools.cache
def load() -> ctypes.CDLL | None:
    """libpmem, or None where it is not installed, or not on x86-64; said once in the log. On any thread."""
    if (machine := platform.machine()) not in ("x86_64", "AMD64"):
        log.info("large copies over ipc go through the caches on %s", machine)
        return None
    try:
        library = ctypes.CDLL(LIBRARY)
        copy = library.pmem_memcpy
    except (OSError, AttributeError) as error:
        log.info("large copies over ipc go through the caches: %s (apt-get install libpmem1)", error)
        return None
    copy.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
    copy.restype = ctypes.c_void_p
    log.debug("large copies over ipc go past the caches, by %s", LIBRARY)
    return library
