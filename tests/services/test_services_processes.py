"""The demo as a person runs it: it succeeds, and whatever is done to it, nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
MARK = "AIODISAGG_TEST_RUN"
START_S = 120.0
END_S = 20.0


class Run:
    """A demo, and every process that descends from it, however it was reparented."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.mark, self.folder = uuid.uuid4().hex, folder
        self.shared = set(os.listdir("/dev/shm"))
        # Temporary files, should there be any, are looked for in a folder of this run's own.
        environment = {**os.environ, MARK: self.mark, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "aiodisagg", "demo", *options],
            env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def processes(self) -> dict[str, psutil.Process]:
        """Those alive, by role: all descendants, and once the demo has ended whoever has its environment."""
        found = {}
        everybody = self.process.poll() is not None
        tree = psutil.process_iter() if everybody else psutil.Process(self.process.pid).children(recursive=True)
        for process in tree:
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found[process.cmdline()[3]] = process
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, IndexError):
                continue
        return found

    def wait_for(self, condition: Callable[[dict[str, psutil.Process]], bool]) -> dict[str, psutil.Process]:
        until = time.monotonic() + START_S
        while not condition(found := self.processes()):
            assert self.process.poll() is None and time.monotonic() < until, self.end()
            time.sleep(0.1)  # foreign processes: nobody tells of them
        return found

    def end(self) -> tuple[int, str, str]:
        """Waits for the demo: exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=START_S)
        return self.process.returncode, out, err

    def check_nothing_is_left(self, but: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        _, alive = psutil.wait_procs(list(self.processes().values()), timeout=END_S)
        assert not alive and not self.processes()
        assert set(os.listdir("/dev/shm")) <= self.shared
        assert set(os.listdir(self.folder)) == but


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(*options: str) -> Run:
        runs.append(run := Run(tmp_path, *options))
        return run

    yield start
    for run in runs:
        for process in run.processes().values():
            process.kill()
        run.process.communicate()


def serving(found: dict[str, psutil.Process]) -> bool:
    """Everybody is there, and the language peer listens for requests."""
    if set(found) != {"bootstrap", "encode", "language"}:
        return False
    try:
        return any(c.status == psutil.CONN_LISTEN for c in found["language"].net_connections("tcp"))
    except psutil.NoSuchProcess:
        return False


def test_it_answers_as_the_monolith_does_and_writes_what_happened(started: Callable[..., Run], tmp_path: Path) -> None:
    run = started("--requests", "3", "--json", str(tmp_path / "out.json"))
    code, out, err = run.end()
    assert (code, err) == (0, "")
    assert "3 of 3 answers equal the monolith's" in out
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["images"] for row in found["requests"]] == [1, 2, 3]
    for row in found["requests"]:
        assert row["answer"] == row["monolith"] and row["equal_to_monolith"] and not row["error"]
        assert row["right"] == (row["answer"] == row["truth"])
        assert (
            row["rows"] > 0
            and row["bytes_on_wire"]
            == row["rows"] * found["requests"][0]["bytes_on_wire"] // (found["requests"][0]["rows"])
        )
        assert 0 < row["encode_ms"] < row["first_token_ms"] < row["total_ms"] and row["transfer_ms"] >= 0
    totals = found["totals"]
    assert (totals["requests"], totals["failed"], totals["equal_to_monolith"]) == (3, 0, 3)
    assert totals["bytes_on_wire"] == sum(row["bytes_on_wire"] for row in found["requests"])
    run.check_nothing_is_left(but={"out.json"})


def test_ctrl_c(started: Callable[..., Run]) -> None:
    run = started("--requests", "200", "--encoders", "1", "--no-compare")
    run.wait_for(serving)
    run.process.send_signal(signal.SIGINT)
    code, out, err = run.end()
    assert code == 130 and "Traceback" not in out + err
    run.check_nothing_is_left()


def test_ctrl_c_while_it_starts(started: Callable[..., Run]) -> None:
    run = started("--requests", "3", "--encoders", "1", "--no-compare")
    run.wait_for(lambda found: "language" in found)
    run.process.send_signal(signal.SIGINT)
    code, out, err = run.end()
    assert code == 130 and "Traceback" not in out + err
    run.check_nothing_is_left()


@pytest.mark.parametrize(
    ("role", "when"),
    [("language", "serving"), ("encode", "serving"), ("bootstrap", "starting"), ("encode", "starting")],
)
def test_kill_9_of_a_process_ends_the_others_and_says_who_died(
    started: Callable[..., Run], role: str, when: str
) -> None:
    run = started("--requests", "200", "--encoders", "1", "--no-compare")
    run.wait_for(serving if when == "serving" else lambda found: len(found) == 3)[role].kill()
    code, out, err = run.end()
    assert code == 1 and "Traceback" not in out + err
    assert err.startswith(f"Error: {role}") and "ended with code -9" in err
    run.check_nothing_is_left()


@pytest.mark.parametrize("when", ["starting", "serving"])
def test_kill_9_of_the_demo_itself_takes_its_processes_along(started: Callable[..., Run], when: str) -> None:
    run = started("--requests", "200", "--encoders", "1", "--no-compare")
    run.wait_for(serving if when == "serving" else lambda found: "bootstrap" in found)
    run.process.kill()
    run.end()
    run.check_nothing_is_left()
