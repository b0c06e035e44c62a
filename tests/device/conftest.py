"""A device that is none, and the check that everything taken of it was given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiodisagg.device.copies import Accelerator
from tests.device.fake_cuda import FakeCuda
from tests.models.conftest import tiny

__all__ = ["tiny"]


@pytest.fixture(scope="session")
def moe(tiny: Callable[..., Path]) -> Path:
    """A tiny MoE with three DeepStack levels."""
    return tiny(moe=True, levels=3)


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    fake = FakeCuda()
    yield fake
    fake.gate.set()
    assert not fake.wrong
    assert not fake.registered, "memory is still registered"
    assert not fake.opened, "device memory of others is still open"
    assert not fake.allocated, "device memory is still allocated"


@pytest.fixture
def accelerator(cuda: FakeCuda) -> Iterator[Accelerator]:
    made = Accelerator(cuda, 0)
    yield made
    made.close()
