"""Text as tokens come: whole characters, stop strings held back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiodisagg.engine.detokenize import AnswerText, IncrementalText, StopStrings


def decode_bytes(ids: Sequence[int]) -> str:
    """Token i is byte i: the worst byte-level vocabulary there is."""
    return bytes(ids).decode("utf-8", errors="replace")


def decode_words(ids: Sequence[int]) -> str:
    """Like sentencepiece: a text's first word loses its leading space."""
    return "".join(f" w{i}" for i in ids)[1:]


@settings(deadline=None)  # a busy machine is no finding
@given(st.one_of(st.text(max_size=60).map(str.encode), st.binary(max_size=80)))
@example("a\ufffdb".encode())
@example(b"\xe4\xb8" * 40)
def test_pieces_add_up_and_hold_no_unfinished_character(data: bytes) -> None:
    text = IncrementalText(decode_bytes)
    given_out = ""
    for i, byte in enumerate(data):
        given_out += text.feed(byte)
        assert decode_bytes(data).startswith(given_out), f"after byte {i} something unfinished was shown"
    assert given_out + text.finish() == decode_bytes(data)
    assert text.finish() == ""


def test_a_character_of_four_tokens_comes_out_with_its_last_one() -> None:
    text = IncrementalText(decode_bytes)
    assert [text.feed(b) for b in "é😀!".encode()] == ["", "é", "", "", "", "😀", "!"]


def test_long_answers_decode_a_window_only() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_words(ids)

    text = IncrementalText(decode)
    out = "".join(text.feed(i) for i in range(500)) + text.finish()
    assert out == decode_words(range(500))
    assert longest < 40


def decode_all(ids: Sequence[int]) -> str:
    """Bytes, tokens of several bytes, a token of the text U+FFFD, and special ones without a text."""
    wide = {256: "→é".encode(), 257: "😀".encode()[1:], 258: "a中".encode()[:3], 259: b"\xef\xbf\xbd"}
    return b"".join(wide.get(i, b"") if i > 255 else bytes([i]) for i in ids).decode("utf-8", errors="replace")


_ONE = st.integers(0, 261).map(lambda token: [token])
_RUN = st.tuples(st.sampled_from([0x80, 0xE4, 0xF0, 0xC0, 0x41, 256, 257, 258, 259, 300]), st.integers(1, 70))


@settings(deadline=None)  # a busy machine is no finding
@given(st.lists(st.one_of(_ONE, _RUN.map(lambda run: [run[0]] * run[1])), max_size=9))
@example([[0xF0], [300] * 200, list("😀".encode())[1:]])
@example([[259] * 60, [300] * 60, [0x80] * 60, [0xF0] * 60, list("😀".encode())[1:]])
def test_after_each_token_all_is_given_that_the_full_text_says_for_certain(runs: list[list[int]]) -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_all(ids)

    text, ids, given_out = IncrementalText(decode), list[int](), ""
    for token in [token for run in runs for token in run]:
        ids.append(token)
        given_out += text.feed(token)
        whole = decode_all(ids)
        assert given_out == whole.removesuffix("\ufffd")
    assert given_out + text.finish() == decode_all(ids)
    assert longest < 80


def test_a_character_that_is_unfinished_where_the_window_is_cut() -> None:
    for before in range(40, 60):
        text = IncrementalText(decode_bytes)
        data = b"\x80" * before + "😀é中".encode()
        assert "".join(text.feed(byte) for byte in data) == decode_bytes(data)


@pytest.mark.parametrize("token", [0x80, 0xF0, 259])
def test_an_answer_that_is_never_whole_decodes_a_window_only(token: int) -> None:
    """It was decoded anew from its beginning with each token: seconds of the step thread, which serves all requests."""
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_all(ids)

    text = IncrementalText(decode)
    out = "".join(text.feed(token) for _ in range(1000)) + text.finish()
    assert out == "\ufffd" * 1000
    assert longest < 60


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["hello STOP world"], ["STOP"], "hello "),
        (["hello S", "TO", "P world"], ["STOP"], "hello "),
        (["aab", "aab", "aac!"], ["aabaac"], "aab"),  # a failed match hides the beginning of the real one
        (["one two"], ["two", "one"], ""),  # the first to end wins, not the first of the list
        (["x日", "本", "語y"], ["本語"], "x日"),
        (["ab", "ab"], ["abc"], "abab"),  # held back, then shown at the end
    ],
)
def test_stop_strings(pieces: list[str], stops: list[str], shown: str) -> None:
    found = StopStrings(stops)
    parts = [found.feed(piece) for piece in pieces]
    parts.append(found.finish())
    assert "".join(parts) == shown
    assert found.stopped == any(stop in "".join(pieces) for stop in stops)


@settings(deadline=None)  # a busy machine is no finding
@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_stop_strings_do_not_depend_on_where_pieces_end(text: str, stops: list[str], size: int) -> None:
    found = StopStrings(stops)
    shown = ""
    for i in range(0, len(text), size):
        shown += found.feed(text[i : i + size])
        assert not any(stop in shown for stop in stops)
    shown += found.finish()
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(ends)[1]] if ends else text)


def test_a_stop_string_inside_split_characters() -> None:
    answer = AnswerText(decode_bytes, ["→é"])
    shown = ""
    for byte in "ab→éz".encode():
        if answer.stopped:
            break
        shown += answer.feed(byte)
    assert answer.stopped and shown == "ab"


def test_what_is_held_is_shown_at_the_end() -> None:
    answer = AnswerText(decode_bytes, ["xyz"])
    shown = "".join(answer.feed(b) for b in b"axy\xe4")
    assert shown == "a"
    assert answer.finish() == "xy\ufffd"
