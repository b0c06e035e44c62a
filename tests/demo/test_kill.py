"""``--kill-encoder`` on scripted looks: what is killed was in mid-transfer, and what moved is told whole."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from aiodisagg.demo.kill import SAME_LOOKS, kill_in_mid_transfer
from aiodisagg.demo.view import moved_items, what_moved

pytestmark = pytest.mark.anyio


def item(arrived: int, *peers: str, kept: int = 0, moves: int = 0, encoded_s: float = -1.0) -> dict[str, Any]:
    complete_s = 1.0 if arrived == 9 else -1.0
    return {
        "rows": 9, "rows_arrived": arrived, "peers": list(peers), "moves": moves, "rows_kept": kept,
        "complete_s": complete_s, "encoded_s": encoded_s,
    }  # fmt: skip


def trace(*items: dict[str, Any], name: str = "demo-0", total_s: float = -1.0) -> dict[str, Any]:
    return {"request_id": name, "total_s": total_s, "items": list(items)}


class World:
    """Shows one look after the other, the last for ever, and notes between which of them something was done."""

    def __init__(self, *looks: list[dict[str, Any]]) -> None:
        self.looks = list(looks)
        self.done: list[str] = []

    async def look(self) -> list[dict[str, Any]]:
        self.done.append("look")
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def kill(self, name: str) -> None:
        self.done.append(f"kill {name}")

    def signal(self, name: str, number: signal.Signals) -> None:
        self.done.append(f"{number.name} {name}")


async def test_an_item_that_became_complete_after_the_look_is_no_reason_to_kill() -> None:
    """The look said five of nine rows; by the time of the kill all were here, and nothing else had begun to move."""
    half, complete = [trace(item(5, "a"), item(0, "a"))], [trace(item(9, "a"), item(0, "a"))]
    later = [trace(item(9, "a"), item(6, "a"))]
    world = World(half, *[complete] * SAME_LOOKS, later)
    assert await kill_in_mid_transfer(world, world.look) == "a"
    stop, go_on, looks = "SIGSTOP a", "SIGCONT a", ["look"] * SAME_LOOKS
    assert world.done == ["look", stop, *looks, go_on, "look", stop, *looks, "kill a"]


async def test_a_peer_goes_in_slow_motion_from_its_first_encoded_item_on() -> None:
    """Nothing is here yet at the first two stops: after each it runs for a moment only, without a look between."""
    encoded, half = [trace(item(0, "a", encoded_s=0.1))], [trace(item(2, "a", encoded_s=0.1))]
    world = World([trace(item(0, "a"))], encoded, *[encoded] * SAME_LOOKS, *[encoded] * SAME_LOOKS, half)
    assert await kill_in_mid_transfer(world, world.look) == "a"
    stop, go_on, looks = "SIGSTOP a", "SIGCONT a", ["look"] * SAME_LOOKS
    assert world.done == ["look", "look", stop, *looks, go_on, stop, *looks, go_on, stop, *looks, "kill a"]


async def test_rows_that_were_sent_before_the_stop_are_waited_for() -> None:
    looks = [[trace(item(arrived, "a"))] for arrived in (5, 5, 7, 8, 8)]
    world = World(*looks)
    assert await kill_in_mid_transfer(world, world.look) == "a"
    assert world.done.count("look") == 1 + 2 + SAME_LOOKS  # half, 5, 7, and 8 until it was seen often


async def test_other_peers_may_go_on_meanwhile() -> None:
    looks = [[trace(item(5, "a"), item(6, "a"), item(n % 9, "b"))] for n in range(9)]
    world = World(*looks)
    assert await kill_in_mid_transfer(world, world.look) == "a"
    assert world.done == ["look", "SIGSTOP a", *["look"] * SAME_LOOKS, "kill a"]


async def test_a_request_that_has_ended_owes_nothing() -> None:
    ended, going = trace(item(5, "b"), total_s=1.0), trace(item(5, "a"))
    world = World([ended], [ended, going])
    assert await kill_in_mid_transfer(world, world.look) == "a"


def test_items_that_moved_before_they_began_are_told_too() -> None:
    moved = moved_items([trace(item(9, "a", "b", moves=1), item(9, "b"))])
    assert what_moved("a", moved) == [
        "demo-0 image 1: stopped at 0 of 9 rows on a, went on with 9 on b",
        "a was killed: 1 items moved to b; 0 of their 9 rows were kept",
    ]


def test_an_item_that_moved_twice_is_told_by_its_last_move() -> None:
    moved = moved_items([trace(item(9, "b", "a", "b", kept=4, moves=2))])
    assert what_moved("a", moved)[0] == "demo-0 image 1: stopped at 4 of 9 rows on a, went on with 5 on b"
