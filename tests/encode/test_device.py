"""The gate of a tower and an engine that share an accelerator."""

from __future__ import annotations

import threading

import pytest

from aiodisagg.encode.device import DeviceGate
from aiodisagg.scheduler.slack import Slack
from tests.encode.test_gate import PATIENCE_S, Clock, waiting

pytestmark = pytest.mark.usefixtures("no_leaks")
PACE_S = 0.05


def made(clock: Clock, *, longest_s: float = 0.5) -> DeviceGate:
    return DeviceGate(Slack(PACE_S, share=0.25), longest_s=longest_s, clock=clock)


def begin(gate: DeviceGate, *, prompts: bool) -> None:
    gate.prefill_waits(prompts)
    gate.step_began()


def step_and_batch(clock: Clock, *, prompts: bool) -> DeviceGate:
    """A step of 10 ms, beside which a batch begins, and 20 ms of both."""
    gate = made(clock)
    begin(gate, prompts=prompts)
    clock.now += 0.01
    assert gate.wait()
    clock.now += 0.02
    return gate


def test_a_batch_beside_a_step_with_prompts_has_got_nothing_and_pays_nothing() -> None:
    gate = step_and_batch(clock := Clock(), prompts=True)
    assert not gate.slowed()
    gate.step_ended(2)  # 30 ms, all its own
    assert gate._slack.earned_s == pytest.approx(0.02)
    clock.now += 0.015
    gate.spent(0.035)  # 20 of them beside the step
    assert gate._slack.earned_s == pytest.approx(0.005)


def test_a_step_that_only_decodes_waits_for_the_batch_beside_it_and_is_not_called_slow() -> None:
    gate = step_and_batch(clock := Clock(), prompts=False)
    assert gate.slowed(), "its time is not to be learned from"
    gate.step_ended(2)  # 30 ms, of which it needed 10
    assert gate._slack.earned_s == pytest.approx(0.04)
    clock.now += 0.01
    gate.spent(0.03)
    assert gate._slack.earned_s == pytest.approx(0.01)
    begin(gate, prompts=False)
    clock.now += 0.01
    assert not gate.slowed(), "of this step and not of the last one"
    gate.step_ended(2)
    assert gate._slack.earned_s == pytest.approx(0.05)


def test_no_batch_goes_before_a_step_that_a_prompt_waits_for() -> None:
    """The prompt waited for a step of decodes, and that for all the batches that its pace has room for."""
    gate = made(Clock())
    begin(gate, prompts=False)
    gate.prompt_came()
    assert not gate.open and not gate.wait(block=False)
    gate.step_ended(2)
    assert gate.open and gate.wait(block=False)
    gate.spent(0.01)
    begin(gate, prompts=True)
    gate.prompt_came()
    assert gate.open, "the tower waits for this step anyway"
    gate.step_ended(3)
    gate.prompt_came()
    assert gate.open, "no step is at work"


def test_while_the_tower_has_work_prompts_are_computed_in_one_piece() -> None:
    gate = made(Clock())
    assert not gate.whole_prompts()
    assert gate.wait()
    assert gate.whole_prompts()
    begin(gate, prompts=False)
    gate.step_ended(2)
    gate.spent(0.08)
    assert not gate.whole_prompts() and not gate.open
    thread, told = waiting(gate)
    while not gate.whole_prompts():  # the thread has said that it will ask, not that it has
        pass
    gate.close()
    thread.join(PATIENCE_S)
    assert told == [False] and not gate.whole_prompts(), "nothing is held back by a tower that is closed"


def test_steps_with_prompts_without_end_let_a_batch_get_done() -> None:
    gate, began = made(clock := Clock(), longest_s=0.1), threading.Event()
    assert gate.wait()
    for _ in range(3):
        begin(gate, prompts=True)
        clock.now += 0.04
        gate.step_ended(1)
    begin(gate, prompts=False)  # gives way by its priority
    gate.step_ended(1)
    gate._slack.inter_token_s = PATIENCE_S
    thread = threading.Thread(target=lambda: (begin(gate, prompts=True), began.set()))
    thread.start()
    assert not began.wait(0.05)
    gate.spent(0.15)
    thread.join(PATIENCE_S)
    assert began.is_set()
    gate.step_ended(1)
    assert gate.wait()
    begin(gate, prompts=True)  # the next batch has all of its time before it


def test_a_step_does_not_wait_for_a_batch_for_longer_than_the_pace() -> None:
    gate = made(clock := Clock(), longest_s=0.1)
    assert gate.wait()
    begin(gate, prompts=True)
    clock.now += 0.2
    gate.step_ended(1)
    gate._slack.inter_token_s = 0.001
    begin(gate, prompts=True)  # the tower's thread may be dead


def test_nobody_waits_for_a_tower_that_is_closed() -> None:
    gate = made(clock := Clock(), longest_s=0.1)
    assert gate.wait()
    begin(gate, prompts=True)
    clock.now += 0.2
    gate.step_ended(1)
    gate._slack.inter_token_s = PATIENCE_S
    thread = threading.Thread(target=begin, args=(gate,), kwargs={"prompts": True})
    thread.start()
    gate.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive() and not gate.whole_prompts()


def test_who_gives_up_pays_nothing_for_whom_is_at_work() -> None:
    gate = made(clock := Clock())
    begin(gate, prompts=False)
    clock.now += 0.01
    gate.step_ended(2)
    assert gate.wait()
    clock.now += 0.03
    gate.spent(0.03)
    begin(gate, prompts=False)
    clock.now += 0.01
    gate.step_ended(2)
    assert gate.wait() and gate._slack.earned_s == pytest.approx(0.05)
    assert gate.wait(block=False)
    gate.gave_up()
    assert gate.open, "of 50 ms the one at work takes 30"
    assert gate.wait(block=False)
    assert not gate.open and not gate.wait(block=False) and gate.waits == 0
