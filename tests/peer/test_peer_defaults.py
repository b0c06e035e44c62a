"""What nobody should have to set: defaults that depend on the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiodisagg.errors import ConfigError
from aiodisagg.peer.config import LanguageConfig


def test_an_accelerator_computes_more_in_a_step_and_owes_its_streams_less_time(tmp_path: Path) -> None:
    gpu, cpu = LanguageConfig(model=tmp_path, device="cuda:1"), LanguageConfig(model=tmp_path)
    assert (gpu.step_tokens, gpu.pace_ms) == (8192, 50)
    assert (cpu.step_tokens, cpu.pace_ms) == (2048, 100)
    chosen = LanguageConfig(model=tmp_path, device="cuda:1", token_budget=3000, itl_budget_ms=0)
    assert (chosen.step_tokens, chosen.pace_ms) == (3000, 0)
    with pytest.raises(ConfigError, match="token_budget"):
        LanguageConfig(model=tmp_path, token_budget=0)
