"""Which tokens of which requests the next step computes. Pure: no torch, no clock, no locks, one owner.

Theory. A request is a row of ``total = prompt + generated`` tokens of which ``computed`` have their keys and values in
the pool. Prefill, decode and computing again after a preemption are one thing: move ``computed`` towards ``total``;
the step that reaches it samples the next token. A decode is the case in which one token is missing.

* Who goes first is said by :mod:`~aiodisagg.scheduler.order`, for pages and for prompt tokens alike. What a request
  still needs is counted in tokens: those to be computed, and those whose rows are not here once more, for the tower.
  Who has got a token has waited, so it is due: it goes by arrival, before all that wait for a first one.
* Admission takes the first in order, and if that does not fit, nobody. It reserves the pages of everything known
  (prompt, and what a preempted request had generated), so a prefill never stops for lack of pages while rows arrive.
  Decodes take further pages one at a time and preempt for them. A newcomer leaves one page for each running request,
  or the next few decodes would throw it out again.
* The victim of a preemption is the last in order of all that run: who has got no token yet before who has. Nobody is
  preempted for ever: a decode takes a page only to compute a token, and who gives way to itself has got one since it
  was admitted, so **each preemption is paid for with a token**; they are finitely many for finitely many requests. And
  of those that are due nobody gives way to one that came later, so with newcomers without end the oldest still gets
  on, and by induction everybody finishes.
* A prefill never passes ``front``, the contiguous part of the prompt whose rows are here. A request that waits for
  rows keeps its pages and costs nothing else.
* What a request needs first may be in pages already (:mod:`~aiodisagg.engine.pages`): admission shares them and the
  request begins behind them. At least its last token is computed, whose logits are wanted. Rows of the shared part
  need not come, so the front begins behind it. Where it is then, only who holds the rows knows: whoever drives this
  says so after each admission (a request beyond its front waits until then), and again after a preemption, since the
  pages may be gone when the request comes back; until then it has no front.
* Inside the token budget decodes go first and prefills follow in order, each with all that it can compute. Short first
  is of use only if who goes first need not wait for the others all the same: those behind one that gets its first token
  in a step may make that step twice as long, and no longer.
  ``max_running <= token_budget`` leaves at least one token for prefill whenever there is one. A stream of short prompts
  cannot starve a long one, as that one is due in the end. A prompt that is over what a step has room for, for
  whatever reason, by an eighth of that at most is computed to its end: a further step would cost more than that.
* On an accelerator steps up to a size are graphs, and larger ones are launched, which takes longer by more than a
  further step would. So prompts that go along behind another do not make a step larger than a graph.
* Beside decodes the budget is what :class:`~aiodisagg.engine.pace.Pace` allows, so a burst of prompts does not stop
  running streams; without decodes nobody waits for a token and a step is as large as it may be.
* A few ready rows that more rows will follow are left for a later step, together with those, as long as a step has
  other work: a chunk costs a read of its whole past. A step without other work is begun if the prompt is computed
  sooner by it (:mod:`~aiodisagg.scheduler.pieces`), should the rest come as what came until now; what is late then is
  looked at again. As long as none has come, it is begun if being a step at all (reading the weights of a large model)
  costs less than its tokens. Nobody starves: what is ready only grows, and the last rows of a prompt are never left.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from aiodisagg.engine.arrivals import Arrivals
from aiodisagg.engine.pace import Pace, StepShape
from aiodisagg.engine.pages import Pages
from aiodisagg.scheduler.order import Claim, Order, Queue, Rank


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
    prefills: bool = False
    """There are others than decodes among the segments."""
    again_s: float = math.inf
    """Without segments: when to plan again if nothing arrives, since what is waited for is late then."""


@dataclass(slots=True, eq=False)
class _Request:
    request_id: str
    order: int
    prompt: int
    front: int
    keys: Sequence[bytes]
    due: float
    priority: int
    generated: int = 0
    computed: int = 0
    reused: int = 0
    pages: list[int] = field(default_factory=list)
    stops: Sequence[int] = ()
    """Where the front can stand before the prompt's end, ascending; more is not known to be wrong."""
    arrivals: Arrivals | None = None
    """Of rows, since it got its pages."""

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
    def claim(self) -> Claim:
        due = -math.inf if self.generated else self.due
        return Claim(
            self.order, due, self.priority, self.missing + max(0, self.prompt - max(self.front, self.computed))
        )

    @property
    def complete(self) -> bool:
        """All rows of the prompt are here."""
        return self.front >= self.prompt

    @property
    def ready(self) -> int:
        """Tokens that could be computed now."""
        return max((self.total if self.complete else self.front) - self.computed, 0)

    def expected(self, now: float) -> tuple[list[tuple[float, int]], float]:
        """As :meth:`Arrivals.expected`, until all rows are here."""
        if self.arrivals is None:
            return [], math.inf
        stops = [stop for stop in self.stops if self.front < stop < self.prompt]
        return self.arrivals.expected(stops, self.prompt, now)


def most_tokens(room: int) -> int:
    """Of a step with room for so many, if a prompt ends by that."""
    return room + room // 8


class Scheduler:
    """The request table and the page accounts.

    Args:
        num_pages, page_size: the KV pool.
        token_budget: most tokens of a step, but for the end of a prompt (:func:`most_tokens`).
        max_running: most requests with pages; capped by ``token_budget``.
        overlap: prefill what has arrived of a prompt; else a prefill begins when all of its rows are here.
        coalesce_tokens: fewer ready tokens than that, with more to follow, wait while a step has other work.
        pace: bounds the prefill beside decodes; None: the token budget alone does.
        order: of requests for pages and for prompt tokens.
    """

    def __init__(
        self, *, num_pages: int, page_size: int, token_budget: int, max_running: int, overlap: bool = True,
        coalesce_tokens: int = 0, pace: Pace | None = None, order: Order = Order.SHORT_FIRST,
    ) -> None:  # fmt: skip
        self.pages = Pages(num_pages)
        self.page_size = page_size
        self.token_budget = token_budget
        self.max_running = min(max_running, token_budget)
        self.tokens_reused = 0
        """Tokens that admitted requests found in pages, ever."""
        self.replayed = 0
        """Tokens of the largest step that is a graph; 0: there are none."""
        self.hits = 0
        """Admissions that found at least one page."""
        self._overlap, self._coalesce, self._pace = overlap, coalesce_tokens, pace
        self._requests: dict[str, _Request] = {}
        self._order = order
        self._running: list[_Request] = []  # by arrival
        self._waiting: Queue[_Request] = Queue(order)
        self._arrivals = 0

    def __repr__(self) -> str:
        free = f"{self.pages.free}/{self.pages.count} pages free"
        return f"<Scheduler {len(self._running)} running, {len(self._waiting)} waiting, {free}>"

    @property
    def running(self) -> tuple[str, ...]:
        return tuple(r.request_id for r in self._running)

    @property
    def waiting(self) -> tuple[str, ...]:
        """By arrival."""
        return tuple(r.request_id for r in sorted(self._waiting, key=lambda r: r.order))

    def pages_of(self, request_id: str) -> list[int]:
        """Pages in the order of the request's tokens; empty while it waits. Not to be changed by the caller."""
        return self._requests[request_id].pages

    def reused(self, request_id: str) -> int:
        """Tokens at the beginning of a running request that it found in pages when it was last admitted."""
        return self._requests[request_id].reused

    def largest(self) -> int:
        """Tokens of the longest request that can ever run. The last token of an answer needs no page."""
        return self.pages.count * self.page_size + 1

    def add(
        self, request_id: str, prompt: int, max_tokens: int, front: int, keys: Sequence[bytes] = (), *,
        due: float = -math.inf, priority: int = 0, stops: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """A new request, the newest of all. ValueError if it is known, empty, or longer than :meth:`largest`.

        ``stops``: where the front can stand as rows arrive, ascending.

        ``keys``: of its full pages, in order; the caller lets them grow as tokens are sampled. Pages without a key are
        neither found nor shared. ``due``, on the clock of :meth:`plan_step`, and ``priority``: see
        :class:`~aiodisagg.scheduler.order.Claim`.
        """
        if request_id in self._requests:
            raise ValueError(f"request {request_id} is known already")
        if prompt < 1 or max_tokens < 1 or prompt + max_tokens > self.largest():
            raise ValueError(f"request {request_id}: {prompt} + {max_tokens} tokens, {self.largest()} are the most")
        request = _Request(request_id, self._arrivals, prompt, front, keys, due, priority, stops=stops)
        self._arrivals += 1
        self._requests[request_id] = request
        self._waiting.add(request, request.claim)

    def set_front(self, request_id: str, front: int, now: float | None = None) -> None:
        """The first ``front`` prompt tokens can be computed or are in pages. It moves back by a preemption only.

        ``now``: since when, on the clock of :meth:`plan_step`; None: no rows had to come for it.
        """
        request = self._requests[request_id]
        if front > request.front:
            request.front = front
            if request.arrivals is not None:
                request.arrivals.begins_at(front) if now is None else request.arrivals.moved(front, now)
            if not request.pages:
                self._waiting.remove(request)
                self._waiting.add(request, request.claim)

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
        if request.pages:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        if spoilt:
            self.pages.forget(request.pages)
        self.pages.give_back(request.pages)

    def plan_step(self, now: float, *, whole: bool = False) -> Step:
        """The next step. Takes pages, admits and preempts as the theory above says. ``now`` does not go back.

        ``whole``: no prompt is begun, or goes on, before all of its rows are here.
        """
        preempted: list[str] = []
        decodes = self._plan_decodes(now, preempted)
        # A victim does not come back in the same step: somebody has taken one of its pages.
        admitted = self.admit(now)
        worth, again_s = self._worthwhile(bool(decodes), {s.request_id for s in decodes}, now)
        able = [r for r in worth if r.complete or not whole]
        prefills = self._plan_prefills(now, decodes, able) if able else []
        return Step((*decodes, *prefills), tuple(admitted), tuple(preempted), bool(prefills), again_s)

    def _rank(self, request: _Request, now: float) -> Rank:
        return self._order.rank(request.claim, now)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _plan_decodes(self, now: float, preempted: list[str]) -> list[Segment]:
        segments = []
        for request in tuple(self._running):
            if not request.decodes or not request.pages:
                continue
            if self._pages_for(request.total) > len(request.pages):
                while not self.pages.free and request.pages:
                    # Never one that is planned already: it came earlier, and who decodes goes by arrival.
                    preempted.append(self._preempt(max(self._running, key=lambda r: self._rank(r, now))))
                if not request.pages:
                    continue
                request.pages += self.pages.take(1)
            segments.append(Segment(request.request_id, request.computed, request.total, samples=True))
        return segments

    def _preempt(self, victim: _Request) -> str:
        self._running.remove(victim)
        self.pages.give_back(victim.pages)
        victim.pages = []
        if victim.reused:
            victim.front = 0
        victim.computed = victim.reused = 0
        victim.arrivals = None
        self._waiting.add(victim, victim.claim)
        return victim.request_id

    def _admissible(self, now: float) -> tuple[_Request, list[int]] | None:
        """Who is admitted next, and the pages that it shares; None: nobody waits, or must wait for others to end."""
        request = self._waiting.first(now)
        if request is None or len(self._running) >= self.max_running:
            return None
        # At least the last token is computed.
        found = self.pages.find(request.keys[: (request.total - 1) // self.page_size])
        needed = self._pages_for(request.total) - len(found) + self.pages.idle_among(found)
        if needed + len(self._running) > self.pages.free and (self._running or needed > self.pages.free):
            return None
        return request, found

    def admit(self, now: float) -> list[str]:
        """Gives pages to those that wait, as far as there are some, and returns who they are. A part of
        :meth:`plan_step`; also for between a plan and the ``advance`` of its segments."""
        admitted = []
        while (first := self._admissible(now)) is not None:
            request, found = first
            self.pages.share(found)
            request.pages = found + self.pages.take(self._pages_for(request.total) - len(found))
            request.computed = request.reused = len(found) * self.page_size
            request.arrivals = Arrivals(now, max(request.front, request.reused))
            self.hits += bool(found)
            self.tokens_reused += request.reused
            self._waiting.remove(request)
            bisect.insort(self._running, request, key=lambda r: r.order)
            admitted.append(request.request_id)
        return admitted

    def _plan_prefills(self, now: float, decodes: Sequence[Segment], prefills: Sequence[_Request]) -> list[Segment]:
        budget = self.token_budget - len(decodes)
        if self._pace is not None and decodes:
            furthest = max(r.computed for r in prefills)
            budget = self._pace.prefill_beside(StepShape.of(decodes), furthest, budget)
        segments: list[Segment] = []
        room = budget
        for request in sorted(prefills, key=lambda r: self._rank(r, now)):
            most = most_tokens(room)
            if segments and self.replayed:
                left = self.replayed - len(decodes) - sum(segment.tokens for segment in segments)
                room, most = min(room, left), min(most, left)
            if room < 1 or not request.ready:
                break
            tokens = min(request.ready, room)
            if request.complete and request.missing <= most:
                tokens = request.missing
            stop = request.computed + tokens
            segments.append(Segment(request.request_id, request.computed, stop, samples=stop == request.total))
            budget, room = budget - segments[-1].tokens, room - segments[-1].tokens
            if segments[-1].samples and self._order is Order.SHORT_FIRST:
                room = self._room_after(StepShape.of([*decodes, *segments]), budget)
        return segments

    def _room_after(self, step: StepShape, most: int) -> int:
        """Prompt tokens for which a step that gives somebody a first token may take longer: twice as long."""
        if self._pace is None:
            return min(most, step.prefill + step.decodes)
        return self._pace.prefill_after(step, 0, most)

    def _worthwhile(self, busy: bool, planned: Collection[str], now: float) -> tuple[list[_Request], float]:
        """Running requests with prefill to do now, by arrival; ``busy``: the step has decodes, those of ``planned``.
        And in how many seconds to look again at those that were left.

        Who was just let in again and found all but its last token in pages is one of them: its decode was not planned.
        """
        able = [r for r in self._running if r.ready and r.request_id not in planned and (r.complete or self._overlap)]
        large = [r for r in able if r.complete or r.ready >= self._coalesce]
        if busy or any(r.complete for r in able):
            return large, math.inf
        if self._pace is None:
            return large or able, math.inf
        begins, again_s = [], math.inf
        for request in able:
            later, late_s = request.expected(now)
            if self._pace.begins(request.computed, request.computed + request.ready, later):
                begins.append(request)
            else:
                again_s = min(again_s, late_s)
        return begins, again_s
