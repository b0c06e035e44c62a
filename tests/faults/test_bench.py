"""The measuring commands run, and what they report adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def bench(*arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "aiodisagg", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_resume(tmp_path: Path) -> None:
    """A cut costs at most one chunk; a pool of blocks is smaller than a buffer for each."""
    bench("resume", "--quick", "--repeats", "1", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png"))
    report = json.loads((tmp_path / "a.json").read_text())
    assert len(report["resumed"]) == 14
    for one in report["resumed"]:
        assert one["resent_bytes"] <= one["interruptions"] * one["chunk_bytes"], one
        assert one["seconds"] > 0 and one["undisturbed_s"] > 0
    fixed, blocks = report["memory"][:2]
    assert fixed["kind"] == "fixed buffers" and fixed["resident_bytes"] > blocks["resident_bytes"] > 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_kill(tmp_path: Path) -> None:
    """Exit code 0 says that every request had the tokens of the undisturbed run."""
    bench("faults", "--rounds", "2", "--requests", "20", "--json", str(tmp_path / "a.json"))
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["failed"], report["wrong"], report["received_twice_bytes"]) == (0, 0, 0)
    assert len(report["rounds"]) == 2
