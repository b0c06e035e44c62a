"""A word on a device by which a tower waits for steps with prompts; the kernel is run by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from aiodisagg.device import alone as alone_module
from aiodisagg.device import triton_alone
from aiodisagg.device.alone import Alone, alone_on


def test_nobody_waits_where_nobody_is_alone() -> None:
    alone = Alone(torch.zeros(2, dtype=torch.int32), most=5)
    alone.wait()
    with alone.taken():
        pass
    alone.wait()
    assert alone.gave_up == 0


def test_who_waits_for_somebody_without_end_goes_on_and_is_counted() -> None:
    alone = Alone(torch.zeros(2, dtype=torch.int32), most=5)
    with alone.taken():
        alone.wait()
        assert alone.gave_up == 1
        alone.wait()
    assert alone.gave_up == 2
    alone.wait()
    assert alone.gave_up == 2


def test_a_step_that_fails_leaves_the_device_to_others() -> None:
    alone = Alone(torch.zeros(2, dtype=torch.int32), most=5)
    with pytest.raises(RuntimeError, match="no memory"), alone.taken():
        raise RuntimeError("no memory")
    alone.wait()
    assert alone.gave_up == 0


def test_a_wait_ends_with_the_last_read_it_may_make() -> None:
    """Cleared in the very last moment or not at all: one read decides."""
    word = torch.tensor([1, 0], dtype=torch.int32)
    triton_alone.wait(word, 1)
    assert word.tolist() == [1, 1]


def test_on_a_cpu_nobody_is_alone() -> None:
    assert alone_on(torch.device("cpu")) is None


def test_a_device_has_one_word_whatever_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(alone_module, "_word_of", lambda index: index)
    assert [alone_on(torch.device(name)) for name in ("cuda", "cuda:1", "cuda:0")] == [1, 1, 0]
