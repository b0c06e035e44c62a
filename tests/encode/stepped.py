"""A pipeline with a tower that stands still when told to, and what it told."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch

from aiodisagg.encode.pipeline import EncodePipeline, PipelineEvent
from aiodisagg.errors import MediaError
from aiodisagg.models.base import ItemKind, Patches
from aiodisagg.protocol.events import EncodeStopped, RowsReady, StageEntered, StartEncode
from aiodisagg.protocol.messages import ARRIVAL, Urgency
from aiodisagg.protocol.rows import ModelFingerprint, RowLayout

PATIENCE_S = 60.0


class Stepped:
    """A VisionEncoder that waits for a permit before each tower call; row ``i`` of item ``n`` is ``[n, i]``.

    ``calls``: the (item, patches) of each tower call as it begins. ``slow``: items whose preparing waits for an event.
    """

    def __init__(self, permits: int = 0) -> None:
        self.fingerprint = ModelFingerprint("Stepped", 2, 0, "float32", "stepped")
        self.layout = RowLayout.of(self.fingerprint)
        self.calls: queue.Queue[list[tuple[int, int]]] = queue.Queue()
        self.permits = threading.Semaphore(permits)
        self.slow: dict[int, threading.Event] = {}
        self.bad: set[int] = set()
        self.threads: set[str] = set()

    def prepare(self, kind: ItemKind, media: Sequence[bytes], grid_thw: tuple[int, int, int], fps: float) -> Patches:
        number, patches = int(media[0]), grid_thw[0] * grid_thw[1] * grid_thw[2]
        if number in self.slow and not self.slow[number].wait(PATIENCE_S):
            raise TimeoutError
        if number < 0:
            raise MediaError("image", "negative")
        return Patches(torch.stack([torch.full((patches,), number), torch.arange(patches)], 1), grid_thw)

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        self.threads.add(threading.current_thread().name)
        numbers = [int(patches.pixel_values[0, 0]) for patches in batch]
        self.calls.put([(number, patches.count) for number, patches in zip(numbers, batch, strict=True)])
        if not self.permits.acquire(timeout=PATIENCE_S):
            raise TimeoutError
        if self.bad & set(numbers):
            raise ValueError(f"cannot encode {self.bad & set(numbers)}")
        both = torch.cat([patches.pixel_values[::4] for patches in batch]).float()
        both[:, 1] /= 4
        return list(torch.split(both, [patches.count // 4 for patches in batch]))


class Bench:
    """A pipeline and what it told."""

    def __init__(self, encoder: Stepped, **settings: Any) -> None:
        self.encoder, self.told = encoder, []  # type: ignore[var-annotated]
        self._news = asyncio.Event()
        settings = {"batch_patches": 64, "prepare_threads": 2, **settings}
        self.pipeline = EncodePipeline(encoder, self._tell, **settings)

    def _tell(self, event: PipelineEvent) -> None:
        self.told.append(event)
        self._news.set()

    def start(
        self, number: int, t: int = 1, h: int = 4, w: int = 4, urgency: Urgency = ARRIVAL, alone: bool = False
    ) -> str:
        media, rows = (str(number).encode(),), t * h * w // 4
        kind = "image" if t == 1 else "video"
        self.pipeline.start(StartEncode(str(number), kind, (t, h, w), rows, 0.0, media, urgency, alone))
        return str(number)

    async def in_order(self, number: int, **size: int) -> str:
        """Starts an item and lets it reach the tower before a later one can."""
        digest = self.start(number, **size)
        await self.prepared(digest)
        return digest

    async def until(self, event: object, times: int = 1) -> None:
        """Returns when so many equal events were told, times of stages aside."""
        await self._told(lambda: [plain(told) for told in self.told].count(event) >= times)

    async def prepared(self, *digests: str) -> None:
        """Returns when the tower has them; it is not told that they were prepared if they are in it by then."""
        ready = {(stage, digest) for digest in digests for stage in ("prepared", "encoding")}
        await self._told(lambda: {digest for _, digest in ready & {plain(told) for told in self.told}} == set(digests))

    async def _told(self, enough: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not enough():
                self._news.clear()
                await self._news.wait()

    async def call(self) -> list[tuple[int, int]]:
        """Waits for the tower's next call."""
        return await asyncio.to_thread(self.encoder.calls.get, timeout=PATIENCE_S)

    def read(self, digest: str, start: int, stop: int) -> list[list[float]]:
        data = self.pipeline.rows(digest, start, stop)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, 2).tolist()  # type: ignore[arg-type]

    def ends(self) -> dict[str, str]:
        return {event.digest: event.code for event in self.told if isinstance(event, EncodeStopped)}


def plain(event: PipelineEvent) -> Hashable:
    if isinstance(event, RowsReady):
        return RowsReady(event.digest, event.stop)
    return (event.stage, event.digest) if isinstance(event, StageEntered) else event


@asynccontextmanager
async def bench(encoder: Stepped, **settings: Any) -> AsyncIterator[Bench]:
    made = Bench(encoder, **settings)
    async with made.pipeline:
        try:
            yield made
        finally:
            for event in encoder.slow.values():
                event.set()
            encoder.permits.release(1000)
    assert encoder.threads <= {"aiodisagg-tower"}
