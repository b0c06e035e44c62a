"""``bench transport`` runs, its numbers add up, and it tells wrong bytes and a held loop."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from aiodisagg.bench import transport
from aiodisagg.bench.partner import Done, Hog, Partner
from aiodisagg.bench.paths import LIMITS, Paths, WrongBytes
from aiodisagg.bench.transport import Moved, TransportReport
from aiodisagg.bench.transport_tables import bars, markdown
from aiodisagg.bench.watch import Held, LoopWatch
from aiodisagg.cli import main
from aiodisagg.peer.config import MiB
from tests.conftest import LOOPS

loops = pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)


@pytest.mark.slow
def test_the_command_reports_every_transport_beside_its_limit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aiodisagg", "bench", "transport", "--quick", "--runs", "1"]
    sections = ["--only", "sizes", "--only", "link", "--only", "handoff"]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    ended = subprocess.run([*command, *sections, *files], capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "a.json").read_text())
    here = {"ipc", "stream", "zmq", "mooncake-tcp"} - set(report["missing"])
    assert {(one["path"], one["concurrent"]) for one in report["moved"]} == {(n, c) for n in here for c in (1, 8)}
    for one in report["moved"]:
        assert one["of_limit"] == pytest.approx(one["limit_runs_s"][0] / one["runs_s"][0])
        assert one["gib_s"] == pytest.approx(one["size_bytes"] * one["concurrent"] / one["runs_s"][0] / 2**30)
    assert {one["path"] for one in report["loops"]} == here | {"idle"}
    assert all(0 < one["p50_us"] <= one["p99_us"] for one in report["latencies"])
    assert len(report["latencies"]) == 6 + 2 * 3
    p50_us = {one["what"]: one["p50_us"] for one in report["latencies"]}
    ratio = p50_us["link round trip, TCP"] / p50_us["its bytes by bare protocols, TCP"]
    assert f"{ratio:.1f} times its bytes bare" in ended.stdout
    assert "| stream | 16 MiB | 8 |" in ended.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run([*command, "--read", str(tmp_path / "a.json")], capture_output=True, text=True, check=False)
    assert again.stdout == ended.stdout


@pytest.mark.anyio
@loops
async def test_wrong_bytes_are_told(no_leaks: None) -> None:
    async with Partner() as partner, Paths(partner, 4 * MiB, names=("ipc", "stream"), limits=False) as paths:
        for name, path in paths.transports.items():
            assert await paths.check(name, 4 * MiB) > 0
            whole = path.run
            path.run = lambda ranges, times, whole=whole: whole([(0, 4 * MiB - 1)], times)  # type: ignore[method-assign]
            with pytest.raises(WrongBytes, match=name):
                await paths.check(name, 4 * MiB)


@pytest.mark.anyio
@loops
async def test_bytes_arrive_while_the_receivers_interpreter_is_wanted(no_leaks: None) -> None:
    async with Partner() as partner, Paths(partner, 4 * MiB, names=("stream", "zmq"), limits=False) as paths:
        await partner.ask(Hog(1), Done)
        for name in paths.transports:
            await paths.check(name, 4 * MiB)
        await partner.ask(Hog(0), Done)


@pytest.mark.anyio
@loops
async def test_a_held_loop_is_noticed(no_leaks: None) -> None:
    watch = LoopWatch()
    turned = asyncio.Event()
    asyncio.get_running_loop().call_later(0.005, turned.set)
    await turned.wait()
    watch.take()
    until = time.thread_time() + 0.008
    while time.thread_time() < until:
        pass
    turned.clear()
    asyncio.get_running_loop().call_later(0.005, turned.set)
    await turned.wait()
    worst = watch.take()
    assert worst.late_ms >= worst.held_ms >= 6  # a tick may have passed unread before
    assert watch.take() == Held(0, 0)
    watch.close()


def test_a_bar_is_judged_by_ratios_of_the_same_round() -> None:
    def moved(path: str, runs_s: list[float], of_limit: float) -> Moved:
        return Moved(path, LIMITS[path], 256 * MiB, 1, runs_s, runs_s, 1.0, 1.0, of_limit)

    report = TransportReport(
        "machine", "reno", 3, moved=[moved("stream", [1.0, 9.0, 2.0], 0.95), moved("zmq", [1.4, 12.6, 1.0], 0.85)]
    )
    found = {(path, bar): (measured, verdict) for path, bar, measured, verdict in bars(report)}
    assert found["stream, 256 MiB", ">= 1.3 times zmq"] == ("1.40", "met")
    assert found["stream, 256 MiB", ">= 0.9 of bare BufferedProtocol pump"] == ("0.95", "met")
    assert found["zmq, 256 MiB", ">= 0.9 of bare pyzmq pump"] == ("0.85", "**missed**")
    assert "| zmq, 256 MiB | >= 0.9 of bare pyzmq pump | 0.85 | **missed** |" in markdown(report)


def test_a_report_says_how_memory_was_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.cpu.x86_non_temporal_threshold=0x80000")
    machine, _ = transport._machine()
    assert "huge pages" in machine and "x86_non_temporal_threshold=0x80000" in machine


def test_a_file_that_is_no_report_is_said_to_be_none(tmp_path: Path) -> None:
    for number, content in enumerate(("[1]", "{", "\n")):
        file = tmp_path / f"{number}.json"
        file.write_text(content)
        found = CliRunner().invoke(main, ["bench", "transport", "--read", str(file)])
        assert found.exit_code == 1 and isinstance(found.exception, SystemExit)
        assert f"read: {file} is no report of bench transport" in found.output
