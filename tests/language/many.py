"""Linked encode peers that are nobody, and items to place at them."""

from __future__ import annotations

from aiodisagg.language.peers import EncodePeer
from aiodisagg.protocol.events import ItemSpec
from aiodisagg.protocol.messages import ItemKey


class Many:
    """So many linked peers."""

    def __init__(self, count: int) -> None:
        self.linked = [EncodePeer(f"unix:{i}", f"{i:02d}") for i in range(count)]

    def get(self, incarnation: str) -> EncodePeer | None:
        return next((peer for peer in self.linked if peer.incarnation == incarnation), None)

    by_incarnation = get


def item_of(number: int, digest: str = "") -> tuple[ItemKey, ItemSpec]:
    return ItemKey(number, 0), ItemSpec(digest or f"{number:032x}", "image", (1, 64, 64), 1024, 0.0, (b"file",))
