"""Makes ``no_leaks`` cheap here: it collects garbage around each test, and the ``openai`` client is a large heap."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _small_heap() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
