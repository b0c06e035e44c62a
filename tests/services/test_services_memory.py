"""What a service held goes back when it is left: the next one in the process needs the memory, and nobody collects
garbage for it. A GPU had 55 GiB of KV pages, weights and graphs taken until somebody did."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aiodisagg import BothService, ImagePart, SamplingParams
from aiodisagg.encode import service as encode_service
from aiodisagg.encode.service import load_encoder
from aiodisagg.models.base import VisionEncoder
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from aiodisagg.peer.config import EncodeConfig
from tests.models.halves import chat, png
from tests.services.system import encode_config, language_config

pytestmark = pytest.mark.anyio


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


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
