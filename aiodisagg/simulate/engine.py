"""A language engine in virtual time: the real scheduler decides, and service times say how long a step takes."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate

from aiodisagg.engine.pace import Pace, StepShape
from aiodisagg.engine.schedule import Segment
from aiodisagg.scheduler.order import Order
from aiodisagg.scheduler.turns import prefill_goes_first, rows_may_go
from aiodisagg.simulate.device import Device
from aiodisagg.simulate.leap import LeapingScheduler
from aiodisagg.simulate.request import Item, SimRequest
from aiodisagg.simulate.times import Costs
from aiodisagg.simulate.tower import Tower

PAGE_TOKENS = 128
"""Tokens of a page: more than a real engine's 16, so that a thousand peers fit into memory."""


class TokenGaps:
    """Gaps between tokens of one answer: (seconds, how many tokens), not one entry a token."""

    def __init__(self) -> None:
        self.seconds = array("d")
        self.tokens = array("q")

    def add(self, seconds: float, tokens: int) -> None:
        self.seconds.append(seconds)
        self.tokens.append(tokens)


class Engine:
    """Continuous batching on one device.

    Args:
        inline: encode inside the engine's loop, as a monolith does: the step waits for the tower.
        ended: told of each request that has all its tokens.
    """

    def __init__(
        self, device: Device, costs: Costs, gaps: TokenGaps, *, inline: bool, ended: Callable[[SimRequest], None],
        first: Callable[[SimRequest], None], leaps: bool = True,
        pace: Pace | None = None, overlap: bool = True, coalesce_tokens: int = 0,
        order: Order = Order.SHORT_FIRST,
    ) -> None:  # fmt: skip
        times = costs.times
        self.device, self.costs, self.gaps = device, costs, gaps
        self.scheduler = LeapingScheduler(
            num_pages=-(-times.kv_tokens // PAGE_TOKENS),
            page_size=PAGE_TOKENS,
            token_budget=times.token_budget,
            max_running=times.max_running,
            overlap=overlap,
            coalesce_tokens=coalesce_tokens,
            pace=pace,
            order=order,
        )
        self._pace, self._order = pace, order
        self.steps = 0
        self.preemptions = 0
        self._inline, self._ended, self._first, self._leaps = inline, ended, first, leaps
        self._requests: dict[str, SimRequest] = {}
        self._to_encode: list[Item] = []
        self._encoding: list[Item] = []
        """At work, where their rows are not there at once."""
        self._segments: list[Segment] = []
        self._planned = 1
        self._step_s = 0.0
        self.turns = False
        """Rows wait while the tower beside works for this request or an older one."""
        self._held: dict[str, SimRequest] = {}
        self._woken = False
        self._began_s = 0.0
        self._decodes = 0
        self._waited_for = False
        self.beside: Tower | None = None
        """The tower that shares the device and takes what slack this engine leaves."""
        device.before_sharing = self.cut

    @property
    def active(self) -> int:
        return len(self._requests)

    def fits(self, request: SimRequest) -> bool:
        return request.prompt + request.output <= self.scheduler.largest()

    def waited_for(self) -> bool:
        """Whether the step at work only decodes, and a prompt has come since it began that could be computed now."""
        return self._waited_for

    def add(self, request: SimRequest) -> None:
        self._requests[request.name] = request
        request.front = 0 if self._inline and request.items else request.reach()
        self.scheduler.add(
            request.name,
            request.prompt,
            request.output,
            request.front,
            due=request.due_s,
            priority=request.source.priority,
            stops=tuple(accumulate(item.rows for item in request.items)),
        )
        self._waited_for |= self.device.engine.busy and not self.device.prompts and request.front >= request.prompt
        self.wake()

    def arrived(self, request: SimRequest) -> None:
        """More rows of the request are here."""
        front = request.reach()
        if self.turns and self.beside is not None and not rows_may_go(request.begun_s, self.beside.oldest_s()):
            self._held[request.name] = request
            return
        if front > request.front:
            request.front = front
            self.scheduler.set_front(request.name, front, self.device.clock.now)
            self.wake()

    def release(self) -> None:
        """The tower beside has ended a batch: rows that waited for it may go."""
        held, self._held = self._held, {}
        for request in held.values():
            self.arrived(request)

    def oldest_prefill_s(self) -> float | None:
        """When the request was let in that has waited longest for a prefill that could be done now."""
        name = self.scheduler.oldest_prefill()
        return None if name is None else self._requests[name].begun_s

    def has_before(self, request: SimRequest) -> bool:
        """Whether a prompt that could be computed now goes before the request."""
        now = self.device.clock.now
        name = self.scheduler.first_prefill(now)
        first = None if name is None else self._requests[name].claim
        return prefill_goes_first(self._order, request.claim, first, now)

    def prepared(self, item: Item) -> None:
        """The pixels of an image are here, to be encoded in the loop."""
        item.prepared = True
        self._to_encode.append(item)
        self.wake()

    def wake(self) -> None:
        """Something has changed. What else changes in the same moment is seen by the same step."""
        if self.device.engine.busy:
            self.cut()
        elif not self._woken:
            self._woken = True
            self.device.clock.at(self.device.clock.now, self._wake)

    def _wake(self) -> None:
        self._woken = False
        if not self.device.engine.busy:
            self._begin()

    def cut(self) -> None:
        """Ends a leap with the step that is at work: something has changed."""
        if self._planned == 1:
            return
        self.device.update()
        lane = self.device.engine
        done_s = self._planned * self._step_s - lane.left_s
        steps = min(int(done_s / self._step_s * (1 + 1e-12)) + 1, self._planned)
        if steps < self._planned:
            self._planned = steps
            lane.shorten(max(steps * self._step_s - done_s, 0.0))

    def _begin(self) -> None:
        encoding = self._encode_batch() if self._to_encode else 0.0
        # Beside a tower that goes before decodes a chunk would delay the rows that the rest of its prompt waits for.
        whole = self.device.priorities and self.beside is not None and self.beside.working
        step = self.scheduler.plan_step(self.device.clock.now, whole=whole)
        if self._to_encode and step.admitted and not encoding:  # who was let in now need not wait for the next step
            encoding = self._encode_batch()
            if encoding and not step.segments:
                step = self.scheduler.plan_step(self.device.clock.now)
        self.preemptions += len(step.preempted)
        if not step.segments and not encoding:
            if self.beside is not None:
                self.beside.stepped(0.0, 0, 1)
            if step.again_s < math.inf:
                self.device.clock.at(self.device.clock.now + step.again_s, self._wake)
            return
        decodes = context = 0
        prefills: list[tuple[int, int]] = []
        limit = 1 << 60
        for segment in step.segments:
            request = self._requests[segment.request_id]
            if request.served_s < 0:
                request.served_s = self.device.clock.now
            if request.generated and segment.stop - segment.start == 1:
                decodes += 1
                context += segment.stop
                limit = min(limit, request.output - request.generated)
            else:
                prefills.append((segment.start, segment.stop))
        self._segments = list(step.segments)
        self._planned = 1
        if prefills:
            spent = self.costs.mixed_s(prefills, decodes, context)
        elif decodes:
            single_s = self.costs.decode_s(decodes, context)
            limit = min(limit, math.ceil(min((self.scheduler.next_due - self.device.clock.now) / single_s, limit)))
            if self._leaps and not (encoding or self._to_encode or (self.beside is not None and self.beside.working)):
                self._planned = self.scheduler.most_steps(self._segments, limit)
            spent = self.costs.decode_s(decodes, context + decodes * (self._planned - 1) / 2)
        else:
            spent = 0.0
        self.steps += self._planned
        self._step_s = spent + encoding
        self._began_s, self._decodes = self.device.clock.now, decodes
        self.device.prompts, self.device.step_waited_s = bool(prefills), 0.0
        self.device.engine.start(self._step_s * self._planned, self._end)

    def _encode_batch(self) -> float:
        """Seconds of the tower for the next images of requests that hold pages."""
        batch: list[Item] = []
        patches = 0
        now = self.device.clock.now
        for item in sorted(self._to_encode, key=lambda one: Order.FIRST_COME.rank(one.claim, now)):
            if not self.scheduler.pages_of(item.request.name):
                continue
            if batch and patches + item.patches > self.costs.times.inline_patches:
                break
            batch.append(item)
            patches += item.patches
        if not batch:
            return 0.0
        for item in batch:
            self._to_encode.remove(item)
            if item.request.served_s < 0:
                item.request.served_s = self.device.clock.now
        if self.costs.times.local_bytes_per_s:
            self._encoding = batch
        else:  # a step with the batch may compute with its rows
            self._rows_here(batch)
        return self.costs.tower_s([item.patches for item in batch])

    def _rows_here(self, batch: Sequence[Item]) -> None:
        for item in batch:
            item.arrived = item.rows
        for request in dict.fromkeys(item.request for item in batch):
            request.front = request.reach()
            self.scheduler.set_front(request.name, request.front, self.device.clock.now)

    def _rows_come(self, batch: Sequence[Item]) -> None:
        self._rows_here(batch)
        self.wake()

    def _end(self) -> None:
        now, steps = self.device.clock.now, self._planned
        if self._encoding:
            batch, self._encoding = self._encoding, []
            moved_s = sum(self.costs.local_s(item.rows) for item in batch)
            self.device.clock.at(now + moved_s, self._rows_come, batch)
        self._waited_for = False
        segments = self._segments if steps == 1 else self.scheduler.leap(self._segments, steps)
        self._planned = 1
        step_s = (now - self._began_s) / steps
        own_s = step_s - self.device.step_waited_s
        if self._pace is not None and not self.device.step_waited_s:
            self._pace.observe(StepShape.of(segments), step_s)
        if self.beside is not None:
            self.beside.stepped(own_s, self._decodes, steps)
        for segment in segments:
            request = self._requests[segment.request_id]
            goes_on = False
            if segment.samples:
                if request.generated:
                    self.gaps.add((now - request.last_s) / steps, steps)
                else:
                    request.first_s = now
                    self._first(request)
                request.generated += steps
                request.last_s = now
                goes_on = request.generated < request.output
            if segment.samples and not goes_on:
                self.scheduler.remove(request.name)
                del self._requests[request.name]
                self._ended(request)
            else:
                self.scheduler.advance(segment, sampled=goes_on)
        self.wake()
