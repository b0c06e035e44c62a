"""What one item bears from its peers: how long, how often, and what comes of it.

Theory
------
What goes wrong is counted by what it says of whom:

* A question that is not answered, a ``Want`` without an ``Offer``: that process hangs, or nobody is at the other end.
  Or the item's files are on their way yet. After ``max_stalls`` in a row another peer is asked, and whoever is next has
  twice as long each time: files that take longer would never reach anybody.
* An attempt that brings nothing, an epoch without a row: its link was lost, its writes failed, or rows that exist do
  not come. Any peer has such a moment, and the next epoch goes on where it ended. After ``max_attempts`` in a row
  another peer is asked.
* Rows that are ready and lent blocks, and do not come: it is asked, in the same epoch, whether it is writing them. If
  not, that attempt brought nothing. If so, the network may be slow, or shared by many, and a new epoch would have the
  chunk begun once more: a network on which it takes longer than ``stall_s`` would never bring one. So it may go on, for
  ``max_attempts`` such questions, after which another peer may be quicker; whoever is next has twice as long each time.
* A write that fails may be the plane it went by, and the next one goes by another: the first is followed by the next
  epoch at once. Further ones are followed by pauses, each twice as long as the one before, whoever failed: where
  nothing can be written, the two sides would otherwise ask and fail as fast as they can talk. A peer that failed
  ``2 * max_attempts`` times cannot reach this process; chosen once more, since nobody else is there, it ends the item.
* A refusal says that this peer will not provide the item, so another is asked at once, one that was not asked yet if
  there is any. Whoever refuses it again was asked for want of another: after ``max_attempts`` in all it is the item,
  and it fails. So it does when ``2 * max_attempts`` different peers said the same of it, however many there are; of
  values that are not finite the second peer's word is enough. That a peer drains says nothing of the item.
* Rows with a wrong checksum are asked for again: a network spoils some. After ``max_attempts`` of one peer another is
  asked. If so many peers' rows come spoiled, or nobody else is there, it is this process or its network, and the item
  fails.
* Rows that came and could not be delivered are this process's own failure: no peer is left for it, and after
  ``max_attempts`` in a row the item fails.

Only rows that arrive end the counts of attempts, writes and checksums: a peer that answers each time and never
delivers would be believed for ever.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

NOT_FINITE = "not_finite"
"""Code of a refusal: the tower made values of the item that are not finite. One peer's device may do so by itself."""

NOT_OF_THE_ITEM = frozenset({"draining", "cancelled"})
"""Codes that say nothing of it, however many peers give them."""


@dataclass(frozen=True, slots=True)
class ReceiverConfig:
    """Patience of a receiver; all times in seconds.

    ``failover_s``: how long a lost link may take to come back before another peer is asked. ``stall_s``: silence
    after which the peer is asked again. ``max_stalls``, ``max_attempts``: see the module's text. ``pause_s``,
    ``max_pause_s``: between attempts after failed writes.
    ``window_blocks``: blocks lent to one item at a time.
    """

    failover_s: float = 1.0
    stall_s: float = 5.0
    max_stalls: int = 2
    max_attempts: int = 4
    pause_s: float = 0.1
    max_pause_s: float = 1.0
    window_blocks: int = 4


@dataclass(slots=True)
class Patience:
    """The counts of one item. What counts a misfortune returns whether it was one too many."""

    config: ReceiverConfig
    unanswered: int = 0
    _left_silent: int = 0
    """Peers that were left because they did not answer."""
    _fruitless: int = 0
    _slow: int = 0
    _left_slow: int = 0
    """Peers that were left because their writes took long."""
    _refusals: int = 0
    _refused_by: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """By code."""
    _undelivered: int = 0
    _spoiled: Counter[str] = field(default_factory=Counter)
    """By peer: wrong checksums since rows came."""
    _failed_writes: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By peer: how many since rows came, and what was said of the last one."""

    def stalled(self) -> bool:
        """A question got no answer. True: ask another peer; whoever is next has twice as long."""
        self.unanswered += 1
        if self.unanswered < self.config.max_stalls << min(self._left_silent, 30):
            return False
        self._left_silent += 1
        return True

    def answered(self) -> None:
        """The peer lives; also of a peer that was not asked yet."""
        self.unanswered = 0

    def fruitless(self) -> bool:
        """An attempt brought nothing. True: ask another peer, which begins with a clean record."""
        self._fruitless += 1
        if self._fruitless < self.config.max_attempts:
            return False
        self._fruitless = 0
        return True

    def slow(self) -> bool:
        """Rows are being written, and it takes long. True: ask another peer; whoever is next has twice as long."""
        self._slow += 1
        if self._slow < self.config.max_attempts << min(self._left_slow, 30):
            return False
        self._slow, self._left_slow = 0, self._left_slow + 1
        return True

    def write_failed(self, peer: str, why: str) -> float:
        """A write failed. Returns how long to wait before the next attempt, in seconds."""
        self._failed_writes[peer] = self._failed_writes.get(peer, (0, ""))[0] + 1, why
        earlier = sum(count for count, _ in self._failed_writes.values()) - 1
        if not earlier:
            return 0.0
        return float(min(self.config.pause_s * 2 ** min(earlier - 1, 30), self.config.max_pause_s))

    def cannot_write(self, peer: str) -> bool:
        """Its writes failed so often that it is not worth another attempt."""
        return self._failed_writes.get(peer, (0, ""))[0] >= 2 * self.config.max_attempts

    @property
    def why_unwritten(self) -> str:
        """What the peers said of their failed writes."""
        return "; ".join(f"{peer}: {why or 'it did not say why'}" for peer, (_, why) in self._failed_writes.items())

    def refused(self, peer: str, code: str) -> bool:
        """This peer will not provide the item. True: nobody will."""
        again = any(peer in peers for peers in self._refused_by.values())
        self._refused_by[code].add(peer)
        self._refusals += 1
        if again and self._refusals >= self.config.max_attempts:
            return True
        most = 2 if code == NOT_FINITE else 2 * self.config.max_attempts
        return code not in NOT_OF_THE_ITEM and len(self._refused_by[code]) >= most

    def spoiled(self, peer: str) -> bool:
        """A checksum of this peer's rows was wrong. True: ask another peer."""
        self._spoiled[peer] += 1
        return self._spoiled[peer] >= self.config.max_attempts

    def hopeless(self, peer: str) -> tuple[str, str] | None:
        """Why the item fails, as code and text, since nobody is left to ask but this peer; or None."""
        if self.cannot_write(peer):
            return "unreachable", f"no encode peer can write here: {self.why_unwritten}"
        most = self.config.max_attempts
        spoilers = [other for other, count in self._spoiled.items() if count >= most]
        if peer in spoilers or len(spoilers) >= most:
            return "corrupt", f"rows arrive with wrong checksums, from {', '.join(spoilers)}"
        return None

    def undelivered(self) -> bool:
        """Rows that came could not be delivered. True: give the item up."""
        self._undelivered += 1
        return self._undelivered >= self.config.max_attempts

    def rows_came(self) -> None:
        self._fruitless = self._slow = self._undelivered = 0
        self._spoiled.clear()
        self._failed_writes.clear()
