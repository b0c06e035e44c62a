"""FlashAttention is quiet about what nobody here can change, and about nothing else."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType

import pytest

from aiodisagg.device.flash import flash_attention


def test_one_warning_of_the_library_is_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    library, module = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert flash_attention() is module
        warnings.warn("Argument aux_data (None) cannot be converted to a JitArgument", UserWarning, stacklevel=1)
        warnings.warn("Argument softmax_scale cannot be converted to a JitArgument", UserWarning, stacklevel=1)
    assert [str(one.message)[:16] for one in seen] == ["Argument softmax"]
