"""Checksums that never match, and peers of which one checks and the other was told to send none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from aiodisagg.bench.synthetic import item_of
from aiodisagg.encode.session import Session
from aiodisagg.protocol.messages import ItemKey
from tests.language.test_rows import MODEL, Made, Zeros, made
from tests.services.system import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Checksums that were made, by peer."""
    seen: dict[str, list[int]] = {}
    move = Session._move

    async def spied(self: Session, *what: Any) -> tuple[int, bool]:
        checksum, on_device = await move(self, *what)
        seen.setdefault(self.link.local.name, []).append(checksum)
        return checksum, on_device

    monkeypatch.setattr(Session, "_move", spied)
    return seen


async def fetch(one: Made, *numbers: int) -> None:
    for number in numbers:
        key = ItemKey(number, 0)
        one.receiver.request([(key, item_of(number, 64))], 60.0)
        await eventually(lambda key=key: key in one.ends)  # type: ignore[misc]


async def test_a_peer_whose_checksums_never_match_is_left_and_becomes_a_suspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: dict[str, list[int]]
) -> None:
    """Its items failed for good, nobody else was asked for them, and it got the next ones as well."""
    spied = Session._move

    async def wrong(self: Session, *what: Any) -> tuple[int, bool]:
        checksum, on_device = await spied(self, *what)
        return checksum ^ (self.link.local.name == "e0"), on_device

    monkeypatch.setattr(Session, "_move", wrong)
    async with made(tmp_path, monkeypatch, Zeros(MODEL), Zeros(MODEL)) as one:
        await fetch(one, *range(4))
        assert set(one.ends.values()) == {None}
        assert [peer["standing"] for peer in one.receiver.peers.described()] == ["suspect", "ready"]
    assert len(moved["e0"]) == 8, "of two items"


@pytest.mark.parametrize("checks", [True, False])
async def test_who_receives_decides_whether_there_are_checksums(
    checks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    moved: dict[str, list[int]],
) -> None:  # fmt: skip
    """Switched off at the encode peers alone, every item failed as corrupt."""
    caplog.set_level(logging.INFO, "aiodisagg.encode.session")
    async with made(tmp_path, monkeypatch, Zeros(MODEL), checksum=checks, their_checksum=not checks) as one:
        await fetch(one, 1)
        assert one.ends == {ItemKey(1, 0): None}
    assert moved["e0"] and all(bool(checksum) is checks for checksum in moved["e0"])
    (said,) = [record.getMessage() for record in caplog.records if "has its way" in record.getMessage()]
    assert f"checksum={not checks} here" in said
