"""The measuring commands as a user types them."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from aiodisagg import EncodeConfig, EncodeService, LanguageConfig, LanguageService
from aiodisagg.api import HttpServer
from aiodisagg.bench.workload import read_trace
from aiodisagg.data import digits_model

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(300)]


def read(file: Path) -> bytes:
    return file.read_bytes()


async def bench(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "aiodisagg", "bench", *arguments, stdout=-1, stderr=-1, stdin=asyncio.subprocess.DEVNULL
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_serve_against_the_digit_reader(tmp_path: Path) -> None:
    folder = digits_model()
    report_file, outcomes, plot, trace_file = (tmp_path / name for name in ("a.json", "a.jsonl", "a.png", "t.jsonl"))
    async with (
        EncodeService(EncodeConfig(model=folder, transports=("memory",))) as encoder,
        LanguageService(LanguageConfig(model=folder, transports=("memory",))) as peer,
    ):
        peer.add_peer(encoder.address)
        await peer.peers.wait_any(30.0)
        async with HttpServer(peer, port=0) as server:
            code, said, err = await bench(
                "serve", "--url", f"{server.url}/v1", "--quick", "--images", "0-3", "--sizes", "96x96", "--text", "16",
                "--output", "6", "--concurrency", "4", "--rates", "20", "--json", str(report_file),
                "--outcomes", str(outcomes), "--plot", str(plot), "--save-trace", str(trace_file),
            )  # fmt: skip
    assert code == 0, err
    assert "TTFT" in said and "goodput 5x" in said
    report = json.loads(read(report_file))
    assert (report["model"], report["tokens_per_word"] > 0.5) == ("digits", True)
    opened, closed = report["runs"]
    assert (opened["rate_per_s"], closed["concurrency"]) == (20.0, 4)
    for run in (opened, closed):
        assert (run["all"]["completed"], run["all"]["errors"]) == (12, {})
        assert run["all"]["ttft_ms"]["mean"] > 0 and 1 <= run["all"]["output_tokens"] <= 6
    assert len(read(outcomes).splitlines()) == 24
    assert read(plot).startswith(b"\x89PNG")
    trace = read_trace(trace_file)
    assert len(trace) == 12 and {image.width for request in trace for image in request.images} == {96}


async def test_control(tmp_path: Path) -> None:
    code, said, err = await bench(
        "control", "--peers", "3,5", "--requests", "200", "--concurrency", "8", "--cores", "0,0", "--json",
        str(tmp_path / "a.json"),
    )  # fmt: skip
    assert code == 0, err
    assert "from 3 to 5 encode peers" in said
    one, _ = json.loads(read(tmp_path / "a.json"))["measured"]
    assert one["peers"] == 3 and one["requests_per_s"] > 0
    assert one["half_per_s"] == one["requests_per_s"] / 2 and one["half_latency_ms"]["p99"] > 0


async def test_reuse(tmp_path: Path) -> None:
    code, said, err = await bench(
        "reuse", "--quick", "--places", "0,0", "--json", str(tmp_path / "a.json")
    )  # fmt: skip
    assert code == 0, err
    assert "again" in said and "times the requests a second" in said
    on, off = json.loads(read(tmp_path / "a.json"))["found"]
    assert (on["caches"], off["caches"]) == (True, False)
    assert (on["all"]["completed"], on["items"], off["items"]) == (60, 60, 60)
    assert on["unique"] == off["unique"] < 40
    assert (on["encoded"], on["twice"], on["evicted"]) == (on["unique"], 0, 0)
    assert on["cached"] > 0 and on["saved_bytes"] > 0 and off["cached"] == off["saved_bytes"] == 0
    assert off["encoded"] >= off["unique"]
