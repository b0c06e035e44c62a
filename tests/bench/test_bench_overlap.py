"""What bench overlap compares: the same load for both modes, no picture twice, ratios of what belongs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from aiodisagg.bench import overlap
from aiodisagg.bench.overlap import OverlapOptions, OverlapReport, Pass, bench_overlap, table
from aiodisagg.errors import ConfigError

pytestmark = pytest.mark.anyio


class Peer:
    """Waiting takes twice as long to the first token, and a tenth less time for everything, in every round."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.asked: list[Any] = []

    async def run(self, load: Sequence[Any], concurrency: int, draw: Random) -> Pass:
        self.asked.append((list(load), draw.random()))
        turn, waits = len(self.asked) ** 2, self.mode == "wait"
        ttft, rate = turn * (2.0 if waits else 1.0), turn * (1.1 if waits else 1.0)
        return Pass(self.mode, ttft, 0.5, ttft - 0.5, 9.0, rate, 10 * rate, [ttft])


async def test_ratios_are_of_one_round_whoever_went_first() -> None:
    peers: list[Any] = [Peer("overlap"), Peer("wait")]
    said: list[str] = []
    found = await overlap._compare(peers, 4, OverlapOptions(rounds=3, requests=2), said.append)
    assert found.ttft_ratios == [0.5] * 3 and found.throughput_ratios == pytest.approx([1 / 1.1] * 3)
    assert [one.mode for one in found.passes] == ["overlap", "wait", "wait", "overlap", "overlap", "wait"]
    loads = [[load for load, _ in peer.asked] for peer in peers]
    assert loads[0] == loads[1] and len(loads[0][0]) == 4 * (1 + 2) and loads[0][0] != loads[0][1]
    pixels = [seed for peer in peers for _, seed in peer.asked]
    assert len(set(pixels)) == 6, "a picture comes twice"
    text = table(OverlapReport(3, 2, 128, 200.0, "ipc", [0, 1], [found]))
    assert "0.50" in text and "0.909" in text and len(said) == 6
    assert "4.000" in text and "8.000" in text, "seconds are medians over rounds as well"


def test_a_load_has_one_to_eight_images_of_differing_sizes() -> None:
    load = overlap._load(200, 128, Random(1))
    assert {len(request.sides) for request in load} == set(range(1, 9))
    assert {side for request in load for side in request.sides} == set(overlap.SIDES)
    assert 64 <= min(request.tokens for request in load) < max(request.tokens for request in load) <= 192
    assert overlap._load(200, 128, Random(1)) == load
    peer = overlap._Peer("wait", "", "m", None)  # type: ignore[arg-type]
    body = peer._body(replace(load[0], sides=(160, 224)), Random(2))
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["text", "image_url", "image_url"] and body["max_tokens"] == load[0].tokens
    assert overlap._noise(224, Random(1)) != overlap._noise(224, Random(2))


async def test_one_core_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3})
    with pytest.raises(ConfigError, match="two are needed"):
        await bench_overlap(OverlapOptions())
