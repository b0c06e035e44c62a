"""A GPU's memory has room for what a language peer may ask of it: KV pages, rows of their tokens, the receive pool."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_engine import HIDDEN, ask, make_engine, make_plan, tiny_model

from aiodisagg.engine import device_runner
from aiodisagg.engine.device_runner import DeviceRunner
from aiodisagg.engine.kernels import Kernels
from aiodisagg.errors import ConfigError
from aiodisagg.language import service
from aiodisagg.language.memory import kv_bytes, receive_pool
from aiodisagg.language.service import LanguageService
from aiodisagg.models.language import LanguageHalf, PlainTextModel
from aiodisagg.models.synthetic import build_tiny
from aiodisagg.peer.config import LanguageConfig
from aiodisagg.protocol.rows import RowLayout

GIB = 1 << 30
LEVELS = 3


def half_of(kind: str, device: str = "cuda:0") -> LanguageHalf:
    causal, levels = tiny_model(kind), 0 if kind == "text" else LEVELS
    model = PlainTextModel(causal.model) if kind == "text" else causal.model
    layout = RowLayout(HIDDEN, levels, "bfloat16")
    return LanguageHalf(
        model, causal.lm_head, causal, causal.config, layout, torch.device(device), torch.float32, frozenset(), 4096
    )


def config_of(**settings: Any) -> LanguageConfig:
    return LanguageConfig(model=Path(__file__).parent, device="cuda", **settings)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 GiB are left when a tenth of all and two for a step are kept free."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 80 * GIB))


def token_bytes(kind: str) -> int:
    """In the engine's pool."""
    engine = make_engine(tiny_model(kind), num_pages=1, page_size=1)
    pool = engine._runner.pool
    engine._runner.release()
    return pool.keys.nbytes + pool.values.nbytes


@pytest.mark.parametrize("settings", [{}, {"pool_bytes": 3 * GIB, "block_rows": 4096}])
@pytest.mark.parametrize("kind", ["moe", "dense", "text"])
def test_pages_with_rows_for_all_of_their_tokens_fit_beside_the_twin(
    gpu: None, kind: str, settings: dict[str, Any]
) -> None:
    config, half, token = config_of(**settings), half_of(kind), token_bytes(kind)
    found = kv_bytes(config, half)
    assert found is not None
    twin = receive_pool(config, half.layout.row_bytes).size_bytes
    assert 0.99 < twin / settings.get("pool_bytes", GIB) <= 1
    row = 0 if kind == "text" else (1 + LEVELS) * HIDDEN * 4
    taken = found + found // token * row + twin
    assert taken <= 10 * GIB < taken + 2 * (token + row), "and nothing of it is left unused"


def test_what_is_configured_stays(gpu: None) -> None:
    assert kv_bytes(config_of(kv_bytes=40 * GIB), half_of("moe")) == 40 * GIB
    assert kv_bytes(config_of(), half_of("moe", "cpu")) is None, "the engine says how much, and counts no device"


def test_without_room_it_is_said_what_to_change(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"kv_bytes: .* 11264 MiB on cuda:0: a smaller pool_bytes"):
        kv_bytes(config_of(pool_bytes=11 * GIB), half_of("moe"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * GIB, 80 * GIB))
    with pytest.raises(ConfigError, match=r"kv_bytes: .*9216 of 81920 MiB are free"):
        kv_bytes(config_of(), half_of("moe"))


@pytest.mark.anyio
async def test_a_peer_gives_its_engine_what_was_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(service, "kv_bytes", lambda config, half: 1 << 20)
    async with LanguageService(LanguageConfig(model=build_tiny(tmp_path), pool_bytes=1 << 20)) as peer:
        pool = peer.engine._runner.pool
        assert pool.keys.nbytes + pool.values.nbytes == 1 << 20


@pytest.mark.anyio
async def test_an_engine_is_made_ready_off_the_loop_and_gives_back_what_weights_took_before_they_were_joined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Links were not read meanwhile; and the torch allocator kept what others of the process should have."""
    model, cpu = copy.deepcopy(tiny_model("dense")), torch.device("cpu")
    query = model.model.layers[0].self_attn.q_proj
    said: list[tuple[str, bool, bool]] = []

    def say(what: str) -> None:
        joined = query.weight.untyped_storage().nbytes() > query.weight.nbytes
        said.append((what, joined, threading.current_thread() is threading.main_thread()))

    class OnDevice(DeviceRunner):
        def __init__(self, *arguments: Any, **sizes: Any) -> None:
            engine._runner.device = cpu  # a GPU's as far as is needed here
            say("chosen")
            super().__init__(*arguments, **sizes, kernels=Kernels())

        def warm_up(self) -> None:
            say("captured")

    monkeypatch.setattr(device_runner, "DeviceRunner", OnDevice)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: say("given back"))
    engine = make_engine(model)
    monkeypatch.setattr(engine._runner, "device", SimpleNamespace(type="cuda"))
    async with engine:
        assert said == [("chosen", False, False), ("given back", True, False), ("captured", True, False)]
        answer = await ask(engine, make_plan([5]), max_tokens=2)
    assert len(answer.tokens) == 2
