"""Pages of the KV pool: who uses them, and which hold something that others may use too. Pure.

Theory. A page is blank, in use, or idle.

* *Blank* pages hold nothing of value. ``take`` makes one *in use* by exactly one request, its writer.
* ``publish`` gives a page in use a key when its content is final: all its tokens are computed, and nobody writes to it
  again while the key stands. The key says everything that the content depends on, so whoever wants that content may
  ``share`` the page instead of computing it; uses are counted. Of two pages with equal content the first is published,
  the second stays private: it is of use to its writer only.
* A page that nobody uses any more is blank again, or *idle* if it has a key: it can still be shared, and it is taken
  when blank pages run out, the longest unused first. So idle pages count as free, and a cache costs nobody anything.
* A request gives its pages back last page first: a page that continues another is of no use without it, so it has to
  be evicted before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class Pages:
    """Accounts of ``count`` pages. Errors of the caller (a page given back twice, published while free) raise
    ValueError and change nothing about that page."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.evictions = 0
        """Idle pages that were taken for something else, ever."""
        self._users = [0] * count
        self._keys: list[bytes | None] = [None] * count
        self._by_key: dict[bytes, int] = {}
        self._blank = list(range(count - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the longest unused first

    def __repr__(self) -> str:
        return f"<Pages {len(self._blank)} blank, {len(self._idle)} idle of {self.count}>"

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._blank) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that nobody uses and that can still be shared."""
        return len(self._idle)

    def take(self, count: int) -> list[int]:
        """Pages for a writer of its own. ValueError if fewer than ``count`` are free."""
        if count > self.free:
            raise ValueError(f"{count} pages wanted, {self.free} free")
        taken = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._unpublish(page)
        self.evictions += 1
        return page

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The published pages of the longest prefix of ``keys``; as yet they are nobody's to keep."""
        found = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def idle_among(self, pages: Iterable[int]) -> int:
        """How many of the pages sharing would take from the free ones."""
        return sum(page in self._idle for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """One more user for each of the published pages."""
        for page in pages:
            if self._keys[page] is None:
                raise ValueError(f"page {page} is not published")
            self._idle.pop(page, None)
            self._users[page] += 1

    def publish(self, page: int, key: bytes) -> None:
        """The page's content is final. No effect if another page has the key, or this one has one, already."""
        if not self._users[page]:
            raise ValueError(f"page {page} is free")
        if self._keys[page] is None and key not in self._by_key:
            self._keys[page] = key
            self._by_key[key] = page

    def forget(self, pages: Iterable[int]) -> None:
        """Nobody new shall share the pages: what they hold is not what their keys say."""
        for page in pages:
            self._unpublish(page)
            if page in self._idle:
                del self._idle[page]
                self._blank.append(page)

    def give_back(self, pages: Sequence[int]) -> None:
        """One user less for each of a request's pages, which come in the order of its tokens."""
        for page in reversed(pages):
            if not self._users[page]:
                raise ValueError(f"page {page} is free already")
            self._users[page] -= 1
            if self._users[page]:
                continue
            if self._keys[page] is None:
                self._blank.append(page)
            else:
                self._idle[page] = None

    def _unpublish(self, page: int) -> None:
        key = self._keys[page]
        if key is not None:
            del self._by_key[key]
            self._keys[page] = None
