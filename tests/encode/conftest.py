"""Every test here must leave nothing of this process behind; the heap is made small for looking."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch  # noqa: F401  # the largest part of the heap


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
