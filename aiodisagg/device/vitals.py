"""Whether a thread that computes is of any use still: if it is not, its process has to be started anew.

A device that is broken for good (a sticky CUDA error) fails whatever is tried, while the thread that tries goes on; and
a thread that a bug has ended tries nothing. What is bad itself proves neither: it fails alone, once or again and again,
and others work after it. So something that is known to be good is tried after each failure: who sends bad ones must not
be able to end a peer, and one that has broken the device must not be taken to the next one as if nothing had happened.
Want of memory is another thing: what is small finds some where nothing else does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

LIMIT = 8
"""So many different ones for which there was no memory, and nothing that worked between them: there is none."""


class Vitals:
    """Told by the thread; ``why`` may be read on any.

    Args:
        lost: called on the thread with ``why`` when nothing more is to be expected of it.
    """

    def __init__(self, lost: Callable[[str], object]) -> None:
        self._lost = lost
        self._failed: dict[str, bool] = {}
        """Whether it was for want of memory, by name."""
        self.why = ""
        """Why nothing is to be expected, by kind of error only: anybody may see it. Empty while it is of use."""

    def worked(self) -> None:
        if self._failed:
            self._failed.clear()
            self.why = ""

    def failed(self, name: str, error: Exception, probe: Callable[[], object]) -> None:
        """``name``: of what was tried, and nothing else with it. ``probe``: tries something good, and raises if it
        does not work either."""
        if self.why:
            return
        self._failed[name] = memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        count = len(self._failed)
        if memory and count < LIMIT:
            return
        try:
            if all(self._failed.values()):
                raise error
            probe()
        except Exception as ours:
            logger.error("what was tried failed, %d in a row, and so does what is good: %r", count, ours)
            self._lose(f"what it tried failed, {count} in a row, this one with {type(error).__name__}")
            return
        if count >= LIMIT:
            logger.warning("the last %d that were tried failed, the last one with %r; what is good works", LIMIT, error)
            self._failed.clear()

    def ended(self, error: BaseException) -> None:
        """The thread ends, and nobody asked it to."""
        self._lose(f"its thread ended with {type(error).__name__}")

    def _lose(self, why: str) -> None:
        self.why = why
        self._lost(why)
