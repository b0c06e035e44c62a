"""The receiver's blocks: who may write where, and when a block may be lent again.

A pool is one stretch of registered memory cut into blocks of a fixed number of rows. A block is lent for a range of
rows of one item to one peer under a *lease*, a number that is never used twice and that nobody else can guess. Its
upper bits count the lends, so that a late word is told from an invented one; the lower ``TAG_BITS`` are a keyed hash of
the count. Where this side places the bytes (``stream``, ``zmq``, ``memory``) it tells who may write where, by the lease
alone and not by who writes (``admits``). Where the writer does (``ipc``, ``mooncake``), nothing stops one that leaves
its blocks: these are for peers that are trusted with the whole pool, and what it commits is checked all the same.
Rules, in the order in which they were learned by others the hard way:

* A block is free again only when (a) the writer reported every row of it, or (b) the lend was revoked and the writer
  is *fenced* (it said that nothing moves any more, or it is gone) and no copy of this side is under way; and in either
  case nobody reads it (``pins``).
  A revoked, unfenced block is quarantined: it belongs to nobody.
* Rows in a revoked block stay usable until then: a chunk whose commit was lost can still be taken (``kept``).
* One peer never gets all that others need: it may be stopped, and its blocks then stay quarantined until it runs again
  (``most``). With one peer linked there are no others, and it may have every block.
* What was committed is being read, or was: nothing more is admitted there.
* Everything about a lend is found by its lease, and every lend is forgotten when its block is freed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field
from hashlib import blake2b

from aiodisagg.protocol.messages import Chunk, ItemKey, Lend
from aiodisagg.protocol.ranges import RangeSet

TAG_BITS = 40
COUNTS = 1 << 22


@dataclass(slots=True)
class LentBlock:
    """One lend. ``spent``: rows that writer and reader are done with; ``pins``: takes reading it now."""

    lend: Lend
    owner: ItemKey
    peer: str
    epoch: int
    size_bytes: int
    spent: RangeSet = field(default_factory=RangeSet)
    pins: int = 0
    committed: int = 0
    """Rows from the block's first one up to the last that its writer said are written."""
    revoked: bool = False
    fenced: bool = False
    kept: bool = False
    """Revoked, but its owner may still learn that rows in it were written."""

    @property
    def done(self) -> bool:
        return self.spent.covers(self.lend.start, self.lend.stop)

    def pin(self, chunk: Chunk) -> None:
        """It is written, and a take begins to read it."""
        self.pins += 1
        self.committed = max(self.committed, chunk.stop - self.lend.start)


class BlockPool:
    """Accounting of the pool's blocks. Pure; not thread-safe, except that ``admits`` may be called from any thread.

    Args:
        blocks: how many blocks there are.
        rows_per_block: rows in each.
        row_bytes: bytes of a packed row.
        secret: up to 64 random bytes, without which leases can be guessed.
    """

    def __init__(self, blocks: int, rows_per_block: int, row_bytes: int, secret: bytes = b"") -> None:
        if min(blocks, rows_per_block, row_bytes) <= 0:
            raise ValueError(f"not a pool: {blocks} blocks of {rows_per_block} rows of {row_bytes} bytes")
        self.blocks, self.rows_per_block, self.row_bytes = blocks, rows_per_block, row_bytes
        self._free = list(range(blocks - 1, -1, -1))
        self._secret, self._lends = secret, 0
        self._lent: dict[int, LentBlock] = {}
        self._held: Counter[str] = Counter()
        """Blocks by peer, in quarantine or not."""
        self._lent_to: dict[str, dict[ItemKey, dict[int, LentBlock]]] = {}
        """By peer and item, and then by lease."""

    @property
    def block_bytes(self) -> int:
        return self.rows_per_block * self.row_bytes

    @property
    def size_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def free(self) -> int:
        """Blocks that can be lent now."""
        return len(self._free)

    @property
    def quarantined(self) -> int:
        """Blocks whose lend was revoked but whose writer is not fenced yet."""
        return sum(1 for block in self._lent.values() if block.revoked and not block.fenced)

    def lend(self, owner: ItemKey, peer: str, epoch: int, start: int, stop: int) -> LentBlock:
        """Lends a free block for the rows ``[start, stop)``, at most ``rows_per_block`` of them.

        Raises:
            IndexError: no block is free.
        """
        if not 0 < stop - start <= self.rows_per_block:
            raise ValueError(f"[{start}, {stop}) does not fit a block of {self.rows_per_block} rows")
        block = self._free.pop()
        self._lends += 1
        lease = self._lease(self._lends)
        lend = Lend(lease=lease, offset=block * self.block_bytes, start=start, stop=stop)
        lent = LentBlock(lend, owner, peer, epoch, (stop - start) * self.row_bytes)
        self._lent[lease] = lent
        self._held[peer] += 1
        self._lent_to.setdefault(peer, {}).setdefault(owner, {})[lease] = lent
        return lent

    def _lease(self, number: int) -> int:
        tag = blake2b(number.to_bytes(8, "big"), digest_size=TAG_BITS // 8, key=self._secret).digest()
        return number % COUNTS << TAG_BITS | int.from_bytes(tag, "big")

    def held(self, peer: str) -> int:
        """Blocks that a peer has, in quarantine or not."""
        return self._held[peer]

    def most(self, linked: Set[str]) -> int:
        """Who holds fewer may be lent a free block: up to an equal part, and more while a quarter stays for others.

        What peers without a link hold is nobody's to share: ``linked`` is who may be lent blocks now.
        """
        usable = self.blocks - sum(self._held[other] for other in self._held.keys() - linked)
        return self.blocks if self.free > max(1, usable // 4) else max(1, usable // max(1, len(linked)))

    def get(self, lease: int) -> LentBlock | None:
        """The lend, or None if it ended or never was."""
        return self._lent.get(lease)

    def issued(self, lease: int) -> bool:
        """Was this lease ever given out? Tells a late word from an invented one."""
        number = self._lends - (self._lends - (lease >> TAG_BITS)) % COUNTS  # the last one of this count
        return number > 0 and lease == self._lease(number)

    def admits(self, offset: int, size_bytes: int, lease: int) -> bool:
        """May ``size_bytes`` be placed at ``offset`` under ``lease`` now? The gate of receiver-placed transports."""
        lent = self._lent.get(lease)
        if lent is None or lent.revoked or size_bytes < 0:
            return False
        start, stop = lent.lend.offset + lent.committed * self.row_bytes, lent.lend.offset + lent.size_bytes
        return start <= offset and offset + size_bytes <= stop

    def wrong(self, chunk: Chunk, owner: ItemKey, peer: str) -> str:
        """Why this peer cannot have written this chunk for this item, or "". What ended may be spoken of late."""
        lent = self._lent.get(chunk.lease)
        if lent is None:
            return "" if self.issued(chunk.lease) else f"lease {chunk.lease} was never given"
        if lent.owner != owner or lent.peer != peer:
            return f"lease {chunk.lease} is not for it"
        inside = lent.lend.start <= chunk.start < chunk.stop <= lent.lend.stop
        return "" if inside else f"{chunk} is outside {lent.lend}"

    def lent_to(self, peer: str, owner: ItemKey | None = None) -> list[LentBlock]:
        """The lends of a peer's incarnation, all of an item together, or those for one item; oldest first."""
        by_owner = self._lent_to.get(peer, {})
        if owner is not None:
            return list(by_owner.get(owner, {}).values())
        return [block for blocks in by_owner.values() for block in blocks.values()]

    def settle(self, lent: LentBlock) -> bool:
        """Frees the block if the rules allow; returns whether it did. Call after every change of a lend."""
        if lent.pins or not (lent.done or (lent.revoked and lent.fenced and not lent.kept)):
            return False
        if self._lent.pop(lent.lend.lease, None) is None:
            return False
        self._free.append(lent.lend.offset // self.block_bytes)
        by_owner = self._lent_to[lent.peer]
        del by_owner[lent.owner][lent.lend.lease]
        if not by_owner[lent.owner]:
            del by_owner[lent.owner]
        self._held[lent.peer] -= 1
        if not self._held[lent.peer]:
            del self._held[lent.peer], self._lent_to[lent.peer]
        return True

    def __repr__(self) -> str:
        lent = len(self._lent)
        return f"<BlockPool {self.free} free, {lent - self.quarantined} lent, {self.quarantined} quarantined>"
