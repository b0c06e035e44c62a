"""Copies past the caches: the same bytes with libpmem and without it, and one line in the log where it is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from aiodisagg.transport import ipc, past_caches
from aiodisagg.transport.ipc import IpcTransport
from aiodisagg.transport.past_caches import copy_past_caches
from aiodisagg.transport.testing import Kit
from tests.conftest import LOOPS

NOWHERE = "libpmem-that-nobody-has.so.1"


@pytest.fixture(params=[past_caches.LIBRARY, NOWHERE])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(past_caches, "LIBRARY", request.param)
    past_caches.load.cache_clear()
    if request.param != NOWHERE and past_caches.load() is None:
        pytest.skip("libpmem1 is not installed, or not for this processor")
    yield request.param
    past_caches.load.cache_clear()


@pytest.mark.parametrize(("start", "size"), [(0, 0), (0, 1), (3, 61), (1, 4097), (7, (1 << 20) + 5)])
def test_exactly_the_bytes_that_were_named(library: str, start: int, size: int) -> None:
    source = np.random.default_rng(size).integers(1, 256, size + 64, np.uint8)
    target = np.zeros(size + 128, np.uint8)
    copy_past_caches(target.data[start : start + size], source.data[5 : 5 + size])
    assert (target[start : start + size] == source[5 : 5 + size]).all()
    assert not target[:start].any()
    assert not target[start + size :].any()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)
async def test_a_large_write_over_ipc(library: str, no_leaks: None) -> None:
    size = ipc.PAST_CACHES_BYTES + 12_345
    data = np.random.default_rng(0).integers(1, 256, size, np.uint8)
    async with Kit(IpcTransport).pair(size + 8192) as (receiver, writer, remote, _):
        await writer.write(remote, [receiver.slice(data.data, 4099)])
        assert (np.frombuffer(receiver.arena.view, np.uint8)[4099 : 4099 + size] == data).all()
        assert receiver.untouched(0, 4099)
        assert receiver.untouched(4099 + size)


def test_a_host_without_it_is_told_once_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(past_caches, "LIBRARY", NOWHERE)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    past_caches.load.cache_clear()
    target = memoryview(bytearray(8))
    try:
        with caplog.at_level(logging.INFO):
            for _ in range(2):
                copy_past_caches(target, memoryview(b"12345678"))
        assert bytes(target) == b"12345678"
        said = [one.getMessage() for one in caplog.records if "libpmem1" in one.getMessage()]
        assert len(said) == 1
        assert "apt-get install libpmem1" in said[0]
    finally:
        past_caches.load.cache_clear()


@pytest.mark.parametrize(("machine", "asked"), [("aarch64", False), ("riscv64", False), ("AMD64", True)])
def test_other_processors_copy_as_they_always_did(
    machine: str, asked: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """libpmem on aarch64 flushes line by line whatever it is told, and that is slower than a plain copy."""
    opened: list[str] = []

    def library(name: str) -> SimpleNamespace:
        opened.append(name)
        return SimpleNamespace(pmem_memcpy=SimpleNamespace())

    monkeypatch.setattr(past_caches.ctypes, "CDLL", library)
    monkeypatch.setattr("platform.machine", lambda: machine)
    past_caches.load.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert (past_caches.load() is not None) is asked
            if not asked:
                target = memoryview(bytearray(8))
                copy_past_caches(target, memoryview(b"12345678"))
                assert bytes(target) == b"12345678"
        assert opened == [past_caches.LIBRARY] * asked
        assert "apt-get" not in caplog.text and (machine in caplog.text) is not asked
    finally:
        past_caches.load.cache_clear()
