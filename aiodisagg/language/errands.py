"""What is on its way to be fetched, as placing sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from aiodisagg.language.peers import EncodePeer
from aiodisagg.protocol.events import ItemSpec
from aiodisagg.protocol.messages import ItemKey
from aiodisagg.scheduler.book import PeerBook
from aiodisagg.scheduler.cost import Size
from aiodisagg.scheduler.placement import Placement


@dataclass(slots=True)
class Errand:
    """An item that is fetched, or will be: from whom, and what was predicted."""

    spec: ItemSpec
    size: Size
    avoid: frozenset[str] = frozenset()
    """Peers that shall not have it at all: they are at it already."""
    planned: Placement | None = None
    trial: str = ""
    """A peer that was chosen because too little is seen of it, instead of the best that was known."""
    peer: EncodePeer | None = None
    """Whose address may lead to another process by now: ``last`` and ``book`` are of the one that was asked."""
    book: PeerBook[ItemKey] | None = None
    """Of ``last``, while it has to do with the item."""
    asked: float = 0.0
    refused: bool = False
    """By ``peer``."""
    last: str = ""
    """Incarnation of the peer that was asked last."""
    drained: set[str] = field(default_factory=set)
    """Peers that refused the item because they drain: they will not have it at all."""
    turned_away: float = -math.inf
    """When one of them did, last."""
    unsent: set[str] = field(default_factory=set)
    """Peers to which its media were to be sent, and were not."""
