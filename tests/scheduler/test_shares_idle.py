"""Tenants that have nothing here for a while: what they had is remembered, whatever they and others do meanwhile."""

from __future__ import annotations

import random

import pytest

from aiodisagg.scheduler.admission import Expire
from aiodisagg.scheduler.shares import MAX_TENANTS, PLACES, Flow, Shares, Tenant
from tests.scheduler.lines import ALICE, BOB, TEXT, Front

CAROL = Tenant("carol")


def in_debt() -> Front:
    """Bob is there all the time. Alice has had as much as nineteen pictures more than he, and has gone."""
    front = Front.of(10_000, min_in_flight=1)
    front.arrive("a0", tenant=ALICE)
    front.arrive("b0", tenant=BOB)
    assert front.token("a0") == ["b0"]
    front.end("a0", output_tokens=19_950)
    return front


def before_alice(front: Front) -> int:
    """How many of Bob's requests go before Alice's next one."""
    for n in range(1, 50):
        front.arrive(f"b{n}", tenant=BOB)
    front.arrive("alice", tenant=ALICE)
    return front.order("b0").index("alice")


def test_debt_stays_over_a_thousand_requests_for_nothing() -> None:
    """Each left a note of the same account; then the older half of the notes, and with it the account, was forgotten:
    she began where Bob was."""
    expected = before_alice(in_debt())
    assert expected == pytest.approx(20, abs=1)
    front = in_debt()
    for n in range(MAX_TENANTS + 1):
        (gone,) = front.arrive(f"nothing {n}", tenant=ALICE, within=0.0)
        assert isinstance(gone, Expire)
    assert before_alice(front) == expected


def test_debt_stays_over_a_thousand_requests_of_another() -> None:
    """Carol's notes, all but one of them of what she had once, counted as tenants with more than Alice had."""
    expected = before_alice(in_debt())
    front = in_debt()
    for n in range(MAX_TENANTS + 1):
        front.arrive(f"c{n}", TEXT, tenant=CAROL)
        front.end(f"c{n}", output_tokens=20_000)
    assert before_alice(front) == expected


def test_the_start_does_not_fall_back_to_the_virtual_time() -> None:
    shares = Shares()
    shares.enter(BOB)
    flow = shares.enter(ALICE)
    flow.accounts[:] = [5.0, 6.0, 7.0]
    shares.leave(flow)
    for _ in range(3 * MAX_TENANTS):
        shares.leave(shares.enter(ALICE))
    flow = shares.enter(ALICE)
    assert [queue.start(flow) for queue in shares.queues] == [5.0, 6.0, 7.0]


def test_beyond_the_bound_the_one_that_had_least_is_forgotten() -> None:
    shares = Shares()
    shares.enter(BOB)
    tenants = [Tenant(f"t{n}") for n in range(MAX_TENANTS + 3)]
    flows = [shares.enter(tenant) for tenant in tenants]
    order = list(range(len(flows)))
    random.Random(1).shuffle(order)
    for n in order:
        flows[n].accounts[PLACES] = float(1 + n)
        shares.leave(flows[n])
    for n, tenant in enumerate(tenants):
        assert (shares.enter(tenant).accounts[PLACES] == 1 + n) == (n >= 3)


def test_whatever_happens_each_tenant_that_is_away_is_noted_once() -> None:
    rng, shares = random.Random(2), Shares()
    tenants = [Tenant(f"t{n}") for n in range(30)]
    shares.enter(BOB)
    here: list[Flow] = []
    for _ in range(5_000):
        if here and rng.random() < 0.5:
            flow = here.pop(rng.randrange(len(here)))
            flow.accounts[PLACES] += rng.choice([0.0, 0.0, 1.0])
            shares.leave(flow)
        else:
            here.append(shares.enter(rng.choice(tenants)))
        away = [(flow.accounts[PLACES], flow.name) for flow in shares._flows.values() if not flow.open]
        assert shares._idle == sorted(away)
