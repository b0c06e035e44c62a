"""Shared fixtures: event loops, and a check that a test leaves nothing of this process behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Else MKL on some processors (AVX-512) sums a row in another order for another number of rows: tests compare bits.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when Triton is imported

import pytest
import uvloop

# A shell that runs tests in the background has them ignore SIGINT, and what they start would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# libuv makes one pipe for the whole process with its first loop and keeps it; not a leak of any test.
uvloop.new_event_loop().close()

LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]


@pytest.fixture(params=[LOOPS[0]])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """asyncio; a module that promises to work on every loop parametrizes this with ``LOOPS``."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def skip(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the running loop's clock on: what is to happen in so many seconds happens now. asyncio's own loop only."""
    ahead_s = 0.0

    def skip(seconds: float) -> None:
        nonlocal ahead_s
        if not ahead_s:
            loop = asyncio.get_running_loop()
            assert not isinstance(loop, uvloop.Loop), "its clock is its own"
            now = loop.time
            monkeypatch.setattr(loop, "time", lambda: now() + ahead_s)
        ahead_s += seconds

    return skip


def _open_files() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    return found


LIBRARIES_S = 5.0
"""Threads of the transfer engine close what they hold after they were told to end, when they get to it."""


@pytest.fixture(scope="module")
def _small_heap() -> None:
    """What is there before a module's first test, libraries above all, is not looked through at each of its tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Garbage in cycles stays where it is."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def no_leaks(_small_heap: None) -> Iterator[None]:
    """Fails a test that leaves threads, descriptors or shared memory behind."""
    gc.collect()
    threads = set(threading.enumerate())
    files = _open_files()
    shared = set(os.listdir("/dev/shm"))
    yield
    gc.collect()

    def left() -> dict[str, object]:
        found: dict[str, object] = {
            "threads": [t for t in threading.enumerate() if t not in threads and t.is_alive() and not t.daemon],
            "descriptors": {fd: to for fd, to in _open_files().items() if fd not in files},
            "shared memory": set(os.listdir("/dev/shm")) - shared,
        }
        return {what: which for what, which in found.items() if which}

    until = time.monotonic() + LIBRARIES_S
    while left() and time.monotonic() < until:
        time.sleep(0.02)
    assert not left()
