"""What is said to be installed can be: from a checkout, and by extras that there are."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "aiodisagg").rglob("*.py")]


def test_every_extra_that_is_named_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = dict[str, Path]()
    for file in TEXTS:
        text = file.read_text(encoding="utf-8")
        found = re.findall(r"-e '\.\[([\w,-]+)\]'", text) + re.findall(r'extra ["`]+([\w-]+)["`]', text)
        named |= {extra: file for names in found for extra in names.split(",")}
    assert {"gpu", "bench", "mooncake", "mooncake-cpu"} <= set(named)
    assert {extra: file for extra, file in named.items() if extra not in extras} == {}


def test_nothing_is_said_to_come_from_an_index_where_it_is_not() -> None:
    assert [file for file in TEXTS if "pip install 'aiodisagg" in file.read_text(encoding="utf-8")] == []
