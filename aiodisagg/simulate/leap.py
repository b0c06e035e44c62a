"""The engine's scheduler, and many of its steps at once while nothing changes."""

from __future__ import annotations

from collections.abc import Sequence

from aiodisagg.engine.schedule import Scheduler, Segment


class LeapingScheduler(Scheduler):
    """:class:`~aiodisagg.engine.schedule.Scheduler` with a short cut that changes no decision.

    Theory. Between two steps that only decode, nothing that the scheduler looks at changes but the pages: contexts
    grow and free pages become fewer. So as long as no request ends, comes, or gets rows, and the pages last, the next
    steps decode for the same requests, admit nobody (who did not fit before fits less now) and preempt nobody. Time
    alone changes one thing: who becomes due may be the first in line from then on, and may fit (:attr:`next_due`).
    """

    def most_steps(self, segments: Sequence[Segment], limit: int) -> int:
        """Of the ``limit`` next steps of the planned ``segments``, all of them decodes: how many the pages last."""
        found = [self._requests[segment.request_id] for segment in segments]
        free = self.pages.free
        while limit > 1:
            wanted = sum(max(self._pages_for(r.total + limit - 1) - len(r.pages), 0) for r in found)
            if wanted <= free:
                break
            limit //= 2
        return limit

    def leap(self, segments: Sequence[Segment], steps: int) -> list[Segment]:
        """As if the step planned as ``segments`` had been computed and the following ones, ``steps`` in all, been
        planned; returns the last one's segments, which are still to be computed."""
        moved = []
        for segment in segments:
            request = self._requests[segment.request_id]
            request.computed += steps - 1
            request.generated += steps - 1
            more = self._pages_for(request.total) - len(request.pages)
            if more > 0:
                request.pages += self.pages.take(more)
            moved.append(Segment(segment.request_id, request.computed, request.total, samples=True))
        return moved

    @property
    def next_due(self) -> float:
        """No later than when the next one of those without pages becomes due."""
        return self._waiting.next_due

    def first_prefill(self, now: float) -> str | None:
        """The first in order of those whose prompt could be computed to its end now."""
        able = [r for r in self._running if r.complete and r.ready and not r.decodes]
        return min(able, key=lambda r: self._rank(r, now)).request_id if able else None

    def oldest_prefill(self) -> str | None:
        """The request that has waited longest of those with prompt tokens that could be computed now."""
        return next((r.request_id for r in self._running if r.ready and not r.decodes), None)
