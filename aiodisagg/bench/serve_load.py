"""Sends a workload: at its arrival times, or so many requests at a time. Measures the client itself too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiodisagg.bench.chat_body import Body
from aiodisagg.bench.chat_client import Balancer, ChatClient, Clock
from aiodisagg.bench.serve_metrics import Outcome, group_of, percentile
from aiodisagg.bench.workload import Arrivals, Closed, WorkloadRequest

Job = tuple[WorkloadRequest, Body]


@dataclass(frozen=True, slots=True)
class Load:
    """Sends requests to replicas. ``ended`` is told of each outcome as it ends."""

    client: ChatClient
    balancer: Balancer
    clock: Clock
    ended: Callable[[Outcome], None] = lambda outcome: None

    async def run(self, jobs: Sequence[Job], arrivals: Arrivals) -> list[Outcome]:
        """Outcomes in the order of ``jobs``; returns when the last has ended."""
        began = self.clock.now()
        found: dict[int, Outcome] = {}
        work = iter(enumerate(jobs))
        async with asyncio.TaskGroup() as group:
            if isinstance(arrivals, Closed):
                for _ in range(min(arrivals.concurrency, len(jobs))):
                    group.create_task(self._in_turn(work, began, found))
            else:
                for number, job in work:
                    await self.clock.until(began + job[0].arrival_s)
                    group.create_task(self._send(number, job, job[0].arrival_s, began, found))
        return [found[number] for number in range(len(jobs))]

    async def _in_turn(self, work: Iterator[tuple[int, Job]], began: float, found: dict[int, Outcome]) -> None:
        for number, job in work:
            await self._send(number, job, self.clock.now() - began, began, found)

    async def _send(self, number: int, job: Job, due_s: float, began: float, found: dict[int, Outcome]) -> None:
        request, body = job
        url = self.balancer.take()
        sent_s = self.clock.now() - began
        try:
            answer = await self.client.ask(url, body)
        finally:
            self.balancer.give_back(url)
        found[number] = outcome = Outcome(
            number=number,
            group=group_of(request),
            due_s=due_s,
            sent_s=sent_s,
            ended_s=self.clock.now() - began,
            text_s=tuple(at - began for at in answer.text_s),
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            url=url,
            error=answer.error,
            said=answer.said,
        )
        self.ended(outcome)


@dataclass(slots=True)
class ClientCost:
    """What the client had of the machine, and how late its loop was: what a measured latency may be too long by."""

    cpu_share: float = 0.0
    """Of one core."""
    lags_s: list[float] = field(default_factory=list)

    @property
    def lag_p99_ms(self) -> float:
        return 1000 * percentile(sorted(self.lags_s), 99) if self.lags_s else 0.0

    @property
    def lag_max_ms(self) -> float:
        return 1000 * max(self.lags_s, default=0.0)


_TICK_S = 0.02


@contextmanager
def watch_client() -> Iterator[ClientCost]:
    """Measures the running loop from here on; complete when the context is left."""
    cost, loop = ClientCost(), asyncio.get_running_loop()
    began, began_cpu = time.perf_counter(), time.process_time()

    timers: list[asyncio.TimerHandle] = []

    def tick(due: float) -> None:
        now = time.perf_counter()
        cost.lags_s.append(max(0.0, now - due))
        timers[:] = [loop.call_later(_TICK_S, tick, now + _TICK_S)]

    timers.append(loop.call_later(_TICK_S, tick, began + _TICK_S))
    try:
        yield cost
    finally:
        timers[0].cancel()
        cost.cpu_share = (time.process_time() - began_cpu) / max(1e-9, time.perf_counter() - began)
