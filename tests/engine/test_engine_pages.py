"""Accounts of pages: uses, what is published, and what goes first when room is needed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiodisagg.engine.pages import Pages


def key(number: int) -> bytes:
    return number.to_bytes(4, "little")


def test_pages_cannot_be_given_back_twice() -> None:
    pages = Pages(3)
    taken = pages.take(2)
    pages.give_back(taken)
    with pytest.raises(ValueError, match="free already"):
        pages.give_back(taken[:1])
    with pytest.raises(ValueError, match="4 pages wanted"):
        pages.take(4)
    with pytest.raises(ValueError, match="is free"):
        pages.publish(taken[0], key(1))
    with pytest.raises(ValueError, match="not published"):
        pages.share(taken[:1])


def test_only_a_prefix_is_found_and_sharing_it_takes_it_from_the_free_ones() -> None:
    pages = Pages(4)
    taken = pages.take(3)
    for page, number in zip(taken, (1, 2, 4), strict=True):
        pages.publish(page, key(number))
    assert pages.find([key(1), key(2), key(3), key(4)]) == taken[:2]
    pages.give_back(taken)
    assert (pages.free, pages.idle) == (4, 3)
    found = pages.find([key(1), key(2)])
    assert pages.idle_among(found) == 2
    pages.share(found)
    pages.share(found[:1])
    assert (pages.free, pages.idle, pages.idle_among(found)) == (2, 1, 0)
    pages.give_back(found)
    assert (pages.free, pages.idle) == (3, 2), "one still has a user"


def test_the_longest_unused_goes_first_and_of_one_request_its_end() -> None:
    pages = Pages(4)
    first, second = pages.take(2), pages.take(2)
    for number, page in enumerate(first + second):
        pages.publish(page, key(number))
    pages.give_back(first)
    pages.give_back(second)
    pages.share(first)  # used again: younger than the other two now
    pages.give_back(first)
    taken = [pages.take(1)[0] for _ in range(4)]
    assert taken == [second[1], second[0], first[1], first[0]]
    assert pages.evictions == 4 and pages.find([key(0)]) == []


def test_blank_pages_are_taken_before_anything_is_evicted() -> None:
    pages = Pages(3)
    kept = pages.take(1)
    pages.publish(kept[0], key(1))
    pages.give_back(kept)
    pages.take(2)
    assert pages.evictions == 0 and pages.find([key(1)]) == kept


def test_a_second_page_of_equal_content_stays_private() -> None:
    pages = Pages(2)
    one, two = pages.take(1), pages.take(1)
    pages.publish(one[0], key(1))
    pages.publish(two[0], key(1))
    assert pages.find([key(1)]) == one
    pages.give_back(two)
    assert (pages.free, pages.idle) == (1, 0)


def test_what_is_forgotten_is_not_found_and_free_when_nobody_uses_it() -> None:
    pages = Pages(2)
    taken = pages.take(2)
    for number, page in enumerate(taken):
        pages.publish(page, key(number))
    pages.give_back(taken[1:])
    pages.forget(taken)
    assert pages.find([key(0)]) == pages.find([key(1)]) == []
    assert (pages.free, pages.idle) == (1, 0)
    pages.give_back(taken[:1])
    assert (pages.free, pages.idle) == (2, 0)


class Model:
    """Holders of pages with what each of their pages must hold, and a pool that is written to."""

    def __init__(self, count: int) -> None:
        self.pages = Pages(count)
        self.held: list[tuple[list[int], list[int]]] = []  # (pages, content each of them has for its holder)
        self.content: dict[int, int] = {}
        self.writers: dict[int, int] = {}
        self.released: list[int] = []  # pages in the order in which they were last given back
        self.published: dict[int, int] = {}  # content -> page

    def open(self, chain: list[int]) -> None:
        """As a request does: share what is found, take and write the rest, publish it."""
        found = self.pages.find([key(c) for c in chain])
        new = len(chain) - len(found)
        if new + self.pages.idle_among(found) > self.pages.free:
            return
        idle = [page for page in self.released if page in self.published.values()]
        self.pages.share(found)
        taken = self.pages.take(new)
        in_use = {page for pages, _ in self.held for page in pages}
        assert not in_use & set(taken) and not set(found) & set(taken), "a page that is used was taken"
        evicted = [page for page in idle if page in taken]
        others = [page for page in idle if page not in taken and page not in found]
        assert not evicted or all(idle.index(a) < idle.index(b) for a in evicted for b in others), "not the oldest"
        for page in taken:
            for content in [c for c, p in self.published.items() if p == page]:
                del self.published[content]
        self.released = [page for page in self.released if page not in found and page not in taken]
        for page, content in zip(taken, chain[len(found) :], strict=True):
            self.content[page] = content
            self.pages.publish(page, key(content))
            self.published.setdefault(content, page)
        self.held.append((found + taken, chain))

    def close(self, number: int) -> None:
        pages, _ = self.held.pop(number)
        self.pages.give_back(pages)
        in_use = {page for others, _ in self.held for page in others}
        for page in reversed(pages):
            if page not in in_use:
                self.released.append(page)

    def check(self) -> None:
        for pages, chain in self.held:
            assert len(set(pages)) == len(pages)
            assert [self.content[page] for page in pages] == chain, "somebody wrote to a page of another"
        used = {page for pages, _ in self.held for page in pages}
        assert len(used) + self.pages.free == self.pages.count
        for content, page in self.published.items():
            assert self.pages.find([key(content)]) == [page]


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 8),
    steps=st.lists(
        st.one_of(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(0, 7)), max_size=40
    ),
)  # fmt: skip
def test_nobody_loses_a_page_or_reads_what_another_wrote(count: int, steps: list[list[int] | int]) -> None:
    """A chain's contents are prefixes, as chained keys make them: equal content means an equal beginning."""
    model = Model(count)
    for step in steps:
        if isinstance(step, int):
            if step < len(model.held):
                model.close(step)
        else:
            model.open([int("".join(str(1 + n) for n in step[: i + 1])) for i in range(len(step))])
        model.check()
    while model.held:
        model.close(0)
        model.check()
    assert model.pages.free == count
