"""What a client gets through both services is what transformers' monolith says, over every transport and pool."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aiodisagg.encode.ablation import WithoutDeepStack
from aiodisagg.engine.stream import RequestHandle
from aiodisagg.models.base import ImagePart
from aiodisagg.models.synthetic import build_tiny
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from tests.conftest import LOOPS
from tests.models.halves import PROMPTS, Asked, Halves, chat, encoded, halves, noise, png, video
from tests.models.halves import truth as true_tokens
from tests.services.system import System, system

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
Tiny = Callable[..., Path]
TRANSPORTS = [("memory",), ("ipc",), ("zmq",)]
BY_TRANSPORT = pytest.mark.parametrize("transports", TRANSPORTS, ids=[names[0] for names in TRANSPORTS])
WINDOWS = pytest.mark.parametrize(
    ("transports", "block_rows", "blocks"),
    [(("memory",), 4, 1), (("ipc",), 2, 3), (("ipc",), 4, 1), (("zmq",), 3, 2)],
    ids=["memory 1x4 rows", "ipc 3x2 rows", "ipc 1x4 rows", "zmq 2x3 rows"],
)
TOKENS = 8
truth = functools.partial(true_tokens, tokens=TOKENS)


@functools.cache
def truths(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, tuple[int, ...]]:
    return {name: truth(folder, messages, vision=dtype) for name, messages in PROMPTS.items()}


async def check_all(made: System, folder: Path) -> None:
    """Every prompt alone, then all at once."""
    wanted = truths(folder)
    for name, messages in PROMPTS.items():
        assert await made.ask(messages, TOKENS) == wanted[name], name
    together = await asyncio.gather(*(made.ask(messages, TOKENS) for messages in PROMPTS.values()))
    assert dict(zip(PROMPTS, together, strict=True)) == wanted


@pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)
@BY_TRANSPORT
async def test_answers_are_the_monoliths_over_every_transport(moe: Path, transports: tuple[str, ...]) -> None:
    async with system(moe, transports=transports) as made:
        await check_all(made, moe)
        (session,) = made.encoders[0]._sessions.values()
        assert session.plane_name == transports[0]


@pytest.mark.parametrize(("is_moe", "levels"), [(True, 1), (True, 0), (False, 2)], ids=["moe-1", "moe-0", "dense-2"])
async def test_answers_are_the_monoliths_for_any_number_of_levels(tiny: Tiny, is_moe: bool, levels: int) -> None:
    folder = tiny(moe=is_moe, levels=levels)
    async with system(folder) as made:
        await check_all(made, folder)


@WINDOWS
async def test_items_larger_than_the_pool_pass_through_it(
    moe: Path, transports: tuple[str, ...], block_rows: int, blocks: int
) -> None:
    async with system(moe, transports=transports, encoders=2, block_rows=block_rows, blocks=blocks) as made:
        assert (made.language.pool.blocks, made.language.pool.rows_per_block) == (blocks, block_rows)
        plan = halves(moe).planner.plan(PROMPTS["image and video"])
        assert max(item.rows for item in plan.items) > blocks * block_rows
        await check_all(made, moe)


async def test_a_bfloat16_tower_before_a_float32_text_model(moe: Path) -> None:
    """What a CPU runs by default."""
    async with system(moe, row_dtype="bfloat16", dtype=None) as made:
        for name, wanted in truths(moe, torch.bfloat16).items():
            assert await made.ask(PROMPTS[name], TOKENS) == wanted, name


async def test_many_requests_that_share_images_over_two_encoders(moe: Path) -> None:
    """Single flight: the same image wanted by several requests at once is encoded once on each peer at most."""
    pictures = [ImagePart(png(64 + 32 * (i % 3), 64, i % 4)) for i in range(12)]
    prompts = [chat(picture, f"What is number {i}?") for i, picture in enumerate(pictures)]
    async with system(moe, encoders=2, blocks=2, block_rows=4) as made:
        answers = await asyncio.gather(*(made.ask(messages, TOKENS) for messages in prompts))
        assert answers == [truth(moe, messages) for messages in prompts]
        assert sum(peer.pipeline.items_encoded for peer in made.encoders) <= 2 * len(set(pictures))
        assert all(peer.pipeline.items_encoded for peer in made.encoders)


# -- the rows, bit for bit --------------------------------------------------------------------------------------


def capture(made: System) -> dict[str, dict[int, dict[int, bytes]]]:
    """Bytes that reach the engine, by request, item and first row."""
    found: dict[str, dict[int, dict[int, bytes]]] = defaultdict(lambda: defaultdict(dict))
    deliver = made.language.engine.deliver_bytes

    def spy(handle: RequestHandle, index: int, start: int, data: memoryview, **rest: Any) -> None:
        assert start not in found[handle.request_id][index], "rows were delivered twice"
        found[handle.request_id][index][start] = bytes(data)
        deliver(handle, index, start, data, **rest)

    made.language.engine.deliver_bytes = spy  # type: ignore[method-assign]
    return found


@BY_TRANSPORT
async def test_the_engine_gets_the_encoders_bits_and_so_the_monoliths_logits(
    moe: Path, transports: tuple[str, ...]
) -> None:
    names = ["one image", "three images", "video", "image and video"]
    async with system(moe, transports=transports, block_rows=3, blocks=2) as made:
        delivered = capture(made)
        await asyncio.gather(*(made.ask(PROMPTS[name], 1, request_id=name) for name in names))
    both = halves(moe)
    for name in names:
        asked = both.ask(PROMPTS[name])
        rebuilt = with_rows(both, asked, delivered[name])
        assert torch.equal(rebuilt.embeds, asked.embeds) and torch.equal(rebuilt.deepstack, asked.deepstack)
        assert torch.equal(both.logits(rebuilt), both.truth(asked))


def with_rows(both: Halves, asked: Asked, delivered: dict[int, dict[int, bytes]]) -> Asked:
    """The prompt laid out anew, from its ids and from what the engine was given."""
    embeds = both.language.embed(torch.from_numpy(asked.plan.input_ids))[None].clone()
    deepstack = torch.zeros_like(asked.deepstack)
    h = both.language.layout.hidden_size
    for index, item in enumerate(asked.plan.items):
        rows = rows_of(delivered[index], item.rows)
        at = 0
        for start, stop in item.spans:
            piece = rows[at : at + stop - start]
            embeds[0, start:stop], deepstack[0, start:stop] = piece[:, :h], piece[:, h:]
            at += stop - start
    return dataclasses.replace(asked, embeds=embeds, deepstack=deepstack)


def rows_of(pieces: dict[int, bytes], rows: int) -> torch.Tensor:
    data = b"".join(piece for _, piece in sorted(pieces.items()))
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(rows, -1)


# -- the rows are used ------------------------------------------------------------------------------------------


async def test_another_image_gives_another_answer_and_rows_are_counted(moe: Path) -> None:
    prompts = [chat(ImagePart(png(96, 96, seed)), "What is it?") for seed in (1, 2)]
    rows = [halves(moe).planner.plan(messages).items[0].rows for messages in prompts]
    async with system(moe) as made:
        first, second = [await made.ask(messages, TOKENS) for messages in prompts]
        assert first != second
        assert made.language.engine.stats().rows_used == sum(rows)
        await made.ask(PROMPTS["text"], TOKENS)
        assert made.language.engine.stats().rows_used == sum(rows)


async def test_swapped_images_swap_what_is_answered(moe: Path) -> None:
    a, b = ImagePart(png(96, 96, 1)), ImagePart(png(96, 96, 2))
    async with system(moe) as made:
        answers = [await made.ask(chat(*pair, "Which?"), TOKENS) for pair in ((a, b), (b, a), (a, b))]
    assert answers[0] == answers[2] != answers[1]


async def test_zeroed_deepstack_rows_change_the_logits(moe: Path) -> None:
    both, messages = halves(moe), PROMPTS["one image"]
    asked = both.ask(messages)
    h = both.language.layout.hidden_size
    encoder = WithoutDeepStack(Qwen3VLVisionEncoder(moe, dtype="float32"))
    async with system(moe, encoder=encoder) as made:
        delivered = capture(made)
        answer = await made.ask(messages, TOKENS, request_id="it")
    rows = rows_of(delivered["it"][0], asked.plan.items[0].rows)
    assert torch.equal(rows[:, :h], both.encoder.encode(asked.patches)[0][:, :h])
    assert not rows[:, h:].any()
    zeroed = dataclasses.replace(asked, deepstack=torch.zeros_like(asked.deepstack))
    assert (both.logits(zeroed) - both.truth(asked)).abs().max() > 0.1
    assert list(answer) == both.generate(zeroed, TOKENS)[0]
    assert answer != truth(moe, messages)


async def test_a_video_of_many_frames_and_an_image_of_the_largest_size(moe: Path) -> None:
    messages = chat(ImagePart(encoded(noise(700, 500), "JPEG", quality=60)), video(24, 128, 96), "What is new?")
    async with system(moe, encoders=2, block_rows=4, blocks=3) as made:
        assert await made.ask(messages, TOKENS) == truth(moe, messages)


async def test_the_same_weights_in_another_folder_are_the_same_model(moe: Path, tmp_path: Path) -> None:
    other = build_tiny(tmp_path, moe=True, levels=3, shards=3)
    async with system(moe, encoder=Qwen3VLVisionEncoder(other, dtype="float32")) as made:
        assert await made.ask(PROMPTS["one image"], TOKENS) == truth(moe, PROMPTS["one image"])
