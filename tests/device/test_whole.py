"""Both services on a device that is none: the same answers by every way, and nothing of the device left."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from aiodisagg.device.copies import Accelerator
from aiodisagg.errors import DeviceError
from tests.device.fake_cuda import FakeCuda
from tests.models.halves import PROMPTS
from tests.services.system import system
from tests.services.test_services_exact import TOKENS, truths

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


def _refused(*_: object) -> None:
    raise DeviceError("invalid device ordinal")


WAYS = {"device": ("ipc", True), "pinned": ("ipc", False), "staged": ("zmq", True)}


@pytest.mark.parametrize("way", WAYS)
async def test_answers_are_the_same_by_every_way(
    moe: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    transport, cuda.can_open = WAYS[way]
    if way == "pinned":  # as if they were two processes, one of which cannot open the other's pool
        monkeypatch.setattr("aiodisagg.encode.handoff.RemotePool", _refused)
    for service in ("encode", "language"):
        monkeypatch.setattr(f"aiodisagg.{service}.service.open_accelerator", lambda device: Accelerator(cuda, 0))
    names = ["image", *list(PROMPTS)[:2]] if "image" in PROMPTS else list(PROMPTS)[:3]
    async with system(moe, transports=(transport,)) as made:
        answers = await asyncio.gather(*(made.ask(PROMPTS[name], TOKENS) for name in names))
    assert dict(zip(names, answers, strict=True)) == {name: truths(moe)[name] for name in names}
    copies = {entry[1:] for entry in cuda.log if entry[0] == "copy"}
    first = {"device": ("other", "device"), "pinned": ("other", "pinned"), "staged": ("other", "pinned")}[way]
    second = {"device": ("device", "other"), "pinned": ("pinned", "other"), "staged": ("pinned", "other")}[way]
    assert copies == {first, second}
