"""Loads: when requests are sent, how many at once, and what is written down about each."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_openai import FakeClock, FakeServer, answer_of, serving

from aiodisagg.bench.chat_body import Body
from aiodisagg.bench.chat_client import Balancer, ChatClient, Clock, open_session
from aiodisagg.bench.serve_load import Load, watch_client
from aiodisagg.bench.serve_metrics import Outcome
from aiodisagg.bench.workload import Closed, Gamma, ImageSpec, WorkloadRequest

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

JOB_BODY = Body((b"{}",))


def jobs(*arrivals_s: float) -> list[tuple[WorkloadRequest, Body]]:
    return [(WorkloadRequest(at, (ImageSpec(0, 32, 32),), 1, 1), JOB_BODY) for at in arrivals_s]


async def test_a_closed_loop_of_one_in_virtual_time() -> None:
    """A request is due when the one before it has ended; every time of it is exact."""
    clock = FakeClock()
    ended: list[Outcome] = []
    async with serving(FakeServer(lambda body: answer_of([0.5, 0.25]), clock)) as server, open_session(None) as session:
        load = Load(ChatClient(session, clock), Balancer([server.url]), clock, ended.append)
        found = await load.run(jobs(0.0, 0.0), Closed(1))
    first, second = found
    assert (first.due_s, first.sent_s, first.text_s, first.ended_s) == (0.0, 0.0, (0.5, 0.75), 0.75)
    assert (second.due_s, second.sent_s, second.text_s, second.ended_s) == (0.75, 0.75, (1.25, 1.5), 1.5)
    assert (first.group, first.prompt_tokens, first.output_tokens, first.url) == ("1 image", 7, 2, server.url)
    assert ended == found


async def test_a_closed_loop_has_so_many_requests_open_and_never_more() -> None:
    three, now, most = asyncio.Event(), 0, 0

    async def count(body: dict[str, Any]) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 3:
            three.set()
        await three.wait()
        now -= 1

    async with serving(FakeServer(lambda body: answer_of([0.0]), before=count)) as server:
        async with open_session(None) as session:
            load = Load(ChatClient(session, Clock()), Balancer([server.url]), Clock())
            found = await load.run(jobs(*[0.0] * 10), Closed(3))
    assert most == 3
    assert [one.number for one in found] == list(range(10)) and not any(one.error for one in found)


async def test_an_open_loop_waits_for_nobody() -> None:
    """The third is sent although the first two have no answer; each is due when it arrives."""
    clock, all_here, here = FakeClock(), asyncio.Event(), 0

    async def together(body: dict[str, Any]) -> None:
        nonlocal here
        here += 1
        if here == 3:
            all_here.set()
        await all_here.wait()

    async with serving(FakeServer(lambda body: answer_of([0.0]), before=together)) as server:
        async with open_session(None) as session:
            load = Load(ChatClient(session, clock), Balancer([server.url]), clock)
            found = await load.run(jobs(0.5, 1.0, 4.0), Gamma(1.0))
    assert [one.due_s for one in found] == [0.5, 1.0, 4.0]
    assert [one.ttft_s for one in found] == [3.5, 3.0, 0.0]


async def test_a_request_that_was_sent_late_has_waited_all_the_same() -> None:
    """Time to first token counts from the arrival: the client's delay is in it, and is written down."""

    class Late(FakeClock):
        async def until(self, at_s: float) -> None:
            self.value = max(self.value, at_s + 0.125)

    clock = Late()
    async with serving(FakeServer(lambda body: answer_of([0.5]), clock)) as server, open_session(None) as session:
        (one,) = await Load(ChatClient(session, clock), Balancer([server.url]), clock).run(jobs(1.0), Gamma(1.0))
    assert (one.due_s, one.sent_s, one.ttft_s) == (1.0, 1.125, 0.625)


async def test_a_refused_request_is_an_outcome_too() -> None:
    async with serving(FakeServer(lambda body: 429)) as server, open_session(None) as session:
        clock, balancer = Clock(), Balancer([server.url])
        found = await Load(ChatClient(session, clock), balancer, clock).run(jobs(0.0, 0.0), Closed(2))
    assert [one.error for one in found] == ["HTTP 429", "HTTP 429"]
    assert balancer._open == {server.url: 0}


async def test_a_client_that_is_held_up_says_so() -> None:
    with watch_client() as calm:
        await asyncio.sleep(0)
    assert calm.lags_s == [] and calm.lag_max_ms == calm.lag_p99_ms == 0.0
    with watch_client() as cost:
        loop = asyncio.get_running_loop()
        held, seen = loop.create_future(), Clock().now()

        def hold() -> None:
            while Clock().now() < seen + 0.06:  # longer than a tick: the loop cannot be on time
                pass
            loop.call_later(0.03, held.set_result, None)

        loop.call_soon(hold)
        await held
    assert cost.lag_max_ms > 20
    assert cost.cpu_share > 0
