"""What crosses the wire: the rows of visual tokens, exactly, and next to nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from aiodisagg.models.base import ImagePart, ItemKind, Patches
from aiodisagg.models.loading import fingerprint
from aiodisagg.protocol.rows import Region, RowLayout
from tests.models.halves import PROMPTS, chat, encoded, halves, noise, png
from tests.services.system import MiB, System, system

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Instant:
    """A VisionEncoder that takes no time: rows of the right shape, with numbers that depend on nothing."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.fingerprint = fingerprint(folder, dtype)
        self.layout = RowLayout.of(self.fingerprint)

    def prepare(self, kind: ItemKind, media: Sequence[bytes], grid_thw: tuple[int, int, int], fps: float) -> Patches:
        return Patches(torch.empty(0), grid_thw)

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        dtype = getattr(torch, self.layout.dtype)
        return [torch.randn(patches.count // 4, self.layout.width).to(dtype) for patches in batch]


def moved(made: System) -> tuple[int, int]:
    """(bytes of rows, bytes of the link) that came from encode peers so far; both sides agree about them."""
    language, (encoder,) = made.language, made.encoders
    received = language.receiver.counters.total("received")
    assert received == encoder.sender.counters.total("sent")
    assert encoder.sender.counters.total("resent") == language.receiver.counters.total("refused") == 0
    return received, language.peers.link_bytes[1]


@pytest.mark.parametrize("transports", [("ipc",), ("zmq",)], ids=["ipc", "zmq"])
async def test_a_request_costs_the_bytes_of_its_visual_rows_and_less_than_a_hundredth_more(
    wide: Path, transports: tuple[str, ...]
) -> None:
    """bf16 rows of hidden 1024 and three DeepStack levels, a few hundred of them, blocks of the default size."""
    picture = ImagePart(encoded(noise(640, 480), "JPEG", quality=30))
    prompts = [chat(picture, "What is it? " + "Look at it well. " * n) for n in (1, 60)]
    encoder = Instant(wide, "bfloat16")
    async with system(
        wide, encoder=encoder, transports=transports, row_dtype="bfloat16", pool_bytes=64 * MiB, block_rows=256,
        token_budget=2048, cache_bytes=0, prefix_cache=False,
    ) as made:  # fmt: skip
        before = moved(made)
        for messages in prompts:
            plan = made.language._planner.plan(messages)
            rows = sum(item.rows for item in plan.items)
            assert rows == 300 and (encoder.layout.hidden_size, encoder.layout.deepstack_levels) == (1024, 3)
            await made.ask(messages, 1)
            after = moved(made)
            data, words = after[0] - before[0], after[1] - before[1]
            assert data == rows * (1 + 3) * 1024 * 2
            assert 0 < words < data / 100
            before = after
        trace = made.language.traces.recent()[-1]
        assert trace.items[0].bytes_arrived == rows * encoder.layout.row_bytes
        counted = dict(line.rsplit(" ", 1) for line in made.language.metrics().splitlines() if not line.startswith("#"))
        assert float(counted["aiodisagg_link_received_bytes_total"]) == made.language.peers.link_bytes[1]
        (peer,) = [linked.name for linked in made.language.peers.linked]
        labels = f'{{outcome="received",peer="{peer}",region="deepstack"}}'
        assert float(counted[f"aiodisagg_row_bytes_total{labels}"]) == 2 * rows * 3 * 1024 * 2
        sent = f'outcome="sent",peer="{made.language.name}",region="deepstack"'
        assert sent in made.encoders[0].metrics(), "by name, which outlives a restart"


async def test_every_prompt_costs_its_visual_rows_and_text_costs_nothing(moe: Path) -> None:
    layout = halves(moe).language.layout
    row_bytes = layout.row_bytes
    async with system(moe, transports=("ipc",), block_rows=3, blocks=3, cache_bytes=0, prefix_cache=False) as made:
        for name, messages in PROMPTS.items():
            before = made.language.receiver.counters.total("received")
            links = made.language.peers.link_bytes
            await made.ask(messages, 2)
            rows = sum(item.rows for item in halves(moe).planner.plan(messages).items)
            assert made.language.receiver.counters.total("received") - before == rows * row_bytes, name
            if name == "text":
                assert made.language.peers.link_bytes == links
        counters = made.language.receiver.counters
        levels = layout.deepstack_levels
        assert counters.total("received", region=Region.DEEPSTACK) == levels * counters.total(
            "received", region=Region.INPUT
        )
        assert not any(counters.total("received", region=r) for r in (Region.FILL_IDS, Region.MROPE, Region.AUX))


async def test_an_image_that_an_encoder_knows_is_not_sent_to_it_as_work_again(moe: Path) -> None:
    messages = chat(ImagePart(png(96, 96, 9)), "Again?")
    async with system(moe, cache_bytes=0, prefix_cache=False) as made:
        answers = {await made.ask(messages, 4) for _ in range(3)}
        assert len(answers) == 1
        assert made.encoders[0].pipeline.items_encoded == 1
        assert made.encoders[0].sender.sources.hits == 2
