"""Copies end with their events; memory is registered and opened as long as it is used, and no longer."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from aiodisagg.device import pool as device_pool
from aiodisagg.device.copies import Accelerator, SideStream, open_accelerator
from aiodisagg.device.pool import DevicePool, RemotePool
from aiodisagg.errors import DeviceError
from tests.device.fake_cuda import FakeCuda


def test_a_copy_returns_after_its_event_and_not_before(cuda: FakeCuda) -> None:
    source, target = ctypes.create_string_buffer(b"rows"), ctypes.create_string_buffer(5)
    stream = SideStream(cuda, 0)
    cuda.gate.clear()
    ended = threading.Event()

    def copy() -> None:
        stream.copy(ctypes.addressof(target), ctypes.addressof(source), 5)
        ended.set()

    thread = threading.Thread(target=copy)
    thread.start()
    assert cuda.waiting.wait(30)
    assert not ended.is_set() and target.value == b""
    cuda.gate.set()
    thread.join()
    assert ended.is_set() and target.value == b"rows"
    assert cuda.names() == ["copy", "record", "event"]
    stream.close()


def test_a_copy_that_cannot_start_raises_and_leaves_nothing_on_the_stream(cuda: FakeCuda) -> None:
    stream = SideStream(cuda, 0)
    cuda.fails = True
    with pytest.raises(DeviceError, match="out of order"):
        stream.copy(1, 2, 3)
    stream.close()


def test_a_copy_whose_event_fails_is_waited_for_all_the_same(cuda: FakeCuda) -> None:
    """It raised while the device still read the one end and wrote to the other."""
    source, target = ctypes.create_string_buffer(b"rows"), ctypes.create_string_buffer(5)
    stream = SideStream(cuda, 0)
    cuda.record_fails = True
    cuda.gate.clear()
    raised: list[DeviceError] = []

    def copy() -> None:
        try:
            stream.copy(ctypes.addressof(target), ctypes.addressof(source), 5)
        except DeviceError as error:
            raised.append(error)

    thread = threading.Thread(target=copy)
    thread.start()
    assert cuda.waiting.wait(30)
    assert not raised and target.value == b""
    cuda.gate.set()
    thread.join()
    assert [str(error) for error in raised] == ["no event to be had"] and target.value == b"rows"
    assert cuda.names() == ["copy", "synchronize"]
    stream.close()


def test_a_copy_that_cannot_be_waited_for_says_both_reasons(cuda: FakeCuda) -> None:
    source, target = ctypes.create_string_buffer(b"rows"), ctypes.create_string_buffer(5)
    stream = SideStream(cuda, 0)
    cuda.lost = True
    with pytest.raises(DeviceError, match=r"no event to be had; and the stream .* the device is lost") as caught:
        stream.copy(ctypes.addressof(target), ctypes.addressof(source), 5)
    assert "no event" in str(caught.value.__cause__) and str(caught.value.__context__) == "the device is lost"
    stream.close()


def test_memory_is_let_go_once(accelerator: Accelerator, cuda: FakeCuda) -> None:
    pinned = accelerator.pin(4096, 100)
    with pytest.raises(DeviceError):
        accelerator.pin(4096, 100)
    pinned.close()
    pinned.close()
    assert cuda.names() == ["register", "unregister"]


def test_a_pool_is_opened_on_the_device_that_writes_with_peer_access(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, writer = Accelerator(cuda, 1), Accelerator(cuda, 0)
    pool = DevicePool(owner, 64)
    monkeypatch.setattr(device_pool, "_ours", {})  # seen from another process
    opened = RemotePool(writer, pool.description, 64)
    assert cuda.names() == ["enable_peer", "open"]
    assert cuda.log[0] == ("enable_peer", "0", "1")
    assert opened.address == pool.at(0, 1).address
    opened.close()
    opened.close()
    pool.close()
    pool.close()


def test_a_pool_of_the_same_process_is_not_opened_and_lives_as_long_as_somebody_writes_to_it(cuda: FakeCuda) -> None:
    """CUDA refuses to open it: a peer that is both would send its own rows by way of the host."""
    owner, writer = Accelerator(cuda, 1), Accelerator(cuda, 0)
    pool = DevicePool(owner, 64)
    own, again = (RemotePool(writer, pool.description, 64) for _ in range(2))
    assert cuda.names() == ["enable_peer", "enable_peer"]
    assert own.address == again.address == pool.at(0, 1).address
    own.close()
    own.close()
    pool.close()
    pool.close()
    assert cuda.allocated, "the other one writes to it still"
    with pytest.raises(DeviceError):
        cuda.can_open = False
        RemotePool(writer, pool.description, 64)
    again.close()
    assert not cuda.allocated and not cuda.wrong


def test_words_that_are_no_pool_are_refused(accelerator: Accelerator) -> None:
    pool = DevicePool(accelerator, 64)
    for words, size in ((pool.description, 65), (b"", 64), (pool.description[:-1], 64), (b"\x93\xc4\x01a\x40\xa0", 64)):
        with pytest.raises(DeviceError):
            RemotePool(accelerator, words, size)
    pool.close()


def test_only_a_gpu_is_an_accelerator() -> None:
    assert open_accelerator("cpu") is None
    with pytest.raises(DeviceError):
        open_accelerator("cuda:x")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error_that_says_so() -> None:
    with pytest.raises(DeviceError, match="CUDA"):
        open_accelerator("cuda")
