"""FlashAttention 4 (of the extra ``gpu``), as everybody here gets it."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def flash_attention() -> Any:  # Any: the library declares no types
    """The module ``flash_attn.cute``. Raises what its import raises: it may be absent, or made for another torch."""
    # Said at its first call, of an argument that we do not give, to people who can do nothing about it.
    said = r"(?s)Argument aux_data.*cannot be converted to a JitArgument"
    warnings.filterwarnings("ignore", said, UserWarning)
    return importlib.import_module("flash_attn.cute")
