"""A whole system in one process, over real links and transports; and the check that nothing of a request remains."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aiodisagg import ChatMessage, Delta, EncodeConfig, EncodeService, LanguageConfig, LanguageService, SamplingParams
from aiodisagg.models.base import ItemKind, Patches, VisionEncoder
from aiodisagg.models.vision import Qwen3VLVisionEncoder

MiB = 1 << 20
PATIENCE_S = 60.0


async def eventually(condition: Callable[[], object], what: str = "") -> None:
    """Returns when the condition holds: for facts of other threads and processes that nobody announces."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"never came true: {what or condition}") from None


@dataclass
class System:
    language: LanguageService
    encoders: list[EncodeService] = field(default_factory=list)

    async def ask(self, messages: Sequence[ChatMessage], tokens: int = 8, **settings: Any) -> tuple[int, ...]:
        """Greedy tokens; the end of sequence ends nothing, so that answers are as long as they are compared."""
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        found: list[int] = []
        async with aclosing(self.language.generate(messages, sampling, **settings)) as deltas:
            async for delta in deltas:
                found += delta.token_ids
        return tuple(found)

    async def linked(self, count: int) -> None:
        await eventually(lambda: len(self.language.peers.linked) == count, f"{count} encode peers linked")

    def remains(self) -> dict[str, object]:
        """What is still there of requests; empty when all of it is gone."""
        language, stats = self.language, self.language.engine.stats()
        found: dict[str, object] = {
            "open items": list(language.receiver.items.values()),
            "lent blocks": language.pool.blocks - language.pool.free,
            "running": stats.running,
            "waiting": stats.waiting,
            "pages": stats.pages_used,
            "rows": stats.rows_bytes,
            "traces": list(language.traces.open),
            "peers' items": sum(len(peer.book.open) for peer in language.peers.linked),
            "fetches": len(language.rows.sharing.flights),
        }
        for encoder in self.encoders:
            found[f"items of {encoder.name}"] = list(encoder.sender.items.values())
            found[f"jobs of {encoder.name}"] = encoder.pipeline.waiting
        return {what: value for what, value in found.items() if value}

    async def quiet(self) -> None:
        try:
            await eventually(lambda: not self.remains())
        except AssertionError:
            raise AssertionError(f"left behind: {self.remains()}") from None


def encode_config(folder: Path, **settings: Any) -> EncodeConfig:
    return EncodeConfig(
        **{"model": folder, "row_dtype": "float32", "transports": ("memory",), "self_test_s": 0.0, **settings}
    )


def language_config(folder: Path, **settings: Any) -> LanguageConfig:
    """``blocks``: of the pool."""
    settings = {"row_dtype": "float32", "dtype": "float32", "transports": ("memory",), "block_rows": 8, **settings}
    settings = {"kv_bytes": 8 * MiB, "token_budget": 64, "peer_wait_s": PATIENCE_S, **settings}
    if (blocks := settings.pop("blocks", None)) is not None:
        settings["pool_bytes"] = 1 + blocks * settings["block_rows"] * row_bytes(folder, settings["row_dtype"])
    return LanguageConfig(model=folder, **{"pool_bytes": MiB, **settings})


def row_bytes(folder: Path, dtype: str) -> int:
    from aiodisagg.models.loading import fingerprint
    from aiodisagg.protocol.rows import RowLayout

    return RowLayout.of(fingerprint(folder, dtype)).row_bytes


@asynccontextmanager
async def system(
    folder: Path, *, encoders: int = 1, encoder: VisionEncoder | None = None,
    transports: tuple[str, ...] = ("memory",), row_dtype: str = "float32",
    encode: dict[str, Any] | None = None, **language: Any,
) -> AsyncIterator[System]:  # fmt: skip
    """A language peer linked to encode peers. When the block ends without an error, nothing of a request may remain."""
    common = {"transports": transports, "row_dtype": row_dtype}
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(LanguageService(language_config(folder, **common, **language)))
        made = System(service)
        for i in range(encoders):
            config = encode_config(folder, name=f"encode-{i + 1}", **common, **(encode or {}))
            peer = await stack.enter_async_context(EncodeService(config, encoder=encoder))
            made.encoders.append(peer)
            service.add_peer(peer.address)
        await made.linked(encoders)
        yield made
        await made.quiet()


class Held:
    """A VisionEncoder that waits, on its threads, until it may go on.

    ``entered``: calls that have begun, by stage. ``open``: nobody waits any more.
    """

    def __init__(self, encoder: Qwen3VLVisionEncoder, stage: str = "encode") -> None:
        self._encoder, self._stage = encoder, stage
        self.fingerprint, self.layout = encoder.fingerprint, encoder.layout
        self.gate = threading.Event()
        self.entered = {"prepare": 0, "encode": 0}

    def _pass(self, stage: str) -> None:
        self.entered[stage] += 1
        if stage == self._stage and not self.gate.wait(PATIENCE_S):
            raise TimeoutError("nobody opened the gate")

    def prepare(self, kind: ItemKind, media: Sequence[bytes], grid_thw: tuple[int, int, int], fps: float) -> Patches:
        self._pass("prepare")
        return self._encoder.prepare(kind, media, grid_thw, fps)

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        self._pass("encode")
        return self._encoder.encode(batch)


async def read(deltas: AsyncIterator[Delta]) -> str:
    return "".join([delta.text async for delta in deltas])


async def finished(*tasks: asyncio.Task[Any]) -> None:
    """Cancels what still runs and waits for all of it."""
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
