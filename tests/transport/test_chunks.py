"""Lanes: turns, credit, and that a write ends only when nothing of it can move any more."""

from __future__ import annotations

from aiodisagg.transport.base import Slice
from aiodisagg.transport.chunks import Chunk, Lane, Outgoing, decode, encode

END = "ended"


def write(size_bytes: int, log: list[object], chunk_bytes: int = 10) -> Outgoing:
    return Outgoing([Slice(memoryview(bytes(size_bytes)), 0, 1)], chunk_bytes, lambda error: log.append(error or END))


def test_writes_take_turns_within_the_window() -> None:
    lane, log = Lane(window=3), []
    huge, small = write(100, log), write(5, log)
    lane.add(huge)
    lane.add(small)
    sent = [lane.next() for _ in range(4)]
    assert [turn and turn[2] for turn in sent] == [huge, small, huge, None]
    assert lane.waiting
    assert lane.placed(1)
    assert log == [END]
    assert lane.next()[:1] == (3,)  # type: ignore[index]
    assert lane.next() is None


def test_a_failed_write_ends_with_its_last_answer() -> None:
    lane, log = Lane(window=2), []
    one = write(50, log)
    lane.add(one)
    lane.next(), lane.next()
    assert lane.rejected(0, ValueError("no"))
    assert lane.next() is None, "nothing more is sent"
    assert log == []
    assert lane.placed(1)
    assert [repr(error) for error in log] == ["ValueError('no')"]


def test_a_write_ends_only_when_its_memory_is_let_go() -> None:
    lane, log = Lane(window=2), []
    one = write(5, log)
    lane.add(one)
    lane.next()
    one.hold()
    lane.placed(0)
    assert log == []
    one.drop()
    assert log == [END]


def test_a_lost_connection_ends_every_write_once_and_keeps_the_first_error() -> None:
    lane, log = Lane(window=1), []
    cancelled, waiting = write(50, log), write(50, log)
    lane.add(cancelled)
    lane.next()
    lane.add(waiting)
    cancelled.fail(TimeoutError("cancelled"))
    assert log == []
    lane.fail(ConnectionError("lost"))
    lane.fail(ConnectionError("again"))
    assert [repr(error) for error in log] == ["ConnectionError('lost')", "TimeoutError('cancelled')"]
    assert not lane.waiting
    assert lane.next() is None


def test_made_up_answers_are_noticed() -> None:
    lane, log = Lane(window=4), []
    lane.add(write(5, log))
    lane.next()
    assert not lane.placed(7)
    assert not lane.rejected(-1, ValueError())
    assert lane.placed(0)
    assert not lane.placed(0)
    assert log == [END]


def test_words_survive_the_wire_and_nonsense_is_none() -> None:
    word = Chunk(session=2**61, number=3, offset=4, size_bytes=5, lease=6)
    assert decode(encode(word)) == word
    for data in (
        b"",
        b"\xff\xff",
        encode(["chunk", 1]),
        encode(["chunk", "a", 1, 1, 1, 1]),
        encode({"x": 1}),
        encode(word)[:-1],
    ):
        assert decode(data) is None
