"""Sets of half-open integer ranges, the arithmetic of progress."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Span = tuple[int, int]
MOST_SPANS = 4096
"""In a message. Adding so many in any order takes milliseconds. A ledger has few more than a window has blocks."""


class RangeSet:
    """A mutable set of non-negative integers kept as sorted, disjoint, non-adjacent half-open spans."""

    __slots__ = ("_starts", "_stops")

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in spans:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> int:
        """Adds ``[start, stop)``; returns how many integers were new. Raises ValueError unless 0 <= start <= stop."""
        if not 0 <= start <= stop:
            raise ValueError(f"not a range: [{start}, {stop})")
        if start == stop:
            return 0
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        before = sum(self._stops[i] - self._starts[i] for i in range(first, last))
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]
        return stop - start - before

    def remove(self, start: int, stop: int) -> int:
        """Removes ``[start, stop)``; returns how many integers were there."""
        if start >= stop:
            return 0
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        if first >= last:
            return 0
        kept: list[Span] = []
        if self._starts[first] < start:
            kept.append((self._starts[first], start))
        if self._stops[last - 1] > stop:
            kept.append((stop, self._stops[last - 1]))
        before = sum(self._stops[i] - self._starts[i] for i in range(first, last))
        self._starts[first:last] = [a for a, _ in kept]
        self._stops[first:last] = [b for _, b in kept]
        return before - sum(b - a for a, b in kept)

    def covers(self, start: int, stop: int) -> bool:
        """Is every integer of ``[start, stop)`` in the set?"""
        if start >= stop:
            return True
        i = bisect_right(self._starts, start) - 1
        return i >= 0 and self._stops[i] >= stop

    def overlaps(self, start: int, stop: int) -> bool:
        """Is any integer of ``[start, stop)`` in the set?"""
        i = bisect_right(self._stops, start)
        return start < stop and i < len(self._starts) and self._starts[i] < stop

    def gaps(self, start: int, stop: int) -> Iterator[Span]:
        """The spans of ``[start, stop)`` that are not in the set, in order."""
        i = bisect_right(self._stops, start)
        while start < stop:
            if i >= len(self._starts) or self._starts[i] >= stop:
                yield start, stop
                return
            if self._starts[i] > start:
                yield start, self._starts[i]
            start = self._stops[i]
            i += 1

    def first_gap(self, start: int, stop: int) -> Span | None:
        """The first of ``gaps``."""
        i = bisect_right(self._stops, start)
        if i < len(self._starts) and self._starts[i] <= start:
            start = self._stops[i]
            i += 1
        if start >= stop:
            return None
        return start, min(stop, self._starts[i]) if i < len(self._starts) else stop

    def front(self) -> int:
        """Length of the contiguous run that begins at 0."""
        return self._stops[0] if self._starts and self._starts[0] == 0 else 0

    def spans(self) -> tuple[Span, ...]:
        return tuple(zip(self._starts, self._stops, strict=True))

    def told(self) -> tuple[Span, ...]:
        """The first ones, as many as a message may say."""
        return tuple(zip(self._starts[:MOST_SPANS], self._stops[:MOST_SPANS], strict=True))

    def copy(self) -> RangeSet:
        other = RangeSet()
        other._starts, other._stops = self._starts.copy(), self._stops.copy()
        return other

    def clear(self) -> None:
        self._starts.clear()
        self._stops.clear()

    def __len__(self) -> int:
        """How many integers are in the set."""
        return sum(self._stops) - sum(self._starts)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and self.spans() == other.spans()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return "{" + ", ".join(f"[{a},{b})" for a, b in self.spans()) + "}"
