"""The step thread: takes commands, plans a step, runs it, hands tokens out. Everything about a request happens here.

One thread owns the scheduler, the pool and the sequences; other threads put commands into its inbox. It sleeps on a
condition when there is nothing to compute; it does not poll. The inbox is bounded by what callers may do: a submit and
an end for each request (the engine bounds requests), and arrivals of rows are a set of ids.

While a step is computed the thread waits, and lends what it owns, but for the pages and sequences of the step: who
submits a request then lets it in, so that its items are encoded during the step and not after it.

A step that raises is done again one request at a time: who raises alone fails, the others have lost nothing, because a
forward has no effect but keys and values that are written again. Logits that are not finite fail their request only.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from time import monotonic, perf_counter

import torch

from aiodisagg.device.streams import Priority, own_stream
from aiodisagg.device.vitals import Vitals
from aiodisagg.engine.batch import EngineSequence, Runner, Work
from aiodisagg.engine.config import EngineStats
from aiodisagg.engine.pace import Pace, StepShape
from aiodisagg.engine.sampling import sample_batch
from aiodisagg.engine.schedule import Scheduler, Segment, Step
from aiodisagg.engine.steps import StepWatcher
from aiodisagg.engine.stream import News, Outbox, RequestHandle
from aiodisagg.engine.types import Delta, FinishReason, Usage
from aiodisagg.errors import AiodisaggError, EngineError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class End:
    """Take the request out: with its error, or as cancelled when there is none."""

    handle: RequestHandle
    error: AiodisaggError | None


class StepThread:
    """Runs until :meth:`close`. ``submit``, ``rows_arrived``, ``end`` and ``close`` may be called on any thread.

    Args:
        vitals: are told of requests that got a token, and of those for which a step of their own raised.
        pace: is told how long steps take, whether or not it bounds them.
        ended: called on the step thread with the id of each request that is over, before its reader is woken.
        stopped: called on the step thread as the last thing it does.
        watcher: told around every step, and with 0 decodes when there is nothing to do or never will be.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        eos_ids: frozenset[int],
        outbox: Outbox,
        *,
        vitals: Vitals,
        pace: Pace,
        ended: Callable[[str], None],
        stopped: Callable[[], object],
        watcher: StepWatcher | None = None,
    ) -> None:
        self._watcher = watcher or StepWatcher()
        self._runner, self._scheduler, self._eos_ids, self._outbox = runner, scheduler, eos_ids, outbox
        self._vitals, self._ended, self._stopped, self._pace = vitals, ended, stopped, pace
        self._sequences: dict[str, EngineSequence] = {}
        self._table = threading.Lock()
        """Of all that the thread owns: held by it, but while a step is computed."""
        self._table.acquire()
        self._wake = threading.Condition()
        self._again_s = inf
        """Of a step without segments: when to plan again if nothing comes."""
        self._inbox: deque[EngineSequence | End] = deque()
        self._arrived: set[str] = set()
        self._closing = self._roused = False
        self._why = "the engine is closed"
        self._counts: Counter[str] = Counter()
        self._batch_sizes: Counter[int] = Counter()
        self.stats = EngineStats()
        """Replaced as a whole after every step."""
        self._news: list[News] = []
        self._publish()
        self._watcher.tell_when_free(self._free)
        self._thread = threading.Thread(target=self._run, name="aiodisagg-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def submit(self, sequence: EngineSequence) -> None:
        """Raises EngineError when the thread ends or has ended."""
        with self._wake:
            if self._closing:
                raise EngineError(sequence.request_id, self._why)
            self._inbox.append(sequence)
            self._wake.notify()
        self._look_in()

    def _look_in(self) -> None:
        """Lets in who has come, if nobody has the table. Whoever has it looks once more when it is given back."""
        while isinstance(self._next_command(), EngineSequence) and self._table.acquire(blocking=False):
            try:
                self._let_in()
            finally:
                self._table.release()

    def _next_command(self) -> EngineSequence | End | None:
        with self._wake:
            return self._inbox[0] if self._inbox else None

    def _let_in(self) -> None:
        """Those that came first into the inbox and are no ends, as far as there are pages."""
        with self._wake:
            came = []
            while self._inbox and isinstance(command := self._inbox[0], EngineSequence):
                came.append(command)
                self._inbox.popleft()
        for sequence in came:
            self._add(sequence)
        if admitted := self._scheduler.admit(monotonic()):
            self._admitted(admitted)
            self._publish()

    def rows_arrived(self, request_id: str) -> None:
        with self._wake:
            self._arrived.add(request_id)
            self._wake.notify()

    def _free(self) -> None:
        """Prompts need not wait for all of their rows any more: those that were left may have something to compute."""
        with self._wake:
            self._roused = True
            self._wake.notify()

    def end(self, handle: RequestHandle, error: AiodisaggError | None) -> None:
        with self._wake:
            self._inbox.append(End(handle, error))
            self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()

    # -- on the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode(), own_stream(self._runner.device, Priority.PROMPTS):
                idle = False
                while self._take_commands(wait=idle):
                    idle = not self._step()
        except BaseException as error:
            log.exception("the step thread failed")
            self._why = f"the engine stopped: {error!r}"
            self._vitals.ended(error)
        finally:
            try:
                self._end_all()
            finally:
                self._stopped()

    def _end_all(self) -> None:
        with self._wake:
            self._closing = True
            self._inbox, left = deque(), self._inbox
        for command in left:
            if isinstance(command, EngineSequence):
                self._sequences[command.request_id] = command
        for request_id in tuple(self._sequences):
            self._finish(request_id, error=EngineError(request_id, self._why))
        self._publish()
        self._watcher.prefill_waits(False)
        self._watcher.step_ended(0)

    def _take_commands(self, *, wait: bool) -> bool:
        """Applies what has come; ``wait`` until something has, or should have. False: closing."""
        with self._wake:
            if wait:
                timeout_s = None if self._again_s == inf else self._again_s
                self._wake.wait_for(lambda: any((self._inbox, self._arrived, self._closing, self._roused)), timeout_s)
            self._roused = False
            commands, self._inbox = self._inbox, deque()
            arrived, self._arrived = self._arrived, set()
            if self._closing:
                self._inbox = commands
                return False
        for command in commands:
            if isinstance(command, EngineSequence):
                self._add(command)
            else:
                self._end(command)
        for request_id in arrived & self._sequences.keys():
            self._set_front(request_id)
        return True

    def _add(self, sequence: EngineSequence) -> None:
        plan, sampling = sequence.plan, sequence.sampling
        self._sequences[sequence.request_id] = sequence
        keys = () if sequence.keys is None else sequence.keys.keys
        self._scheduler.add(
            sequence.request_id,
            plan.tokens,
            sampling.max_tokens,
            sequence.rows.front,
            keys,
            due=sequence.due,
            priority=sequence.priority,
            stops=sequence.rows.stops,
        )

    def _end(self, command: End) -> None:
        request_id = command.handle.request_id
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.handle is not command.handle:  # it is over, and its id may be another's by now
            return
        if command.error is not None:
            self._finish(request_id, error=command.error)
        else:
            self._finish(request_id, delta=self._delta(request_id, "", (), FinishReason.CANCELLED))

    def _step(self) -> bool:
        """Plans and runs one step. False: nothing to do until a command comes."""
        step = self._scheduler.plan_step(monotonic(), whole=self._watcher.whole_prompts())
        self._again_s = step.again_s
        self._watcher.prefill_waits(step.prefills)
        for request_id in step.preempted:
            sequence = self._sequences[request_id]
            sequence.rows.reuse(0)
            self._set_front(request_id)
        self._admitted(step.admitted)
        self._counts["preemptions"] += len(step.preempted)
        if step.preempted:
            log.debug("preempted %s", ", ".join(step.preempted))
        if step.admitted:  # encoding can begin while this step computes
            self._publish()
        if step.segments:
            self._watcher.step_began()
            self._compute(step)
        self._watcher.step_ended(sum(segment.samples for segment in step.segments))
        self._publish()
        return bool(step.segments or step.admitted or step.preempted)

    def _admitted(self, request_ids: Iterable[str]) -> None:
        """They have pages since now."""
        for request_id in request_ids:
            sequence = self._sequences[request_id]
            sequence.rows.reuse(self._scheduler.reused(request_id))
            self._scheduler.set_front(request_id, sequence.rows.front)  # no rows had to come for that
            if sequence.rows.front == sequence.plan.tokens:
                self._watcher.prompt_came()
            self._news.append(News(sequence.handle, needed=sequence.rows.ask()))

    def _set_front(self, request_id: str) -> None:
        self._scheduler.set_front(request_id, self._sequences[request_id].rows.front, monotonic())

    def _compute(self, step: Step) -> None:
        batch = [Work(s, self._sequences[s.request_id], self._scheduler.pages_of(s.request_id)) for s in step.segments]
        began = perf_counter()
        try:
            self._forward(batch)
            if not self._watcher.slowed():
                self._pace.observe(StepShape.of(step.segments), perf_counter() - began)
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
            log.warning("a step of %d requests raised %r; doing them one by one", len(batch), error)
            self._counts["retries"] += 1
            for work in batch:
                try:
                    self._forward([work])
                except Exception as alone:
                    self._fail(work, alone)

    def _fail(self, work: Work, error: Exception) -> None:
        request_id = work.segment.request_id
        log.warning("request %s failed: %r", request_id, error)
        ours = error if isinstance(error, EngineError) else EngineError(request_id, f"the model raised {error!r}")
        ours.__cause__ = None if ours is error else error
        self._finish(request_id, error=ours, spoilt=True)
        self._vitals.failed(request_id, error, self._probe)

    def _probe(self) -> None:
        """Raises what the model raises of a short prompt that nothing is wrong with."""
        pages = self._scheduler.pages
        if not pages.free:  # then others hold them, who are next to fail or not
            return
        own = pages.take(1)
        try:
            self._runner.probe(own)
        finally:
            pages.give_back(own)

    def _forward(self, batch: list[Work]) -> None:
        """Raises what the model raises; after it every request of the batch has advanced or failed by itself."""
        sampled, rows_used = self._computed(batch)
        tokens = iter(sampled)
        self._counts["steps"] += 1
        self._counts["rows_used"] += rows_used
        self._batch_sizes[len(batch)] += 1
        for work in batch:
            segment, prompt = work.segment, work.sequence.plan.tokens
            self._counts["tokens_prefilled"] += max(min(segment.stop, prompt) - segment.start, 0)
            if segment.samples:
                self._accept(segment, work.sequence, next(tokens))
            else:
                self._scheduler.advance(segment, sampled=False)

    def _computed(self, batch: list[Work]) -> tuple[list[int | None], int]:
        """The tokens of the requests that sample, None for logits that are not finite, and the number of rows used."""
        self._table.release()
        try:
            self._look_in()  # else who came since the step was planned would wait for its end
            logits, rows_used = self._runner.forward(batch)
            return sample_batch(logits, [w.sequence.sampler for w in batch if w.segment.samples]), rows_used
        finally:
            self._table.acquire()

    def _accept(self, segment: Segment, sequence: EngineSequence, token: int | None) -> None:
        request_id = segment.request_id
        if token is None:
            error = EngineError(request_id, "the model gave logits that are not finite")
            self._finish(request_id, error=error, spoilt=True)
            return
        self._counts["tokens_decoded"] += 1
        self._vitals.worked()
        if not sequence.generated:
            sequence.handle.prefill = self._pace.prefill_costs()
        sequence.append(token)
        self._scheduler.advance(segment, sampled=True)
        try:
            text, reason = self._read(sequence, token)
        except Exception as error:  # a tokenizer's decode is foreign code
            self._finish(request_id, error=EngineError(request_id, f"token {token} has no text: {error!r}"))
            return
        delta = self._delta(request_id, text, (token,), reason)
        if reason is None:
            self._news.append(News(sequence.handle, delta))
        else:
            self._finish(request_id, delta=delta)

    def _read(self, sequence: EngineSequence, token: int) -> tuple[str, FinishReason | None]:
        """The text that this token adds, and whether it ends the answer."""
        sampling = sequence.sampling
        if token in self._eos_ids and not sampling.ignore_eos:
            return sequence.text.finish(), FinishReason.STOP
        text = sequence.text.feed(token)
        if sequence.text.stopped:
            return text, FinishReason.STOP
        if len(sequence.generated) < sampling.max_tokens:
            return text, None
        text += sequence.text.finish()
        return text, FinishReason.STOP if sequence.text.stopped else FinishReason.LENGTH

    def _delta(self, request_id: str, text: str, ids: tuple[int, ...], reason: FinishReason | None) -> Delta:
        sequence = self._sequences[request_id]
        usage = None if reason is None else Usage(sequence.plan.tokens, len(sequence.generated))
        return Delta(text, ids, reason, usage)

    def _finish(
        self, request_id: str, *, delta: Delta | None = None, error: AiodisaggError | None = None, spoilt: bool = False
    ) -> None:
        """Frees everything of the request, then tells its reader. ``spoilt``: its pages may hold anything."""
        sequence = self._sequences.pop(request_id)
        self._scheduler.remove(request_id, spoilt=spoilt)
        self._counts["failed"] += error is not None
        self._ended(request_id)
        self._news.append(News(sequence.handle, delta, error))

    def _publish(self) -> None:
        """First the statistics, then the news: who reads that a request is over finds its pages free."""
        pages = self._scheduler.pages
        self.stats = EngineStats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            pages_free=pages.free,
            pages_used=pages.count - pages.free,
            pages_idle=pages.idle,
            prefix_hits=self._scheduler.hits,
            tokens_reused=self._scheduler.tokens_reused,
            evictions=pages.evictions,
            rows_bytes=sum(s.rows.size_bytes for s in self._sequences.values()),
            batch_sizes=tuple(sorted(self._batch_sizes.items())),
            **self._counts,
        )
        news, self._news = self._news, []
        self._outbox.give(news)
