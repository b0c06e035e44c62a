"""The README's example does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.models.halves import encoded, noise

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
README = Path(__file__).parents[2] / "README.md"


async def test_the_embedding_example_runs_as_printed(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    await names["main"](moe, encoded(noise(120, 80)))  # type: ignore[operator]
    assert capsys.readouterr().out
