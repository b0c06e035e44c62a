"""Short hands for tests that are lists of events: one machine, one event after another, what it asks for."""

from __future__ import annotations

from typing import Any, TypeVar

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms
from aiodisagg.protocol.blocks import BlockPool
from aiodisagg.protocol.incoming import NOBODY
from aiodisagg.protocol.meta import ItemMeta
from aiodisagg.protocol.receiving import Receiver, ReceiverConfig
from aiodisagg.protocol.rows import Region
from aiodisagg.protocol.sending import Sender, SenderConfig

from . import truth

T = TypeVar("T")
KEY, OTHER = ms.ItemKey(1, 0), ms.ItemKey(2, 0)
SIX = 2
"""Number of an image of six rows; 5 is a video of fifteen, 7 one of twenty-four."""


def only(actions: list[Any], kind: type[T]) -> T:
    """The one action (or sent message) of this type."""
    (found,) = every(actions, kind)
    return found


def every(actions: list[Any], kind: type[T]) -> list[T]:
    words = [action.message for action in actions if isinstance(action, ev.Send)]
    return [what for what in [*actions, *words] if isinstance(what, kind)]


class Receiving:
    """A receiver with its shell's answers one call away; time passes only when it is told to.

    ``copies``: leases under which the receiving side places bytes just now; of others it says at once that it does not.
    """

    def __init__(self, blocks: int = 4, rows_per_block: int = 2, **config: Any) -> None:
        self.pool = BlockPool(blocks, rows_per_block, truth.ROW_BYTES)
        self.machine = Receiver(truth.MODEL, self.pool, ReceiverConfig(**config))
        self.now = 0.0
        self.copies: set[int] = set()

    def do(self, event: Any, after_s: float = 0.0) -> list[Any]:
        self.now += after_s
        actions = self.machine.handle(event, self.now)
        for revoke in every(actions, ev.Revoke):
            if revoke.peer == NOBODY and self.copies.isdisjoint(revoke.leases):
                actions = [one for one in actions if one is not revoke] + self.do(ev.LeasesRevoked(revoke.leases))
        return actions

    def says(self, message: Any, peer: str = "A", after_s: float = 0.0) -> list[Any]:
        return self.do(ev.MessageReceived(peer, message), after_s)

    def request(
        self, key: ms.ItemKey = KEY, number: int = SIX, timeout_s: float = 60.0, meta: Any = frozenset()
    ) -> None:
        only(self.do(ev.ItemRequested(key, truth.spec(number, meta), timeout_s)), ev.Place)

    def place(self, key: ms.ItemKey = KEY, peer: str = "A") -> ms.Want:
        return only(self.do(ev.Placed(key, peer)), ms.Want)

    def offer(self, key: ms.ItemKey = KEY, peer: str = "A", ready: int | None = None, **extra: Any) -> list[Any]:
        """The current peer's offer in the current epoch; returns what is done about it."""
        item = self.machine.items[key]
        ready = item.spec.rows if ready is None else ready
        said: dict[str, Any] = {"needs_media": False, "written": ()} | extra
        return self.says(ms.Offer(key, item.epoch, item.spec.rows, truth.MODEL, ready=ready, **said), peer)

    def open(self, key: ms.ItemKey = KEY, number: int = SIX, peer: str = "A", **extra: Any) -> list[ms.Lend]:
        """Requests, places and offers an item; returns what is lent for it."""
        self.request(key, number, **extra)
        self.place(key, peer)
        return [lend for grant in every(self.offer(key, peer), ms.Grant) for lend in grant.lends]

    def commit(self, lend: ms.Lend, key: ms.ItemKey = KEY, peer: str = "A", **where: Any) -> list[Any]:
        """A commit of the lend (or of ``start``/``stop`` in it), in the current epoch."""
        chunk = ms.Chunk(lend.lease, where.get("start", lend.start), where.get("stop", lend.stop), 7)
        epoch = where.get("epoch", self.machine.items[key].epoch if key in self.machine.items else 1)
        return self.says(ms.Commit(key, epoch, chunk, self.meta(key, chunk)), peer)

    def meta(self, key: ms.ItemKey, chunk: ms.Chunk) -> ms.Meta | None:
        item = self.machine.items.get(key)
        if item is None or not item.spec.meta:
            return None
        true = truth.meta(item.spec.digest)
        whole = ItemMeta(true[Region.FILL_IDS], true[Region.MROPE], true[Region.AUX])
        return whole.cut(chunk.start, chunk.stop, tuple(item.spec.meta))

    def arrive(self, lend: ms.Lend, key: ms.ItemKey = KEY, peer: str = "A", **where: Any) -> list[Any]:
        """A commit that is taken at once."""
        take = only(self.commit(lend, key, peer, **where), ev.Take)
        return self.do(ev.RowsTaken(key, take.chunk))


class Sending:
    """A sender likewise."""

    def __init__(self, **config: Any) -> None:
        self.machine = Sender(truth.MODEL, SenderConfig(placeholders=truth.PLACEHOLDERS, **config))
        self.now = 0.0

    def do(self, event: Any, after_s: float = 0.0) -> list[Any]:
        self.now += after_s
        return self.machine.handle(event, self.now)

    def says(self, message: Any, peer: str = "L") -> list[Any]:
        return self.do(ev.MessageReceived(peer, message))

    def want(
        self, key: ms.ItemKey = KEY, epoch: int = 1, number: int = SIX, peer: str = "L", **other: Any
    ) -> list[Any]:
        return self.says(want(key, epoch, number, **other), peer)

    def ready(self, number: int = SIX, stop: int | None = None) -> list[Any]:
        rows = truth.rows_of(truth.GRIDS[number]) if stop is None else stop
        return self.do(ev.RowsReady(truth.digest_of(number), rows))

    def grant(
        self, *spans: tuple[int, int], key: ms.ItemKey = KEY, epoch: int = 1, first: int = 100, peer: str = "L",
        held: tuple[tuple[int, int], ...] = (),
    ) -> list[Any]:  # fmt: skip
        lends = tuple(ms.Lend(first + i, 1000 * i, a, b) for i, (a, b) in enumerate(spans))
        return self.says(ms.Grant(key, epoch, lends, held), peer)

    def wrote(self, write: ev.Write) -> list[Any]:
        chunk = ms.Chunk(write.lease, write.start, write.stop, 7)
        return self.do(ev.ChunkWritten(write.peer, write.key, write.epoch, chunk))


def want(key: ms.ItemKey = KEY, epoch: int = 1, number: int = SIX, **other: Any) -> ms.Want:
    spec = truth.spec(number)
    said: dict[str, Any] = {
        "digest": spec.digest, "kind": spec.kind, "grid_thw": spec.grid_thw, "rows": spec.rows, "fps": 0.0,
        "held": (), "meta": (), "model": truth.MODEL, "timeout_s": 60.0, "media": spec.media,
    }  # fmt: skip
    return ms.Want(key, epoch, **(said | other))
