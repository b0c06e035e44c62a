"""Who gets the next block: items in a line, found by their peers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from aiodisagg.protocol.messages import ItemKey


class Line:
    """Items that want a block, first come first.

    Those of a peer that may have none are passed over together: thousands may wait for one that has its share.
    """

    def __init__(self) -> None:
        self._peers: OrderedDict[ItemKey, str] = OrderedDict()
        self._by_peer: dict[str, OrderedDict[ItemKey, int]] = {}
        """Items of each peer, and their places: lower ones first."""
        self._places = 0

    def add(self, key: ItemKey, peer: str) -> bool:
        """Puts an item at the end; False: it stands here already, and keeps its place."""
        if key in self._peers:
            return False
        self._places += 1
        self._peers[key] = peer
        self._by_peer.setdefault(peer, OrderedDict())[key] = self._places
        return True

    def remove(self, key: ItemKey) -> None:
        """Does nothing if it is not here."""
        peer = self._peers.pop(key, None)
        if peer is not None:
            keys = self._by_peer[peer]
            del keys[key]
            if not keys:
                del self._by_peer[peer]

    def first(self, may: Callable[[str], bool]) -> ItemKey | None:
        """The first one whose peer may have a block."""
        for key, peer in self._peers.items():  # most often it is the very first
            if may(peer):
                return key
            break
        firsts = (next(iter(keys.items())) for peer, keys in self._by_peer.items() if may(peer))
        found = min(firsts, key=lambda each: each[1], default=None)
        return None if found is None else found[0]

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[ItemKey]:
        return iter(self._peers)

    def __contains__(self, key: object) -> bool:
        return key in self._peers
