"""Tower and prefill on one device, as a table."""

from __future__ import annotations

from aiodisagg.scheduler.turns import rows_may_go, tower_may_begin


def test_the_older_request_goes_first() -> None:
    assert tower_may_begin(1.0, 2.0)
    assert not tower_may_begin(2.0, 1.0)
    assert tower_may_begin(2.0, None)


def test_a_requests_next_image_goes_before_its_own_prefill() -> None:
    assert tower_may_begin(1.0, 1.0)


def test_rows_wait_for_the_tower_that_works_for_their_request_or_an_older_one() -> None:
    assert rows_may_go(1.0, None)
    assert rows_may_go(1.0, 2.0)
    assert not rows_may_go(1.0, 1.0)
    assert not rows_may_go(2.0, 1.0)


def test_tower_and_rows_never_wait_for_each_other() -> None:
    """Whatever the ages: if the tower must wait for a prefill, that prefill's further rows need not wait for it."""
    for item in (1.0, 2.0, 3.0):
        for prefill in (1.0, 2.0, 3.0):
            assert tower_may_begin(item, prefill) or rows_may_go(prefill, item)
