"""What a service held goes back when it is left: the next one in the process needs the memory, and nobody collects
garbage for it. A GPU had 55 GiB of KV pages, weights and graphs taken until somebody did."""

from __future__ import annotations

import asyncio
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from aiodisagg import BothService, ImagePart, LanguageService, SamplingParams
from aiodisagg.encode import service as encode_service
from aiodisagg.encode.service import load_encoder
from aiodisagg.engine import batch
from aiodisagg.engine.attention import KvPool
from aiodisagg.errors import ConfigError
from aiodisagg.language.loading import load_language_half
from aiodisagg.models.base import VisionEncoder
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from aiodisagg.peer.config import EncodeConfig
from tests.models.halves import chat, png
from tests.services.system import PATIENCE_S, encode_config, language_config

pytestmark = pytest.mark.anyio


async def test_a_service_that_was_left_keeps_neither_pages_nor_weights(
    moe: Path, no_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its program keeps the service."""
    held: dict[str, weakref.ref[torch.Tensor]] = {}

    def load(config: EncodeConfig) -> VisionEncoder:
        loaded = load_encoder(config)
        assert isinstance(loaded, Qwen3VLVisionEncoder)
        held["tower"] = weakref.ref(next(loaded._tower.parameters()))
        return loaded

    monkeypatch.setattr(encode_service, "load_encoder", load)
    messages = chat(ImagePart(png(128, 96)), "What do you see?")
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    async with BothService(language_config(moe), encode_config(moe)) as peer:
        async for delta in peer.generate(messages, sampling):
            assert delta.token_ids
        runner = peer.language.engine._runner
        held |= {"keys": weakref.ref(runner.pool.keys), "values": weakref.ref(runner.pool.values)}
        held["weights"] = weakref.ref(next(runner._model.parameters()))
        del runner
    assert [what for what, tensor in held.items() if tensor() is not None] == []
    assert peer.metrics() and peer.debug()["requests"]()


@pytest.mark.parametrize(("setting", "size"), [("kv_bytes", 1), ("kv_bytes", 1 << 50), ("pool_bytes", 1 << 50)])
async def test_what_does_not_fit_is_told_by_the_name_of_its_setting(
    setting: str, size: int, moe: Path, no_leaks: None
) -> None:
    """It was told as the other one's, as torch's RuntimeError, and as a MemoryError without a word."""
    with pytest.raises(ConfigError, match=r"page|no room for") as caught:
        async with LanguageService(language_config(moe, block_rows=1 << 30, **{setting: size})):
            pass
    assert caught.value.key == setting


@pytest.mark.parametrize("cancelled", [0, 1, 5])
async def test_others_go_on_while_pages_are_made_and_freed(
    cancelled: int, moe: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program's loop stood still for more than a second a GiB, and so did its links and its other services."""
    begun, loop_runs, freed_on = threading.Event(), threading.Event(), list[str]()
    let_go, freed = threading.Event(), asyncio.Event()
    loop, release = asyncio.get_running_loop(), batch.Runner.release

    class Slow(KvPool):
        def __init__(self, **shape: Any) -> None:
            loop.call_soon_threadsafe(loop_runs.set)
            begun.set()
            assert loop_runs.wait(5.0), "the loop stands still"
            assert let_go.wait(PATIENCE_S)
            super().__init__(**shape)

    def released(runner: batch.Runner) -> None:
        freed_on.append(threading.current_thread().name)
        release(runner)
        loop.call_soon_threadsafe(freed.set)

    monkeypatch.setattr(batch, "KvPool", Slow)
    monkeypatch.setattr(batch.Runner, "release", released)
    config = language_config(moe)
    loaded = load_language_half(config)
    before = loaded[1].causal.config._attn_implementation
    service = LanguageService(config, loaded=loaded)
    entering = asyncio.create_task(service.__aenter__())
    if cancelled:
        assert await asyncio.to_thread(begun.wait, PATIENCE_S)
        for _ in range(cancelled):  # anyio's scopes do it at every wait
            entering.cancel()
            await asyncio.sleep(0)
        let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await entering
    else:
        let_go.set()
        await entering
        await service.__aexit__(None, None, None)
        assert threading.main_thread().name not in freed_on
    await asyncio.wait_for(freed.wait(), PATIENCE_S)
    assert loaded[1].causal.config._attn_implementation == before
