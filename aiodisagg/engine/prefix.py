"""Names for the pages of a request: equal names mean equal keys and values, whoever computed them. Pure.

Theory. What a page of a causal model holds is a function of the tokens up to its end: their ids, their positions, and
for visual tokens the rows that replace their embeddings. So the key of a page is a hash over the key of the page
before it, the page's ids, its positions in all three M-RoPE rows, and for each piece of an item in it the item's
digest, kind, grid and fps with the number of the first row. Ids alone are not enough: two images of one size have
equal ids and equal positions, and only their digests tell them apart; one image at two resolutions has equal bytes and
other positions. Digests are of what the item is made of, equal digests give equal rows on one model
(:class:`~aiodisagg.models.base.PlannedItem`), and one engine has one model.

Only full pages have keys. Blake2b keeps an attacker from making two pages with one key.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from aiodisagg.models.base import PromptPlan

_KEY_BYTES = 16


class PageKeys:
    """Keys of one request's full pages, in order, in ``keys``, which grows with the answer."""

    def __init__(self, plan: PromptPlan, page_size: int) -> None:
        self._page_size = page_size
        self.keys: list[bytes] = []
        pages = plan.tokens // page_size
        full = pages * page_size
        said = _items_of_pages(plan, page_size)
        # [pages, ids and three rows of positions, tokens of a page]
        numbers = np.concatenate([plan.input_ids[None], plan.positions])[:, :full].reshape(4, pages, page_size)
        told = numbers.transpose(1, 0, 2).astype("<i8").tobytes()
        size = len(told) // max(1, pages)
        for i in range(pages):
            self._append(told[i * size : (i + 1) * size], said.get(i, b""))
        # What the next page begins with.
        self._tail: list[list[int]] = [plan.input_ids[full:].tolist(), *plan.positions[:, full:].tolist()]
        self._said = said.get(pages, b"")

    def __repr__(self) -> str:
        return f"<PageKeys {len(self.keys)} pages of {self._page_size}>"

    def grow(self, token: int, position: int) -> None:
        """The answer's next token, at ``position`` in all three rows."""
        for row, number in zip(self._tail, (token, position, position, position), strict=True):
            row.append(number)
        if len(self._tail[0]) == self._page_size:
            self._append(np.array(self._tail, dtype="<i8").tobytes(), self._said)
            self._tail, self._said = [[], [], [], []], b""

    def _append(self, numbers: bytes, items: bytes) -> None:
        # All but ``items`` has a fixed length, so no two inputs are one string of bytes.
        before = self.keys[-1] if self.keys else bytes(_KEY_BYTES)
        self.keys.append(blake2b(before + numbers + items, digest_size=_KEY_BYTES).digest())


def _items_of_pages(plan: PromptPlan, page_size: int) -> dict[int, bytes]:
    """For each page that visual tokens lie in, which rows of which items they are."""
    said: dict[int, bytes] = {}
    for item in plan.items:
        what = f") is {item.digest} {item.kind} {item.grid_thw} {item.fps!r} from "
        row = 0
        for start, stop in item.spans:
            at = start
            while at < stop:
                page, offset = divmod(at, page_size)
                end = min(stop, (page + 1) * page_size)
                piece = f"[{offset}, {offset + end - at}{what}{row + at - start};".encode()
                said[page] = said[page] + piece if page in said else piece
                at = end
            row += stop - start
    return said
