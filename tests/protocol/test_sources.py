"""What a sender keeps: one encode per digest, bounded bytes, a cache afterwards."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aiodisagg.protocol.events import CancelEncode, DropSource, StartEncode
from aiodisagg.protocol.messages import ItemKey
from aiodisagg.protocol.sources import SourceTable

from . import truth
from .lists import KEY, OTHER, want

A, B = ("L", KEY), ("L", OTHER)


def done(table: SourceTable, digest: str) -> None:
    source = table.get(digest)
    assert source is not None
    table.ready(source, source.job.rows)


def started(actions: list[Any]) -> list[str]:
    return [action.digest for action in actions if isinstance(action, StartEncode)]


def test_only_what_is_whole_is_told_of_as_held() -> None:
    table = SourceTable(1000, 1, 1000)
    source = table.acquire(want(), A)
    assert source is not None and not list(table.newest())
    table.admit()
    table.ready(source, source.job.rows - 1)
    assert not list(table.newest())
    done(table, "item-2")
    assert list(table.newest()) == ["item-2"]


def test_one_encode_serves_everybody() -> None:
    table = SourceTable(1000, 1, 1000)
    first = table.acquire(want(), A)
    assert table.acquire(want(OTHER), B) is first and table.hits == 1
    assert started(table.admit()) == ["item-2"] and table.admit() == []
    assert table.release("item-2", A) == []
    assert isinstance(table.release("item-2", B)[0], CancelEncode)
    assert table.release("item-2", B) == [], "cancelled once"


def test_without_media_nothing_can_be_made_but_what_is_there_serves() -> None:
    table = SourceTable(1000, 1, 1000)
    assert table.acquire(want(media=None), A) is None and len(table) == 0
    source = table.acquire(want(), A)
    assert table.acquire(want(OTHER, media=None), B) is source


def test_what_was_encoded_stays_until_room_is_needed_oldest_first() -> None:
    table = SourceTable(16, 1, 1000)
    for number, user in ((2, A), (4, A)):
        digest = truth.digest_of(number)
        table.acquire(want(number=number), user)
        assert started(table.admit()) == [digest]
        done(table, digest)
        table.release(digest, user)
    table.acquire(want(number=2), B)  # used again: now the newest, and in use
    table.acquire(want(number=3), A)
    actions = table.admit()
    assert actions[0] == DropSource("item-4") and started(actions) == ["item-3"] and table.used_bytes == 15


def test_a_source_as_large_as_the_capacity_goes_in_alone() -> None:
    table = SourceTable(24, 1, 1000)
    table.acquire(want(number=1), A)
    table.acquire(want(number=7), B)
    assert started(table.admit()) == ["item-1"]
    done(table, "item-1")
    assert table.admit() == [], "item-1 is still in use"
    table.release("item-1", A)
    actions = table.admit()
    assert actions[0] == DropSource("item-1") and started(actions) == ["item-7"]


def test_the_cache_is_not_dropped_for_what_does_not_fit_yet() -> None:
    table = SourceTable(24, 1, 1000)
    for number, user in ((2, A), (4, B)):  # one cached, one in use
        table.acquire(want(number=number), user)
        table.admit()
        done(table, truth.digest_of(number))
    table.release("item-2", A)
    table.acquire(want(number=7), A)
    assert table.admit() == [] and table.get("item-2") is not None
    table.release("item-4", B)
    assert table.admit()[:2] == [DropSource("item-2"), DropSource("item-4")]


def test_a_queued_job_that_nobody_wants_is_never_started() -> None:
    table = SourceTable(4, 1, 1000)
    table.acquire(want(number=7), A)
    table.admit()
    table.acquire(want(number=1), B)
    assert table.admit() == [] and table.release("item-1", B) == [] and len(table) == 1


@given(st.randoms(use_true_random=False))
def test_any_traffic_stays_within_its_bounds(random: Random) -> None:
    """Random wants, releases, ends: bytes are counted right and bounded; used rows are never dropped."""
    table = SourceTable(40, 1, 18)
    users: set[tuple[tuple[str, ItemKey], str]] = set()
    running: set[str] = set()
    for step in range(60):
        actions: list[Any] = []
        match random.randrange(5):
            case 0:
                number = random.randrange(len(truth.GRIDS))
                user = ("L", ItemKey(step, 0))
                table.acquire(want(user[1], number=number), user)
                users.add((user, truth.digest_of(number)))
            case 1 if table._aside:
                digest = random.choice(sorted(table._aside))
                user = min(table._sources[digest].users)
                if table.acquire(want(user[1], number=int(digest[-1]), media=None), user) is None:
                    assert table.acquire(want(user[1], number=int(digest[-1])), user) is not None
                    assert digest not in table._aside
            case 2 if users:
                user, digest = random.choice(sorted(users))
                users.discard((user, digest))
                actions = table.release(digest, user)
            case 3 if running:
                digest = random.choice(sorted(running))
                running.discard(digest)
                source = table.get(digest)
                assert source is not None
                done(table, digest)
            case 4 if running:
                digest = random.choice(sorted(running))
                running.discard(digest)
                told, actions = table.stopped(digest)
                users = {(user, what) for user, what in users if user not in told}
        for action in actions + table.admit():
            if isinstance(action, StartEncode):
                running.add(action.digest)
            elif isinstance(action, DropSource):
                source = table.get(action.digest)
                assert action.digest not in running or (source is not None and source.started)
        sources = [source for digest in {d for _, d in users} if (source := table.get(digest)) is not None]
        assert all(source.users for source in sources)
        alive = [table._sources[digest] for digest in table._sources if table._sources[digest].started]
        assert table.used_bytes == sum(source.size_bytes for source in alive)
        waiting = [source.patches for source in table._sources.values() if not source.complete]
        assert table.waiting_patches == sum(waiting)
        assert table.used_bytes <= 40 and table._idle_bytes == sum(one.size_bytes for one in alive if one.idle)
        assert table.file_bytes == sum(source.file_bytes for source in table._sources.values()) <= 18
