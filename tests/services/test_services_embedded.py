"""A service in a program of somebody's own, which asks it before it is open, when it is closed, and from elsewhere."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from aiodisagg import BothService, EncodeService, LanguageService, SamplingParams
from aiodisagg.errors import CheckpointError, EngineError
from aiodisagg.language import service as language_service
from tests.models.halves import chat
from tests.services.system import PATIENCE_S, encode_config, language_config

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

Service = EncodeService | LanguageService | BothService
KINDS = {
    "encode": lambda folder: EncodeService(encode_config(folder)),
    "language": lambda folder: LanguageService(language_config(folder)),
    "both": lambda folder: BothService(language_config(folder), encode_config(folder)),
}


async def ask(peer: LanguageService | BothService) -> int:
    sampling, count = SamplingParams(max_tokens=3, ignore_eos=True), 0
    async for delta in peer.generate(chat("Hello"), sampling):
        count += len(delta.token_ids)
    return count


@pytest.mark.parametrize("kind", KINDS)
async def test_probes_and_scrapes_are_answered_before_and_after(kind: str, moe: Path) -> None:
    """They raised AttributeError while a model was loaded, and an encode peer that was closed said it was ready."""
    service: Service = KINDS[kind](moe)

    async def refused(why: str) -> None:
        assert service.ready() == (False, "not open") and service.broken == ""
        if not isinstance(service, EncodeService):
            with pytest.raises(EngineError, match=f"the service is {why}"):
                await ask(service)

    assert service.metrics() == ""
    await refused("not open")
    async with service:
        assert service.metrics() and (service.ready()[0] or not isinstance(service, EncodeService))
    await refused("closed")
    assert service.metrics()


async def test_they_are_when_nothing_could_be_loaded(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: object) -> None:
        raise CheckpointError("model", "weights", "broken")

    monkeypatch.setattr(language_service, "load_language_half", load)
    service = KINDS["both"](moe)
    with pytest.raises(CheckpointError):
        await service.__aenter__()
    assert service.ready() == (False, "not open") and service.metrics() == "" and service.broken == ""


@pytest.mark.parametrize("kind", ["language", "both"])
async def test_who_asks_on_another_loop_is_told_so(kind: str, moe: Path) -> None:
    """It waited for ever for an answer that came to the loop where the service had been entered, as tests whose
    fixture outlives their loops."""
    async with KINDS[kind](moe) as peer:
        assert await ask(peer) == 3
        found: list[BaseException] = []

        def elsewhere() -> None:
            try:
                asyncio.run(asyncio.wait_for(ask(peer), 5.0))
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join, PATIENCE_S)
        assert [str(error) for error in found] == [
            f"{type(peer).__name__} belongs to another event loop: use it where it was entered"
        ]
        assert await ask(peer) == 3
