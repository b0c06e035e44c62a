"""What a tower may do beside running streams: the slack that an inter-token budget leaves. Pure.

Theory
------
A peer that decodes and encodes owes its streams a pace. Each engine step that decodes *earns* the tower time, each
sub-batch *spends* what it really took; while something is earned, the next sub-batch may begin:

* a step of ``step_s`` earns what the budget leaves of it, ``inter_token_s - step_s``, and at least ``share * step_s``:
  encoding goes on however slow the streams are, because the next streams wait for it;
* a step's time is the time that passed. Where tower and engine share a core or a device, a running sub-batch slows the
  steps it overlaps, and these earn less; where they do not, nothing is slowed and the tower hardly ever waits;
* nothing is hoarded: at most one budget's worth. What a long sub-batch overdrew is earned back before the next one.

So over any ``n`` steps in a row the tower works at most ``(n + 1)`` times what one step may earn, and one sub-batch:
two tokens of a stream are apart by a step and, now and then, one sub-batch. Hence sub-batches are small.

When no stream decodes there is nobody to slow down: the tower runs freely, and earned and owed time are forgotten.
"""

from __future__ import annotations

SHARE = 0.5
"""Of a step's own time, earned at least."""
SHARE_OF_ONE_DEVICE = 0.25
"""The same where tower and engine have one device: for streams that are slower than their pace without any tower."""


class Slack:
    """The account. ``inter_token_s``: time between two tokens of a stream that is good enough."""

    def __init__(self, inter_token_s: float, *, share: float = SHARE) -> None:
        if inter_token_s <= 0 or share <= 0:
            raise ValueError("the budget and the share must be above zero, or nothing would ever be encoded")
        self.inter_token_s, self.share = inter_token_s, share
        self.decodes = 0
        """Streams that got a token in the last step."""
        self.earned_s = 0.0
        """Below zero: owed."""

    def __repr__(self) -> str:
        return f"<Slack {self.decodes} decodes, {self.earned_s * 1e3:.1f} of {self.inter_token_s * 1e3:g} ms>"

    @property
    def free(self) -> bool:
        """Whether a sub-batch may begin."""
        return not self.decodes or self.earned_s > 0

    def stepped(self, step_s: float, decodes: int) -> None:
        """A step with so many decodes took ``step_s``; 0 decodes: it had none, or the engine has nothing to do."""
        self.decodes = decodes
        if not decodes:
            self.earned_s = 0.0
            return
        earned = max(self.inter_token_s - step_s, self.share * step_s)
        self.earned_s = min(self.earned_s + earned, max(self.inter_token_s, earned))

    def spent(self, tower_s: float) -> None:
        """A sub-batch took ``tower_s``."""
        if self.decodes:
            self.earned_s -= tower_s
