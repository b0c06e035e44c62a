"""``aiodisagg demo --kill-encoder``: what a person is shown is what happened."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_items_move_and_keep_their_rows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aiodisagg", "demo", "--kill-encoder", "--requests", "12"]
    ended = subprocess.run(
        [*command, "--json", str(tmp_path / "demo.json")], capture_output=True, text=True, timeout=280, check=False
    )
    assert ended.returncode == 0, ended.stderr
    said = " ".join(ended.stdout.split())
    found = re.search(
        r"(encode-\d) was killed: (\d+) items moved to (encode-\d); (\d+) of their \d+ rows were kept", said
    )
    assert found, said
    killed, moved, to, kept = found.groups()
    assert killed != to
    assert re.search(rf"stopped at \d+ of 9 rows on {killed}, went on with \d+ on {to}", said)
    totals = json.loads((tmp_path / "demo.json").read_text())["totals"]
    assert (totals["items_moved"], totals["rows_kept"]) == (int(moved), int(kept))
    assert int(kept) > 0
    assert totals["equal_to_monolith"] == totals["requests"] == 12
