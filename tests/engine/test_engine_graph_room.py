"""Steps with several prompts where steps up to a size are graphs."""

from __future__ import annotations

import pytest
from test_engine_schedule import make, ranges, run

from aiodisagg.engine.pace import Pace, StepShape
from aiodisagg.engine.schedule import Scheduler
from aiodisagg.scheduler.order import Order


@pytest.mark.parametrize("order", Order)
def test_prompts_that_go_along_leave_a_step_the_size_of_a_graph(order: Order) -> None:
    """Two at once in a step that is launched took longer than one after the other, and held up all answers."""
    s = make(num_pages=64, token_budget=64, order=order)
    s.replayed = 32
    for name, tokens in (("a", 18), ("b", 18), ("c", 60)):
        s.add(name, tokens, 8, front=tokens)
    assert ranges(run(s)) == [("a", 0, 18), ("b", 0, 14)], "though it would be near its end"
    found = ranges(run(s))
    assert found[:2] == [("a", 18, 19), ("b", 14, 18)] and found[2][0] == "c" and 4 < found[2][2] <= 27
    assert ranges(run(s)) == [("a", 19, 20), ("b", 18, 19), ("c", found[2][2], 60)], "who is first has all of the room"


def test_a_graph_leaves_no_more_room_than_the_pace() -> None:
    pace = Pace(0.05)
    for tokens in (100, 200, 300, 400) * 4:
        pace.observe(StepShape(prefill=tokens), 0.01 + tokens * 1e-4)
    s = Scheduler(num_pages=1000, page_size=4, token_budget=2000, max_running=8, pace=pace)
    s.replayed = 1500
    for name, tokens in (("a", 100), ("b", 900)):
        s.add(name, tokens, 8, front=tokens)
    a, b = run(s).segments
    assert a.tokens == 100 and b.tokens <= 225, "twice as long as with a alone, and no longer"
