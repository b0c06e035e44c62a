"""The gate between a step thread and a tower's thread, and the same across two processes' sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from aiodisagg.encode.core import CoreGate
from aiodisagg.encode.device import DeviceGate
from aiodisagg.encode.gate import InlineGate, SlackGate
from aiodisagg.encode.steps import StepReader, StepSender, step_pair
from aiodisagg.scheduler.slack import Slack
from tests.conftest import LOOPS

pytestmark = pytest.mark.usefixtures("no_leaks")
PATIENCE_S = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def waiting(gate: InlineGate | SlackGate) -> tuple[threading.Thread, list[bool]]:
    """A tower's thread that waits at the gate, and what it was told."""
    told: list[bool] = []
    asked = threading.Event()

    def wait() -> None:
        asked.set()
        told.append(gate.wait())

    thread = threading.Thread(target=wait)
    thread.start()
    assert asked.wait(PATIENCE_S)
    return thread, told


def overdrawn(clock: Clock | None = None) -> SlackGate:
    """Streams decode, and the tower has used up what they leave."""
    gate = SlackGate(Slack(0.05), clock=clock or Clock())
    gate.step_began()
    gate.step_ended(2)
    gate.spent(0.08)
    assert not gate.open
    return gate


def test_a_step_lets_the_tower_go_on_once_enough_is_earned() -> None:
    gate = overdrawn(clock := Clock())
    thread, told = waiting(gate)
    gate.step_began()
    clock.now += 0.03
    gate.step_ended(2)  # earned 20 of the 30 ms that are owed
    assert not gate.open and not told
    gate.step_began()
    clock.now += 0.03
    gate.step_ended(2)
    thread.join(PATIENCE_S)
    assert told == [True] and gate.waits <= 1


@pytest.mark.parametrize("end", [lambda gate: gate.step_ended(0), lambda gate: gate.close()], ids=["idle", "closed"])
def test_nobody_waits_for_an_engine_that_is_idle_or_gone(end: Callable[[SlackGate], None]) -> None:
    gate = overdrawn()
    thread, told = waiting(gate)
    end(gate)
    thread.join(PATIENCE_S)
    assert told == [gate._closed is False]


def test_a_tower_that_shares_with_nobody_never_waits() -> None:
    gate = SlackGate(Slack(0.05))
    for _ in range(10):
        assert gate.wait()
        gate.spent(10.0)
    assert gate.waits == 0


class Watched(SlackGate):
    """Says when it was told of a step."""

    def __init__(self) -> None:
        super().__init__(Slack(0.05))
        self.steps: asyncio.Queue[tuple[float, int]] = asyncio.Queue()

    def stepped(self, step_s: float, decodes: int) -> None:
        super().stepped(step_s, decodes)
        self.steps.put_nowait((step_s, decodes))


async def told(gate: Watched) -> tuple[float, int]:
    async with asyncio.timeout(PATIENCE_S):
        return await gate.steps.get()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)
async def test_steps_reach_the_other_process_and_idleness_is_said_once() -> None:
    ours, theirs = step_pair()
    sender, gate = StepSender(ours, clock=(clock := Clock())), Watched()
    async with StepReader(gate, theirs):
        for decodes in (0, 3, 0, 0, 1):
            sender.step_began()
            clock.now += 0.25
            sender.step_ended(decodes)
        assert [await told(gate) for _ in range(3)] == [(0.25, 3), (0.25, 0), (0.25, 1)]
        sender.close()
        assert await told(gate) == (0.0, 0) and gate.open  # the engine is gone


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)
async def test_an_engine_that_is_not_heard_of_holds_nobody_back() -> None:
    ours, theirs = step_pair()
    sender, gate = StepSender(ours), Watched()
    async with StepReader(gate, theirs, silence_s=0.01):
        sender.step_began()
        sender.step_ended(3)
        assert (await told(gate))[1] == 3
        assert await told(gate) == (0.0, 0) and gate.open
    sender.close()


def test_an_engine_does_not_wait_for_a_tower_that_does_not_read() -> None:
    ours, theirs = step_pair()
    sender = StepSender(ours)
    for _ in range(10_000):
        sender.step_began()
        sender.step_ended(1)
    theirs.close()
    sender.step_ended(1)
    sender.close()


def test_a_batch_is_not_launched_ahead_on_slack_that_the_one_before_will_use_up() -> None:
    clock = Clock()
    gate = SlackGate(Slack(0.05), clock=clock)
    gate.step_began()
    clock.now += 0.02
    gate.step_ended(2)
    assert gate.wait()
    gate.spent(0.02)  # 10 of 30 ms are left
    assert gate.wait() and not gate.open, "another one would take 20 ms, too"
    gate.step_began()
    clock.now += 0.02
    gate.step_ended(2)
    assert gate.open


def test_inside_of_the_engines_loop_a_batch_waits_for_the_step() -> None:
    gate = InlineGate()
    gate.step_began()
    thread, told = waiting(gate)
    assert not gate.open and not told
    gate.step_ended(2)
    thread.join(PATIENCE_S)
    assert told == [True]


def test_inside_of_the_engines_loop_a_step_waits_for_the_batch_even_if_it_failed_and_was_run_in_pieces() -> None:
    gate, began = InlineGate(), threading.Event()
    assert gate.wait()
    thread = threading.Thread(target=lambda: (gate.step_began(), began.set()))
    thread.start()
    assert not gate.open and not began.is_set()
    for _ in range(3):  # the batch once, its two items once more
        gate.spent(0.01)
    thread.join(PATIENCE_S)
    assert began.is_set()
    gate.step_ended(0)
    assert gate.wait(), "what was paid too often is forgotten"


def test_inside_of_the_engines_loop_nobody_waits_for_a_tower_that_is_closed() -> None:
    gate = InlineGate()
    assert gate.wait()
    thread = threading.Thread(target=gate.step_began)
    thread.start()
    gate.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive() and not gate.wait()


def test_inside_of_the_engines_loop_whoever_was_last_lets_the_other_go_first() -> None:
    """However quick it is to come again: it never lets go of the lock in between."""
    gate, order = InlineGate(), list[str]()

    def batch() -> None:
        assert gate.wait()
        order.append("batch")
        gate.spent(0.01)

    def step() -> None:
        gate.step_began()
        order.append("step")
        gate.step_ended(1)

    gate.step_began()
    tower = threading.Thread(target=batch)
    tower.start()
    while not gate._batch_waits:
        pass
    with gate._changed:
        gate.step_ended(1)
        step()
    tower.join(PATIENCE_S)
    assert gate.wait()
    engine = threading.Thread(target=step)
    engine.start()
    while not gate._step_waits:
        pass
    with gate._changed:
        gate.spent(0.01)
        batch()
    engine.join(PATIENCE_S)
    assert order == ["batch", "step", "step", "batch"]


@pytest.mark.parametrize("make", [CoreGate, lambda: DeviceGate(Slack(0.1, share=0.25))], ids=["core", "device"])
def test_the_engine_is_told_when_its_prompts_need_not_wait_any_more(make: Callable[[], CoreGate | DeviceGate]) -> None:
    gate, told = make(), list[bool]()
    gate.tell_when_free(lambda: told.append(gate.whole_prompts()))  # with no lock held
    assert gate.wait() and gate.wait()
    gate.spent(0.1)
    assert not told, "one batch is at work still"
    gate.spent(0.1)
    assert told == [False]
    assert gate.wait()
    gate.gave_up()
    gate.close()
    assert told == [False] * 3
