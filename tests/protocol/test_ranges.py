"""RangeSet against a plain set of integers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiodisagg.protocol.ranges import RangeSet

SIZE = 40
edges = st.integers(0, SIZE)
spans = st.tuples(edges, edges).map(lambda pair: (min(pair), max(pair)))
steps = st.lists(st.tuples(st.sampled_from(["add", "remove"]), spans), max_size=12)


def built(script: list[tuple[str, tuple[int, int]]]) -> tuple[RangeSet, set[int]]:
    ranges, plain = RangeSet(), set[int]()
    for what, (start, stop) in script:
        numbers = set(range(start, stop))
        if what == "add":
            assert ranges.add(start, stop) == len(numbers - plain)
            plain |= numbers
        else:
            assert ranges.remove(start, stop) == len(numbers & plain)
            plain -= numbers
    return ranges, plain


@given(steps, spans)
def test_it_is_a_set_of_integers(script: list[tuple[str, tuple[int, int]]], asked: tuple[int, int]) -> None:
    ranges, plain = built(script)
    numbers = set(range(*asked))
    assert {n for a, b in ranges.spans() for n in range(a, b)} == plain
    assert len(ranges) == len(plain) and bool(ranges) == bool(plain)
    assert ranges.covers(*asked) == (numbers <= plain)
    assert ranges.overlaps(*asked) == bool(numbers & plain)
    assert {n for a, b in ranges.gaps(*asked) for n in range(a, b)} == numbers - plain
    assert ranges.first_gap(*asked) == next(iter(ranges.gaps(*asked)), None)
    assert ranges.front() == next(n for n in range(SIZE + 2) if n not in plain)


@given(steps)
def test_spans_are_sorted_disjoint_and_never_touch(script: list[tuple[str, tuple[int, int]]]) -> None:
    ranges, _ = built(script)
    flat = [edge for span in ranges.spans() for edge in span]
    assert flat == sorted(set(flat))
    assert ranges == RangeSet(ranges.spans())


@given(steps, spans)
def test_a_copy_is_its_own(script: list[tuple[str, tuple[int, int]]], more: tuple[int, int]) -> None:
    ranges, _ = built(script)
    before, other = ranges.spans(), ranges.copy()
    other.add(*more)
    other.clear()
    assert ranges.spans() == before and not other


@pytest.mark.parametrize("span", [(3, 2), (-1, 2)])
def test_what_is_no_range_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not a range"):
        RangeSet().add(*span)
