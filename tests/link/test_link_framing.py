"""Frames come out the same however the bytes were cut up; anything else is a RemoteProtocolError."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiodisagg.errors import RemoteProtocolError
from aiodisagg.link import framing
from aiodisagg.link.framing import FrameReader

Frames = list[tuple[int, bytes]]


def read(reader: FrameReader, pieces: list[bytes]) -> Frames:
    """Feeds pieces the way a socket does."""
    out: Frames = []
    for piece in pieces:
        reader.feed(piece)
        while (frame := reader.next()) is not None:
            out.append((frame[0], bytes(frame[1])))
    return out


@st.composite
def cut_frames(draw: st.DrawFn) -> tuple[Frames, list[bytes]]:
    frames = draw(st.lists(st.tuples(st.integers(1, 6), st.binary(max_size=200)), max_size=12))
    stream = b"".join(framing.frame(kind, payload) for kind, payload in frames)
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    edges = [0, *cuts, len(stream)]
    return frames, [stream[a:b] for a, b in itertools.pairwise(edges)]


@given(cut_frames())
def test_any_split_gives_the_same_frames(cut: tuple[Frames, list[bytes]]) -> None:
    frames, pieces = cut
    assert read(FrameReader("p", 1000), pieces) == frames


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_garbage_gives_frames_or_a_protocol_error(pieces: list[bytes]) -> None:
    try:
        for kind, payload in read(FrameReader("p", 200), pieces):
            assert 1 <= kind <= 6
            assert len(payload) <= 200
    except RemoteProtocolError as error:
        assert error.peer == "p"


@pytest.mark.parametrize("kind", [0, 7, 255])
def test_unknown_kinds_are_refused(kind: int) -> None:
    with pytest.raises(RemoteProtocolError, match="unknown kind"):
        read(FrameReader("p", 100), [struct.pack(">IB", 1, kind)])


def test_a_frame_at_the_limit_passes_and_one_byte_more_does_not() -> None:
    assert read(FrameReader("p", 100), [framing.frame(3, b"x" * 100)]) == [(3, b"x" * 100)]
    with pytest.raises(RemoteProtocolError, match="101 bytes, 100 are allowed"):
        read(FrameReader("p", 100), [framing.header(3, 101)])


def test_frames_of_tens_of_mebibytes_among_small_ones() -> None:
    large = bytes(range(256)) * (48 * 4096)
    stream = framing.frame(4) + framing.frame(3, large) + framing.frame(5) + framing.frame(3, b"after")
    pieces = [stream[at : at + 65536] for at in range(0, len(stream), 65536)]
    kinds = read(FrameReader("p", len(large)), pieces)
    assert [(kind, len(payload)) for kind, payload in kinds] == [(4, 0), (3, len(large)), (5, 0), (3, 5)]
    assert kinds[1][1] == large


def test_memory_follows_what_arrived_and_not_what_was_promised() -> None:
    reader = FrameReader("p", 2**30)
    assert read(reader, [framing.header(3, 2**30) + b"x" * 1000]) == []
    assert reader._part is not None
    assert len(reader._part) == 1000
