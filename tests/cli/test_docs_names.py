"""What the docs name exists: flags of commands, and metrics; and no metric is left out of docs/operating.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click

from aiodisagg.cli import main

ROOT = Path(__file__).parents[2]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
NAME = re.compile(r"`(?:aiodisagg_)?([a-z]+(?:_[a-z]+)*)(?:\{[a-z,]+\})?`")


def commands(command: click.Command, name: str) -> Iterator[tuple[str, set[str]]]:
    flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    yield name, flags | {"--help"}
    if isinstance(command, click.Group):
        for word, inner in command.commands.items():
            yield from commands(inner, f"{name} {word}")


def test_each_flag_of_a_command_line_is_one_of_that_command() -> None:
    flags = dict(commands(main, "aiodisagg"))
    wrong, seen = [], 0
    for page, text in PAGES.items():
        for line in re.sub(r"\\\n", "", text).splitlines():
            for run in re.findall(r"aiodisagg (?:bench )?[a-z]+\b[^`|#;]*", line):
                name = max((known for known in flags if f"{run} ".startswith(f"{known} ")), key=len)
                given = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", run)
                seen += len(given)
                wrong += [(page, name, flag) for flag in given if flag not in flags[name]]
    assert seen > 100
    assert wrong == []


def metrics_in(path: Path) -> Iterator[str]:
    """Names without ``aiodisagg_``, as they are scraped, of what is made by prometheus_client or ``peer.metrics``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(
                func=ast.Name(id=kind) | ast.Attribute(attr=kind),
                args=[ast.Constant(value=str(name)), ast.Constant(), *_],
            ) if kind.lower().removesuffix("metricfamily") in ("gauge", "counter", "histogram"):
                yield name.removeprefix("aiodisagg_") + ("_total" if kind.lower().startswith("counter") else "")
            case _:
                pass


def test_every_metric_is_documented_and_none_that_is_not_there() -> None:
    made = {name for path in (ROOT / "aiodisagg").rglob("*.py") for name in metrics_in(path)}
    made |= {"encode_items_open", "encode_row_bytes_total"}  # of a peer that is both, see peer.metrics.beside
    assert len(made) > 60
    listed = PAGES["operating.md"].split("## Metrics")[1]
    assert made - set(NAME.findall(listed)) == set()
    named = {name for text in PAGES.values() for name in re.findall(r"`aiodisagg_([a-z_]+)(?:\{[a-z,]+\})?`", text)}
    assert named - made == set()


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_lead_to_pages_and_headings_that_there_are() -> None:
    headings = {page: {anchor(line) for line in re.findall(r"^#+ (.*)$", text, re.M)} for page, text in PAGES.items()}
    dead = []
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\((?!http)([^)\s]+)\)", text):
            file, _, heading = link.partition("#")
            to = folder / file if file else folder / page
            if not to.exists() or (heading and heading not in headings[to.name]):
                dead.append((page, link))
    assert dead == []
