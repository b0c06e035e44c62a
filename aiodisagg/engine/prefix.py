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

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from aiodisagg.models.base import PromptPlan

_KEY_BYTES = 16


class PageKeys:
    """Keys of one request's full pages, in order, in ``keys``, which grows with the answer."""

    def __init__(self, plan: PromptPlan, page_size: int) -> None:
        self._page_size = page_size
        self.keys: list[bytes] = []
        full = plan.tokens // page_size * page_size
        pieces = _pieces(plan, page_size)
        piece = next(pieces, None)
        for start in range(0, plan.tokens, page_size):
            said = b""
            while piece is not None and piece[0] == start:
                said += piece[1]
                piece = next(pieces, None)
            if start < full:
                stop = start + page_size
                self._append(plan.input_ids[start:stop], plan.positions[:, start:stop], said)
        # What the next page begins with.
        self._ids: list[int] = plan.input_ids[full:].tolist()
        self._positions: list[list[int]] = plan.positions[:, full:].tolist()
        self._said = said if full < plan.tokens else b""

    def __repr__(self) -> str:
        return f"<PageKeys {len(self.keys)} pages of {self._page_size}>"

    def grow(self, token: int, position: int) -> None:
        """The answer's next token, at ``position`` in all three rows."""
        self._ids.append(token)
        for row in self._positions:
            row.append(position)
        if len(self._ids) == self._page_size:
            self._append(np.array(self._ids), np.array(self._positions), self._said)
            self._ids, self._positions, self._said = [], [[], [], []], b""

    def _append(self, ids: np.ndarray, positions: np.ndarray, items: bytes) -> None:
        # Everything before ``items`` has a fixed length, so no two inputs are one string of bytes.
        key = blake2b(self.keys[-1] if self.keys else bytes(_KEY_BYTES), digest_size=_KEY_BYTES)
        key.update(ids.astype("<i8", copy=False).tobytes())
        key.update(positions.astype("<i8", copy=False).tobytes())
        key.update(items)
        self.keys.append(key.digest())


def _pieces(plan: PromptPlan, page_size: int) -> Iterator[tuple[int, bytes]]:
    """(first token of a page, what of an item begins or goes on in it), in the order of the prompt."""
    for item in plan.items:
        what = f"{item.digest} {item.kind} {item.grid_thw} {item.fps!r}"
        row = 0
        for start, stop in item.spans:
            at = start
            while at < stop:
                page = at // page_size * page_size
                end = min(stop, page + page_size)
                yield page, f"[{at - page}, {end - page}) is {what} from {row + at - start};".encode()
                at = end
            row += stop - start
