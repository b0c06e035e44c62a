"""What the command line says when it cannot start: one clear line and an exit code."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from aiodisagg.both.service import BothService
from aiodisagg.cli import main
from aiodisagg.encode.core import CoreGate
from aiodisagg.encode.gate import InlineGate, SlackGate
from aiodisagg.errors import ConfigError


@dataclass
class Ended:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str) -> Ended:
    """In this process: a fresh one takes seconds to import torch."""
    with torch.random.fork_rng(devices=[]):
        found = CliRunner().invoke(main, arguments)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return Ended(found.exit_code, found.stdout, found.stderr)


def test_a_mistake_costs_a_process_one_line_and_no_import_of_torch(tmp_path: Path) -> None:
    for role in ("encode", "language"):
        command = [sys.executable, "-X", "importtime", "-m", "aiodisagg", role, "--model", str(tmp_path / "nowhere")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1
        said = [line for line in ended.stderr.splitlines() if not line.startswith("import time:")]
        assert said == [f"Error: model: no such folder: {tmp_path / 'nowhere'}"]
        assert " torch" not in ended.stderr


@pytest.mark.parametrize("role", ["encode", "language", "demo"])
def test_a_missing_model_folder(role: str, tmp_path: Path) -> None:
    ended = run(role, "--model", str(tmp_path / "nowhere"))
    assert ended.returncode == 1 and not ended.stdout
    assert ended.stderr == f"Error: model: no such folder: {tmp_path / 'nowhere'}\n"


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    ended = run("encode", "--model", str(tmp_path))
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ") and "config.json" in ended.stderr and ended.stderr.count("\n") == 1


def test_ports_in_use(moe: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for command in (["bootstrap"], ["language", "--model", str(moe)]):
            ended = run(*command, "--port", port)
            assert ended.returncode == 1
            assert ended.stderr.startswith("Error: port") and "in use" in ended.stderr
            assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--listen", "tcp:0.0.0.0:0"], "secret"),
        (["--listen", "unix:/nowhere/a"], "listen: cannot listen on unix:/nowhere/a: No such file"),
        (["--transports", "ipc,smoke"], "transports: unknown: smoke"),
        (["--row-dtype", "int3"], "row_dtype"),
        (["--device", "abacus"], "device"),
        (["--device", "cuda:99"], "device"),
    ],
)
def test_options_that_cannot_be_meant(moe: Path, options: list[str], words: str) -> None:
    ended = run("encode", "--model", str(moe), *options)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ") and words in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_on_a_cpu_the_operating_system_shares_the_core_of_a_peer_that_is_both(
    moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encode peer's hidden option of the same name, which has a default, once stood in for the peer's own."""
    gates = list[object]()

    class Seen(BothService):
        async def __aenter__(self) -> BothService:
            gates.append(self.gate)
            raise ConfigError("seen", "that is enough")

    monkeypatch.setattr("aiodisagg.both.service.BothService", Seen)
    for options in ([], ["--inter-token-ms", "20"], ["--inline"]):
        CliRunner().invoke(main, ["both", "--model", str(moe), "--port", "0", *options])
    assert [type(gate) for gate in gates] == [CoreGate, SlackGate, InlineGate]


@pytest.mark.parametrize("where", [[], ["--separate"]])
def test_a_pace_of_nothing_is_refused_wherever_the_tower_is(moe: Path, where: list[str]) -> None:
    ended = run("both", "--model", str(moe), "--port", "0", "--inter-token-ms", "0", *where)
    assert ended.returncode == 1 and "inter_token_ms: must be above 0" in ended.stderr


def test_bench_load_measures_each_part_in_processes_of_its_own(moe: Path, tmp_path: Path) -> None:
    ended = run("bench", "load", "--model", str(moe), "--repeats", "1", "--json", str(tmp_path / "load.json"))
    assert ended.returncode == 0
    found = json.loads((tmp_path / "load.json").read_text())
    whole, encode, language = found["medians"]
    assert [part["part"] for part in found["medians"]] == ["monolith", "encode", "language"]
    assert whole["weight_bytes"] == encode["weight_bytes"] + language["weight_bytes"]
    assert all(part["peak_bytes"] > 0 and part["seconds"] > 0 for part in found["medians"])
    assert all(part in ended.stdout for part in ("monolith", "encode", "language"))
    assert run("bench", "load", "--model", str(tmp_path), "--repeats", "1").returncode == 1
