"""An image that several requests want is encoded once and sent once, and afterwards it is here."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from aiodisagg.errors import ConfigError, DeadlineExceeded, MediaError
from aiodisagg.models.base import ChatMessage, ImagePart, ItemKind, Patches
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from aiodisagg.protocol.rows import RowLayout
from tests.models.halves import chat, halves, png, truth
from tests.services.system import Held, System, eventually, finished, language_config, system

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(scope="module")
def vision(moe: Path) -> Qwen3VLVisionEncoder:
    return Qwen3VLVisionEncoder(moe, dtype="float32")


def question(seed: int = 0, text: str = "What do you see?") -> list[ChatMessage]:
    return chat(ImagePart(png(128, 96, 170 + seed)), text)


def shared(made: System) -> int:
    return made.language.rows.sharing.flights.shared


def received(made: System) -> int:
    return made.language.receiver.counters.total("received")


async def test_an_image_that_many_want_is_encoded_and_sent_once_and_then_kept(
    moe: Path, vision: Qwen3VLVisionEncoder
) -> None:
    held = Held(vision)
    messages = [question(text=text) for text in ("What?", "What do you see?", "Where is it?")]
    async with system(moe, encoders=2, encoder=held) as made:
        asked = [asyncio.ensure_future(made.ask(one, 6)) for one in messages]
        await eventually(lambda: held.entered["encode"] == 1 and shared(made) == 2)
        held.gate.set()
        assert [await task for task in asked] == [truth(moe, one) for one in messages]
        size = made.language._planner.plan(messages[0]).items[0].rows * RowLayout.of(vision.fingerprint).row_bytes
        assert received(made) == size and held.entered == {"prepare": 1, "encode": 1}
        await made.quiet()

        for one in messages:
            assert await made.ask(one, 6) == truth(moe, one)
        assert received(made) == size and held.entered == {"prepare": 1, "encode": 1}
        assert sum(encoder.sender.sources.started for encoder in made.encoders) == 1
        text = made.language.metrics()
        assert "aiodisagg_row_cache_hits_total 3.0" in text
        assert f"aiodisagg_row_cache_saved_bytes_total {3.0 * size}" in text
        assert "aiodisagg_fetches_shared_total 2.0" in text
        items = [item for trace in made.language.traces.recent() for item in trace.items]
        assert sorted(item.stage for item in items) == ["cached"] * 3 + ["complete"] * 3
        assert all(item.rows_arrived == item.rows and item.complete_s >= 0 for item in items)
        assert sum(item.bytes_arrived for item in items) == size


async def test_what_is_kept_needs_no_encode_peer(moe: Path) -> None:
    async with system(moe, peer_wait_s=0.05, failover_s=0.0) as made:
        assert await made.ask(question(), 6) == truth(moe, question())
        async with asyncio.timeout(30):
            await made.encoders.pop().__aexit__(None, None, None)
            await made.linked(0)
            assert await made.ask(question(), 6) == truth(moe, question())


async def test_the_cache_is_bounded_and_the_oldest_goes(moe: Path) -> None:
    rows = halves(moe).planner.plan(question()).items[0].rows
    size = rows * RowLayout.of(halves(moe).encoder.fingerprint).row_bytes
    async with system(moe, cache_bytes=2 * size) as made:
        for seed in (0, 1, 0, 2, 0, 1):  # 2 drops 1, and the last 1 drops 2
            assert await made.ask(question(seed), 6) == truth(moe, question(seed))
        cache = made.language.rows.sharing.cache
        assert (cache.hits, cache.misses, cache.used_bytes) == (2, 4, 2 * size)
    async with system(moe, cache_bytes=0) as made:
        for _ in range(2):
            assert await made.ask(question(), 6) == truth(moe, question())
        assert received(made) == 2 * size and shared(made) == 0


@pytest.mark.parametrize("who", ["first", "second"])
async def test_one_of_two_that_share_leaves_and_the_other_is_served(
    moe: Path, vision: Qwen3VLVisionEncoder, who: str
) -> None:
    held = Held(vision)
    async with system(moe, encoder=held) as made:
        tasks = [asyncio.ensure_future(made.ask(question(), 6))]
        await eventually(lambda: held.entered["encode"] == 1)
        tasks.append(asyncio.ensure_future(made.ask(question(), 6)))
        await eventually(lambda: shared(made) == 1)
        await finished(tasks.pop(0 if who == "first" else 1))
        assert made.encoders[0].sender.items
        held.gate.set()
        assert await tasks[0] == truth(moe, question())
        assert held.entered == {"prepare": 1, "encode": 1}


async def test_when_all_that_share_leave_nothing_is_fetched_any_more(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    held = Held(vision, "prepare")
    async with system(moe, encoder=held, encode={"prepare_threads": 1}) as made:
        first = asyncio.ensure_future(made.ask(question(1), 6))
        await eventually(lambda: held.entered["prepare"] == 1)
        tasks = [asyncio.ensure_future(made.ask(question(2), 6)) for _ in range(2)]
        await eventually(lambda: shared(made) == 1 and len(made.encoders[0].sender.items) == 2)
        await finished(*tasks)
        await eventually(lambda: len(made.encoders[0].sender.items) == 1)
        held.gate.set()
        assert await first == truth(moe, question(1))
        assert held.entered["prepare"] == 1


@pytest.mark.parametrize("short", [0, 1], ids=["the first", "the second"])
async def test_a_deadline_is_that_of_one_of_them(
    moe: Path, vision: Qwen3VLVisionEncoder, short: int, skip: Callable[[float], None]
) -> None:
    """The one out of time gets its error while the encoder hangs; the other one gets its answer later."""
    held = Held(vision)
    limits = [60.0, 60.0]
    limits[short] = 20.0
    async with system(moe, encoder=held) as made:
        tasks = [asyncio.ensure_future(made.ask(question(), 6, timeout_s=limit)) for limit in limits]
        await eventually(lambda: held.entered["encode"] == 1 and shared(made) == 1)
        skip(20.0)
        with pytest.raises(DeadlineExceeded, match=r"(20|19\.\d+) s"):
            await tasks[short]
        assert not held.gate.is_set() and not tasks[1 - short].done()
        held.gate.set()
        assert await tasks[1 - short] == truth(moe, question())
        assert held.entered == {"prepare": 1, "encode": 1}


async def test_who_has_all_the_time_in_the_world_is_served(moe: Path) -> None:
    async with system(moe) as made, asyncio.timeout(30):
        assert await made.ask(question(), 6, timeout_s=math.inf) == truth(moe, question())


@pytest.mark.parametrize(
    ("wrong", "why"), [(math.inf, "at most 1e[+]09, not inf"), (0.0, "above 0, not 0"), (math.nan, "above 0, not nan")]
)
def test_a_service_has_some_limit_of_time(moe: Path, wrong: float, why: str) -> None:
    with pytest.raises(ConfigError, match=f"request_timeout_s.*{why}"):
        language_config(moe, request_timeout_s=wrong)


class Broken(Held):
    """Finds, once the gate is open, that the media are none."""

    def prepare(self, kind: ItemKind, media: Sequence[bytes], grid_thw: tuple[int, int, int], fps: float) -> Patches:
        super().prepare(kind, media, grid_thw, fps)
        raise MediaError("media", "it is torn")


async def test_a_failure_is_told_to_all_that_share(moe: Path, vision: Qwen3VLVisionEncoder) -> None:
    broken = Broken(vision, "prepare")
    async with system(moe, encoder=broken) as made:
        tasks = [asyncio.ensure_future(made.ask(question(), 6)) for _ in range(3)]
        await eventually(lambda: broken.entered["prepare"] == 1 and shared(made) == 2)
        broken.gate.set()
        for task in tasks:
            with pytest.raises(MediaError, match="it is torn"):
                await task
        assert broken.entered["prepare"] == 1
        assert not made.language.rows.sharing.has(made.language._planner.plan(question()).items[0].digest)


async def test_joining_at_every_moment(moe: Path) -> None:
    """The second comes a little later each time: at planning, asking, encoding, in the middle of the transfer."""
    async with system(moe, transports=("ipc",), block_rows=2, blocks=3) as made:
        for round_ in range(10):
            messages = question(round_)
            first = asyncio.ensure_future(made.ask(messages, 6))
            for _ in range(round_**2):
                await asyncio.sleep(0)
            assert [await made.ask(messages, 6), await first] == [truth(moe, messages)] * 2
        assert shared(made) + made.language.rows.sharing.cache.hits == 10
        assert made.encoders[0].sender.sources.started == 10
