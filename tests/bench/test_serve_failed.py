"""``bench serve`` against a server that answers nothing of the workload: why, and an exit status that scripts see."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.fake_openai import FakeServer, Step, answer_of, serving

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


def no_pictures(body: dict[str, Any]) -> list[Step] | int:
    text_only = all(isinstance(message["content"], str) for message in body["messages"])
    return answer_of([0.0, 0.0]) if text_only or "image_url" not in json.dumps(body) else 503


@pytest.mark.parametrize(("images", "status"), [("1", 1), ("0:0.5,1:0.5", 0)])
async def test_the_exit_status_and_an_example_of_what_was_said(images: str, status: int, tmp_path: Path) -> None:
    """It ended well with "12 HTTP 503", and nobody was told what the server had said."""
    report = tmp_path / "a.json"
    async with serving(FakeServer(no_pictures)) as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "aiodisagg", "bench", "serve", "--url", server.url, "--quick", "--images", images,
            "--sizes", "64x64", "--text", "8", "--json", str(report),
            stdout=-1, stderr=-1, stdin=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        out, err = await process.communicate()
    assert process.returncode == status, err.decode()
    assert f"HTTP 503, for example: {FakeServer.said}" in out.decode()
    (run,) = json.loads(await asyncio.to_thread(report.read_bytes))["runs"]
    assert run["all"]["examples"] == {"HTTP 503": FakeServer.said}
    assert err.decode().endswith("Error: no request was answered\n") == bool(status)
