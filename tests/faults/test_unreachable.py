"""Two peers without a data plane that works between them: told once, with the cause, and over in seconds."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from aiodisagg.bench.synthetic import SyntheticEncoder, item_of
from aiodisagg.encode.service import EncodeService
from aiodisagg.encode.session import Session, WriterEvent
from aiodisagg.errors import TransportUnavailable
from aiodisagg.language import rows
from aiodisagg.language.rows import RowReceiver
from aiodisagg.link import Hello, PeerRole
from aiodisagg.peer.config import EncodeConfig, LanguageConfig
from aiodisagg.peer.planes import Plane
from aiodisagg.protocol.events import Fail, Write, WriteFailed, WritesFenced
from aiodisagg.protocol.messages import ItemKey
from aiodisagg.protocol.receiving import ReceiverConfig

from .pair import MODEL, PATIENCE_S

pytestmark = pytest.mark.anyio


async def test_no_common_data_plane(
    tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """13,489 warnings in 20 s, and after five minutes "deadline: not complete"."""
    monkeypatch.setattr(rows, "ReceiverConfig", partial(ReceiverConfig, pause_s=0.001, max_pause_s=0.001))
    ends: dict[ItemKey, Fail | None] = {}
    over = asyncio.Event()

    def ended(key: ItemKey, failed: Fail | None) -> None:
        ends[key] = failed
        if len(ends) == 3:
            over.set()

    language = LanguageConfig(model=tmp_path, transports=("stream",), cache_bytes=0)
    encode = EncodeConfig(model=tmp_path, transports=("zmq",), self_test_s=0.0, name="towers")
    receiver = RowReceiver(language, MODEL, name="words", deliver=lambda *_: None, ended=ended)
    async with EncodeService(encode, encoder=SyntheticEncoder(MODEL)) as service, receiver:
        # An older release does not say by what it sends: what does not work is seen when it is tried.
        service._hello = msgspec.structs.replace(service._hello, sends_by=None)
        receiver.peers.add(service.address)
        await receiver.peers.wait_any(PATIENCE_S)
        receiver.request([(ItemKey(1, i), item_of(i, 64)) for i in range(3)], PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S / 2):
            await over.wait()
            while receiver._revoking:  # nothing is copied here any more: that is asked once more after the last word
                await asyncio.wait(receiver._revoking)
        assert receiver.pool.free == receiver.pool.blocks and not receiver.placing.errands
    why = "zmq: not offered, only stream"
    for failed in ends.values():
        assert failed is not None and failed.code == "unreachable" and why in failed.message
        assert any(why in line for line in failed.story)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    (warning,) = [record for record in warnings if record.name == "aiodisagg.encode.session"]
    assert {record.name for record in warnings} == {
        warning.name,
        "aiodisagg.language.placing",
        "aiodisagg.language.complaints",
    }
    assert why in warning.getMessage() and "to words" in warning.getMessage()


class Vanishing:
    """Planes whose packets vanish: an attempt ends long after the receiver has lost patience with its item."""

    def __init__(self) -> None:
        self.begun, self.over, self.attempts = asyncio.Event(), asyncio.Event(), 0

    async def connect(self, *peers: object, far_host: str) -> tuple[str, Plane]:
        self.attempts += 1
        self.begun.set()
        await self.over.wait()
        raise TransportUnavailable("any", "stream: no answer in 5 s", peer="words")


async def test_an_attempt_to_connect_outlives_the_write_that_began_it(no_leaks: None) -> None:
    """It ended with each epoch, and whoever had asked never learned why no row came."""
    planes, told = Vanishing(), asyncio.Queue[WriterEvent]()
    hello = Hello(name="words", incarnation="L", role=PeerRole.LANGUAGE)
    link: Any = SimpleNamespace(local=hello, remote=hello, far_host="")
    session = Session(link, planes, told.put_nowait, checksum=False)  # type: ignore[arg-type]
    first, second = (Write("L", ItemKey(1, 0), epoch, "d", epoch, 0, 0, 1) for epoch in (1, 2))
    async with asyncio.timeout(PATIENCE_S):
        session.write(first, memoryview(b"row"))
        await planes.begun.wait()
        session.fence(first.key)
        assert await told.get() == WriteFailed("L", first.key, 1, "stopped")
        assert await told.get() == WritesFenced("L", first.key)
        session.write(second, memoryview(b"row"))
        planes.over.set()
        failed = await told.get()
    assert isinstance(failed, WriteFailed) and failed.epoch == 2 and "no answer in 5 s" in failed.reason
    assert planes.attempts == 1
    planes.over.clear()
    session.write(second, memoryview(b"row"))
    await session.aclose()
    assert await told.get() == WriteFailed("L", second.key, 2, "stopped")
