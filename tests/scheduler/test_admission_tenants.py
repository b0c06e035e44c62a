"""Many tenants in one queue: what a newcomer costs the loop."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from aiodisagg.scheduler.admission import AdmissionConfig, AdmissionQueue, Arrived, Shed
from aiodisagg.scheduler.prices import Prices, Work
from aiodisagg.scheduler.shares import Tenant

TENANTS = 500


def test_who_is_sent_away_from_a_queue_of_many_tenants_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tenant's line was priced three times: of a thousand tenants a refusal held the loop up for milliseconds."""
    queue = AdmissionQueue(AdmissionConfig(max_queue=TENANTS, min_in_flight=1), 2)
    for number in range(TENANTS + 2):
        queue.handle(Arrived(f"{number}", Work(100), Tenant(f"tenant {number}")), 0.0)
    price = Mock(side_effect=Prices.of, autospec=True)
    monkeypatch.setattr(Prices, "of", lambda prices, work: price(prices, work))
    (shed,) = queue.handle(Arrived("one more", Work(100), Tenant("new")), 0.0)
    assert isinstance(shed, Shed) and shed.reason == "queue_full" and price.call_count < 50
