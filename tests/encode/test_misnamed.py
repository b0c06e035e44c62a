"""Rows are kept by digest for everybody: what a language peer sends under a digest has to be what it names."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from aiodisagg.bench.synthetic import SyntheticEncoder, item_of
from aiodisagg.encode.prepare import Misnamed, check_name
from aiodisagg.encode.service import EncodeService
from aiodisagg.language.rows import RowReceiver
from aiodisagg.models.base import ItemKind, Patches, item_digest
from aiodisagg.peer.config import EncodeConfig, LanguageConfig
from aiodisagg.protocol.events import Fail, ItemSpec, StartEncode
from aiodisagg.protocol.messages import ItemKey
from tests.faults.pair import MODEL, PATIENCE_S, ROW_BYTES, rows_of

pytestmark = pytest.mark.anyio
ROWS, OURS, THEIRS = 4, 1, 2


def named(seed: int, media: bytes | None = None) -> ItemSpec:
    """An item by the name that a plan gives it; ``media``: other files than that says."""
    spec = item_of(seed, ROWS)
    digest = item_digest(ItemKind(spec.kind), spec.grid_thw, spec.fps, spec.media)
    return dataclasses.replace(spec, digest=digest, media=spec.media if media is None else (media,))


class Gated(SyntheticEncoder):
    """Prepares once its gate is open."""

    def __init__(self) -> None:
        super().__init__(MODEL)
        self.gate = threading.Event()

    def prepare(self, kind: ItemKind, media: Sequence[bytes], grid_thw: tuple[int, int, int], fps: float) -> Patches:
        assert self.gate.wait(PATIENCE_S)
        return super().prepare(kind, media, grid_thw, fps)


class Asking:
    """A language peer that asks for one item at a time."""

    def __init__(self, receiver: RowReceiver, found: bytearray, ends: asyncio.Queue[Fail | None]) -> None:
        self.receiver, self._found, self._ends, self._room = receiver, found, ends, 0

    def ask(self, spec: ItemSpec) -> None:
        self._room += 1
        self.receiver.request([(ItemKey(self._room, 0), spec)], PATIENCE_S)

    async def end(self) -> bytes | Fail:
        failed = await asyncio.wait_for(self._ends.get(), PATIENCE_S)
        return bytes(self._found) if failed is None else failed


@asynccontextmanager
async def asking(folder: Path, service: EncodeService) -> AsyncIterator[Asking]:
    found, ends = bytearray(ROWS * ROW_BYTES), asyncio.Queue[Fail | None]()

    def deliver(key: ItemKey, start: int, data: memoryview) -> None:
        found[start * ROW_BYTES : start * ROW_BYTES + data.nbytes] = data

    config = LanguageConfig(model=folder, transports=("memory",), cache_bytes=0)
    receiver = RowReceiver(
        config, MODEL, name="language", deliver=deliver, ended=lambda key, failed: ends.put_nowait(failed)
    )  # type: ignore[arg-type]
    async with receiver:
        receiver.peers.add(service.address)
        await receiver.peers.wait_any(PATIENCE_S)
        yield Asking(receiver, found, ends)


async def test_nobody_gets_the_rows_of_other_files_under_the_digest_of_a_picture(
    tmp_path: Path, no_leaks: None
) -> None:
    """Whoever asked for the picture after that was given the rows of the other one, and no word was said of it."""
    encoder = Gated()
    encoder.gate.set()
    async with AsyncExitStack() as stack:
        config = EncodeConfig(model=tmp_path, transports=("memory",), self_test_s=0.0)
        service = await stack.enter_async_context(EncodeService(config, encoder=encoder))
        liar = await stack.enter_async_context(asking(tmp_path, service))
        honest = await stack.enter_async_context(asking(tmp_path, service))
        liar.ask(named(OURS, b"%d" % THEIRS))
        failed = await liar.end()
        assert isinstance(failed, Fail) and failed.code == "misnamed"
        honest.ask(named(OURS))
        assert await honest.end() == rows_of(OURS, ROWS)


async def test_who_shares_what_was_misnamed_sends_its_own_files(tmp_path: Path, no_leaks: None) -> None:
    """The encode of the other's files was under way when it asked, and so its own were not looked at."""
    encoder = Gated()
    async with AsyncExitStack() as stack:
        config = EncodeConfig(model=tmp_path, transports=("memory",), self_test_s=0.0, prepare_threads=1)
        service = await stack.enter_async_context(EncodeService(config, encoder=encoder))
        stack.callback(encoder.gate.set)
        liar = await stack.enter_async_context(asking(tmp_path, service))
        honest = await stack.enter_async_context(asking(tmp_path, service))
        liar.ask(named(THEIRS))  # keeps the only thread
        liar.ask(named(OURS, b"%d" % THEIRS))
        shared, acquire = asyncio.Event(), service.sender.sources.acquire

        def acquired(want: object, user: tuple[str, ItemKey]) -> object:
            source = acquire(want, user)  # type: ignore[arg-type]
            if source is not None and len(source.receivers) == 2:
                shared.set()
            return source

        service.sender.sources.acquire = acquired  # type: ignore[method-assign, assignment]
        honest.ask(named(OURS))
        await asyncio.wait_for(shared.wait(), PATIENCE_S)
        liar.receiver.cancel(ItemKey(2, 0))
        encoder.gate.set()
        assert await honest.end() == rows_of(OURS, ROWS)


@pytest.mark.parametrize("fps", [2, 2.0, 2.5])
def test_a_name_is_as_a_plan_makes_it(fps: float) -> None:
    """An older language peer's caller may have written a whole number."""
    grid, media = (2, 4, 4), (b"first", b"second")
    digest = item_digest(ItemKind.VIDEO, grid, fps, media)
    check_name(StartEncode(digest, "video", grid, 8, float(fps), media))
    for wrong in ((b"first", b"other"), (b"firsts", b"econd")):
        with pytest.raises(Misnamed, match=digest):
            check_name(StartEncode(digest, "video", grid, 8, float(fps), wrong))
    with pytest.raises(Misnamed):
        check_name(StartEncode(digest, "video", grid, 8, 3.0, media))
    check_name(StartEncode("a name of somebody else's", "video", grid, 8, 3.0, media))
