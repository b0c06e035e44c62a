"""How often a peer's process looks for garbage in cycles, which stops all of its threads."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 10_000
"""Between two collections; Python's own 700 are a few requests' worth of messages and events, nearly all in use."""


def settle() -> None:
    """What exists now stays for good: a collection that walks through all of torch takes 0.1 s. Called once, when a
    process is ready."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)
