"""What one item bears from its peers: how long, how often, and what comes of it.

Theory
------
What goes wrong is counted by what it says of whom:

* A question that is not answered, a ``Want`` without an ``Offer``: that process hangs, or nobody is at the other end.
  After ``max_stalls`` in a row another peer is asked.
* An attempt that brings nothing, an epoch without a row: its link was lost, its writes failed, or rows that exist do
  not come. Any peer has such a moment, and the next epoch goes on where it ended. After ``max_attempts`` in a row
  another peer is asked.
* A refusal says that this peer will not provide the item, so another is asked at once. If all refuse it, it is the
  item: after ``max_attempts`` in all it fails.
* Rows with a wrong checksum are asked for again. No peer is left for it, since a network or a memory that spoils bytes
  spoils those of others as well: after ``max_attempts`` in a row the item fails.

Only rows that arrive end the counts of attempts and checksums: a peer that answers each time and never delivers would
be believed for ever.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReceiverConfig:
    """Patience of a receiver; all times in seconds.

    ``failover_s``: how long a lost link may take to come back before another peer is asked. ``stall_s``: silence
    after which the peer is asked again. ``max_stalls``, ``max_attempts``: see the module's text.
    ``window_blocks``: blocks lent to one item at a time.
    """

    failover_s: float = 1.0
    stall_s: float = 5.0
    max_stalls: int = 2
    max_attempts: int = 4
    window_blocks: int = 4


@dataclass(slots=True)
class Patience:
    """The counts of one item. What counts a misfortune returns whether it was one too many."""

    config: ReceiverConfig
    unanswered: int = 0
    _fruitless: int = 0
    _refusals: int = 0
    _corrupt: int = 0

    def stalled(self) -> bool:
        """A question got no answer. True: ask another peer."""
        self.unanswered += 1
        return self.unanswered >= self.config.max_stalls

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

    def refused(self) -> bool:
        """A peer will not provide the item. True: nobody will."""
        self._refusals += 1
        return self._refusals >= self.config.max_attempts

    def spoiled(self) -> bool:
        """A checksum was wrong. True: give the item up."""
        self._corrupt += 1
        return self._corrupt >= self.config.max_attempts

    def rows_came(self) -> None:
        self._fruitless = self._corrupt = 0
