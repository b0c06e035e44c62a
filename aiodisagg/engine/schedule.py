"""Which tokens of which requests the next step computes. Pure: no torch, no clock, no locks, one owner.

Theory. A request is a row of ``total = prompt + generated`` tokens of which ``computed`` have their keys and values in
the pool. Prefill, decode and computing again after a preemption are one thing: move ``computed`` towards ``total``;
the step that reaches it samples the next token. A decode is the case in which one token is missing.

* Seniority is the order of arrival and never changes. Admission is strictly by seniority, the victim of a preemption
  is always the newest running request, so **every running request is older than every waiting one** and the oldest
  is never preempted: it always gets on, and by induction everybody finishes.
* Admission reserves the pages of everything known (prompt, and what a preempted request had generated), so a prefill
  never stops for lack of pages while rows arrive. Decodes take further pages one at a time and preempt for them. A
  newcomer leaves one page for each running request, or the next few decodes would throw it out again.
* A prefill never passes ``front``, the contiguous part of the prompt whose rows are here. A request that waits for
  rows keeps its pages and costs nothing else.
* What a request needs first may be in pages already (:mod:`~aiodisagg.engine.pages`): admission shares them and the
  request begins behind them. At least its last token is computed, whose logits are wanted. Rows of the shared part
  need not come, so the front begins behind it. Where it is then, only who holds the rows knows: whoever drives this
  says so after each admission (a request beyond its front waits until then), and again after a preemption, since the
  pages may be gone when the request comes back; until then it has no front.
* Fairness inside the token budget: decodes first; of the rest the oldest prefill gets at least half, so a stream of
  short prompts cannot starve a long one, and what remains goes to who needs least to finish, so a long prompt does not
  hold up short ones. ``max_running <= token_budget`` leaves at least one token for prefill whenever there is one.
* Beside decodes the budget is what :class:`~aiodisagg.engine.pace.Pace` allows, so a burst of prompts does not stop
  running streams; without decodes nobody waits for a token and a step is as large as it may be.
* A few ready rows that more rows will follow are left for a later step, together with those, as long as a step has
  other work: a chunk costs a read of its whole past. A step without other work computes what is there unless being a
  step at all costs more than its tokens (reading the weights of a large model): the rest may come meanwhile. Nobody
  starves and no timer is needed: what is ready only grows, and the last rows of a prompt are never left.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from aiodisagg.engine.pace import Pace, StepShape
from aiodisagg.engine.pages import Pages


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``[start, stop)`` of one request; ``samples``: the last one gives the request's next token."""

    request_id: str
    start: int
    stop: int
    samples: bool

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Step:
    """What to compute next, decodes before prefills. Without segments nothing can be done until something arrives."""

    segments: tuple[Segment, ...]
    admitted: tuple[str, ...]
    """Requests that hold pages since this step, those that come back from a preemption included."""
    preempted: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Request:
    request_id: str
    order: int
    prompt: int
    front: int
    keys: Sequence[bytes]
    generated: int = 0
    computed: int = 0
    reused: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.prompt + self.generated

    @property
    def missing(self) -> int:
        return self.total - self.computed

    @property
    def decodes(self) -> bool:
        return self.generated > 0 and self.missing == 1

    @property
    def complete(self) -> bool:
        """All rows of the prompt are here."""
        return self.front >= self.prompt

    @property
    def ready(self) -> int:
        """Tokens that could be computed now."""
        return max((self.total if self.complete else self.front) - self.computed, 0)


class Scheduler:
    """The request table and the page accounts.

    Args:
        num_pages, page_size: the KV pool.
        token_budget: most tokens of a step.
        max_running: most requests with pages; capped by ``token_budget``.
        overlap: prefill what has arrived of a prompt; else a prefill begins when all of its rows are here.
        coalesce_tokens: fewer ready tokens than that, with more to follow, wait while a step has other work.
        pace: bounds the prefill beside decodes; None: the token budget alone does.
    """

    def __init__(
        self, *, num_pages: int, page_size: int, token_budget: int, max_running: int, overlap: bool = True,
        coalesce_tokens: int = 0, pace: Pace | None = None,
    ) -> None:  # fmt: skip
        self.pages = Pages(num_pages)
        self.page_size = page_size
        self.token_budget = token_budget
        self.max_running = min(max_running, token_budget)
        self.tokens_reused = 0
        """Tokens that admitted requests found in pages, ever."""
        self.hits = 0
        """Admissions that found at least one page."""
        self._overlap, self._coalesce, self._pace = overlap, coalesce_tokens, pace
        self._requests: dict[str, _Request] = {}
        self._running: list[_Request] = []  # both by seniority
        self._waiting: list[_Request] = []
        self._arrivals = 0

    def __repr__(self) -> str:
        free = f"{self.pages.free}/{self.pages.count} pages free"
        return f"<Scheduler {len(self._running)} running, {len(self._waiting)} waiting, {free}>"

    @property
    def running(self) -> tuple[str, ...]:
        return tuple(r.request_id for r in self._running)

    @property
    def waiting(self) -> tuple[str, ...]:
        return tuple(r.request_id for r in self._waiting)

    @property
    def only_decodes(self) -> bool:
        """Whether the next step would do nothing but decode: nobody can be admitted, and no prompt can go on."""
        return bool(self._running) and not self._worthwhile(True) and not self._admissible()

    def pages_of(self, request_id: str) -> list[int]:
        """Pages in the order of the request's tokens; empty while it waits. Not to be changed by the caller."""
        return self._requests[request_id].pages

    def reused(self, request_id: str) -> int:
        """Tokens at the beginning of a running request that it found in pages when it was last admitted."""
        return self._requests[request_id].reused

    def largest(self) -> int:
        """Tokens of the longest request that can ever run. The last token of an answer needs no page."""
        return self.pages.count * self.page_size + 1

    def add(self, request_id: str, prompt: int, max_tokens: int, front: int, keys: Sequence[bytes] = ()) -> None:
        """A new request, the newest of all. ValueError if it is known, empty, or longer than :meth:`largest`.

        ``keys``: of its full pages, in order; the caller lets them grow as tokens are sampled. Pages without a key are
        neither found nor shared.
        """
        if request_id in self._requests:
            raise ValueError(f"request {request_id} is known already")
        if prompt < 1 or max_tokens < 1 or prompt + max_tokens > self.largest():
            raise ValueError(f"request {request_id}: {prompt} + {max_tokens} tokens, {self.largest()} are the most")
        request = _Request(request_id, self._arrivals, prompt, front, keys)
        self._arrivals += 1
        self._requests[request_id] = request
        self._waiting.append(request)

    def set_front(self, request_id: str, front: int) -> None:
        """The first ``front`` prompt tokens can be computed or are in pages. It moves back by a preemption only."""
        request = self._requests[request_id]
        request.front = max(request.front, front)

    def advance(self, segment: Segment, *, sampled: bool) -> None:
        """A segment of the last step is computed; ``sampled``: the request got a token."""
        request = self._requests[segment.request_id]
        request.computed = segment.stop
        if sampled:
            request.generated += 1
        for i in range(segment.start // self.page_size, min(segment.stop // self.page_size, len(request.keys))):
            self.pages.publish(request.pages[i], request.keys[i])

    def remove(self, request_id: str, *, spoilt: bool = False) -> None:
        """Finished, failed or cancelled: the pages are free at once. An unknown request is ignored.

        ``spoilt``: nobody new shall share what its pages hold.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        (self._running if request in self._running else self._waiting).remove(request)
        if spoilt:
            self.pages.forget(request.pages)
        self.pages.give_back(request.pages)

    def plan_step(self) -> Step:
        """The next step. Takes pages, admits and preempts as the theory above says."""
        preempted: list[str] = []
        decodes = self._plan_decodes(preempted)
        # A victim does not come back in the same step: somebody has taken one of its pages.
        admitted = self._admit()
        prefills = self._plan_prefills(decodes)
        return Step((*decodes, *prefills), tuple(admitted), tuple(preempted))

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _plan_decodes(self, preempted: list[str]) -> list[Segment]:
        segments = []
        for request in tuple(self._running):
            if not request.decodes or not request.pages:
                continue
            if self._pages_for(request.total) > len(request.pages):
                while not self.pages.free and request.pages:
                    preempted.append(self._preempt_newest())
                if not request.pages:
                    continue
                request.pages += self.pages.take(1)
            segments.append(Segment(request.request_id, request.computed, request.total, samples=True))
        return segments

    def _preempt_newest(self) -> str:
        victim = self._running.pop()
        self.pages.give_back(victim.pages)
        victim.pages = []
        if victim.reused:
            victim.front = 0
        victim.computed = victim.reused = 0
        bisect.insort(self._waiting, victim, key=lambda r: r.order)
        return victim.request_id

    def _admissible(self) -> tuple[_Request, list[int]] | None:
        """Who is admitted next, and the pages that it shares; None: nobody waits, or must wait for others to end."""
        if not self._waiting or len(self._running) >= self.max_running:
            return None
        request = self._waiting[0]
        # At least the last token is computed.
        found = self.pages.find(request.keys[: (request.total - 1) // self.page_size])
        needed = self._pages_for(request.total) - len(found) + self.pages.idle_among(found)
        if needed + len(self._running) > self.pages.free and (self._running or needed > self.pages.free):
            return None
        return request, found

    def _admit(self) -> list[str]:
        admitted = []
        while (first := self._admissible()) is not None:
            request, found = first
            self.pages.share(found)
            request.pages = found + self.pages.take(self._pages_for(request.total) - len(found))
            request.computed = request.reused = len(found) * self.page_size
            self.hits += bool(found)
            self.tokens_reused += request.reused
            self._running.append(self._waiting.pop(0))
            admitted.append(request.request_id)
        return admitted

    def _plan_prefills(self, decodes: Sequence[Segment]) -> list[Segment]:
        prefills = self._worthwhile(bool(decodes))
        if not prefills:
            return []
        budget = self.token_budget - len(decodes)
        if self._pace is not None and decodes:
            furthest = max(r.computed for r in prefills)
            budget = self._pace.prefill_beside(StepShape.of(decodes), furthest, budget)
        granted = {prefills[0].request_id: min(prefills[0].ready, -(-budget // 2))}
        budget -= granted[prefills[0].request_id]
        for request in sorted(prefills, key=lambda r: (r.missing, r.order)):
            before = granted.get(request.request_id, 0)
            more = min(request.ready - before, budget)
            granted[request.request_id] = before + more
            budget -= more
        return [
            Segment(r.request_id, r.computed, r.computed + n, samples=r.computed + n == r.total)
            for r in prefills
            if (n := granted[r.request_id])
        ]

    def _worthwhile(self, busy: bool) -> list[_Request]:
        """Running requests with prefill to do now, by seniority; ``busy``: the step has decodes."""
        able = [r for r in self._running if r.ready and not r.decodes and (r.complete or self._overlap)]
        large = [r for r in able if r.complete or r.ready >= self._coalesce]
        if busy or any(r.complete for r in able):
            return large
        return [r for r in able if self._pace.worth(r.ready)] if self._pace is not None else large or able
