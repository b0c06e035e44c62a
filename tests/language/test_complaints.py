"""What a language peer's log and its debug page say of encode peers that do not do what they are asked for."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import pytest

from aiodisagg.bench.synthetic import item_of
from aiodisagg.language.peers import EncodePeer, EncodePeers
from aiodisagg.language.placing import Placing
from aiodisagg.protocol.counters import PeerLabels
from aiodisagg.protocol.messages import ItemKey, Refuse
from aiodisagg.scheduler.health import HealthConfig
from tests.language.test_rows import MODEL, Broken, Zeros, made
from tests.services.system import eventually

LOGGER = "aiodisagg.language"


@pytest.mark.anyio
@pytest.mark.usefixtures("no_leaks")
async def test_a_broken_peer_is_named_once_with_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every item was fetched, from somebody else: nothing was said of the peer that refused all of them."""
    caplog.set_level(logging.INFO, LOGGER)
    async with made(tmp_path, monkeypatch, Broken(MODEL), Zeros(MODEL)) as one:
        one.receiver.placing.standings.config = HealthConfig(suspect_s=300.0)
        for number in range(4):  # of equal ones the first by name is asked; from the third on it is a suspect
            key = ItemKey(number, 0)
            one.receiver.request([(key, item_of(number, 64))], 60.0)
            await eventually(lambda key=key: key in one.ends)  # type: ignore[misc]
        assert set(one.ends.values()) == {None}
        broken, good = one.receiver.peers.described()
    said = [record for record in caplog.records if "illegal memory access" in record.getMessage()]
    assert [record.levelname for record in said] == ["WARNING"]
    assert "encode peer e0 (life-0) refused item 0.0: encode_failed: " in said[0].getMessage()
    (suspect,) = [record for record in caplog.records if "is a suspect" in record.getMessage()]
    assert suspect.levelname == "WARNING" and "e0 (life-0) is a suspect for 300 s: it" in suspect.getMessage()
    assert (broken["name"], broken["standing"], good["standing"]) == ("e0", "suspect", "ready")
    assert "illegal memory access" in str(broken["last_refusal"]) and good["last_refusal"] == ""


class _Asked:
    """A placing with one peer, which is asked for item after item; what it refuses another delivers."""

    def __init__(self) -> None:
        self.peer = EncodePeer("unix:0", "life", "encode")
        known = {"life": self.peer, "good": EncodePeer("unix:1", "good", "good")}
        peers = Mock(linked=[self.peer], get=known.get, by_incarnation=known.get)
        self.placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
        self._items = 0

    def ask(self, now: float) -> ItemKey:
        self._items += 1
        key = ItemKey(self._items, 0)
        self.placing.errand(key, item_of(self._items, 64))
        placement = self.placing.choose(key, frozenset(), now)
        assert placement is not None
        self.placing.asked(key, placement, now)
        return key

    def refused(self, now: float, code: str = "encode_failed", why: str = "out of memory") -> None:
        key = self.ask(now)
        self.placing.refused("life", Refuse(key, 1, code, why, True), now)
        self.placing.given_up(key, now)
        placement = self.placing.choose(key, frozenset({"life"}), now)
        assert placement is not None
        self.placing.asked(key, replace(placement, peer="good"), now)
        self.placing.over(key, complete=True)

    def left(self, now: float) -> None:
        key = self.ask(now)
        self.placing.given_up(key, now)
        self.placing.over(key)

    def delivered(self, now: float) -> None:
        self.placing.over(self.ask(now), complete=True)


def test_a_peer_is_named_again_when_it_delivered_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    asked = _Asked()

    def said() -> list[tuple[str, str]]:
        found = [(record.levelname, record.getMessage().removeprefix("encode peer encode (life) ")) for record in
                 caplog.records]  # fmt: skip
        caplog.clear()
        return found

    asked.refused(0.0)
    assert said() == [("WARNING", "refused item 1.0: encode_failed: out of memory")]
    asked.refused(0.0)
    assert said() == [
        ("WARNING", "is a suspect for 10 s: it refused item 2.0 (encode_failed), which another delivered")
    ]
    asked.refused(1.0)
    assert said() == []
    asked.refused(1.0, "prepare_failed", "no such file")
    assert said() == [("WARNING", "refused item 4.0: prepare_failed: no such file")]
    asked.left(2.0)
    assert said() == [("WARNING", "does not deliver item 5.0: another peer is asked")]
    asked.delivered(20.0)
    assert said() == [
        ("INFO", "is tried with item 6.0; a suspect for 20 s more if that fails"),
        ("INFO", "delivers again: no suspect"),
    ]
    asked.delivered(20.0)
    assert said() == []
    asked.refused(21.0, why="again")
    assert said() == [("WARNING", "refused item 8.0: encode_failed: again")]
    assert asked.placing.judged("life", 21.0) == {"standing": "ready", "last_refusal": "encode_failed: again"}


def test_nothing_is_kept_of_a_peer_that_is_gone() -> None:
    asked = _Asked()
    asked.refused(0.0)
    asked.placing.link_lost("life", 1.0)
    assert asked.placing.judged("life", 1.0)["last_refusal"]
    asked.placing.link_lost("life", 1.0, gone=True)
    assert not asked.placing._complaints._about and not asked.placing.judged("life", 1.0)["last_refusal"]


def test_a_peer_makes_neither_lines_nor_memory_at_will(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    asked = _Asked()
    for number in range(5):
        asked.refused(0.0, f"code-{number}", "x" * 4096)
    refusals = [record.getMessage() for record in caplog.records if "refused item" in record.getMessage()]
    assert len([line for line in refusals if "code-" in line]) == 1 and max(map(len, refusals)) < 700


def test_what_nobody_delivered_is_nobodys_fault() -> None:
    asked = _Asked()
    for number in range(HealthConfig().failures + 1):
        now = float(number)
        key = asked.ask(now)
        asked.placing.refused("life", Refuse(key, 1, "encode_failed", "out of memory", True), now)
        asked.placing.given_up(key, now)
        placement = asked.placing.choose(key, frozenset({"life"}), now)
        assert placement is not None
        asked.placing.asked(key, replace(placement, peer="good"), now)
        asked.placing.over(key)
    assert asked.placing.judged("life", now)["standing"] == "ready"


def test_refusals_of_who_is_gone_are_counted_on() -> None:
    """A counter that goes back looks like a restart to who reads metrics."""
    asked = _Asked()
    asked.refused(0.0)
    asked.placing.link_lost("life", 1.0, gone=True)
    (found,) = asked.placing._complaints.metrics(PeerLabels()).samples
    assert (found.labels["code"], found.value) == ("encode_failed", 1)
