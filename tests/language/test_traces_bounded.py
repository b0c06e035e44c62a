"""What is kept and shown of requests with many pictures."""

from __future__ import annotations

import msgspec

from aiodisagg.language.trace import MAX_FINISHED, MAX_ITEMS, ItemTrace, RequestTrace, Traces
from aiodisagg.models.base import ItemKind, PlannedItem
from aiodisagg.protocol.messages import ItemKey

MANY = 1000


def begun(traces: Traces, name: str, count: int = MANY) -> tuple[RequestTrace, list[ItemKey]]:
    trace, keys = traces.begin(name), [ItemKey(int(name), index) for index in range(count)]
    for index, key in enumerate(keys):
        traces.item(trace, key, PlannedItem(f"{index:032x}", ItemKind.IMAGE, (1, 4, 4), 4, ((0, 4),), (b"",)))
    return trace, keys


def test_a_request_that_ended_keeps_the_items_that_took_longest() -> None:
    traces = Traces()
    trace, keys = begun(traces, "1")
    for index, item in enumerate(trace.items):
        item.complete_s = float(index * 7919 % MANY)
    trace.items[500].complete_s = -1.0  # never came
    trace.items += [ItemTrace("image", 4, "", stage="reused") for _ in range(MANY)]
    latest = {item.digest for item in trace.items if item.complete_s > MANY - MAX_ITEMS}
    traces.end(trace, keys, "failed")
    (kept,) = traces.recent()
    assert kept.item_count == 2 * MANY and len(kept.items) == MAX_ITEMS
    assert {item.digest for item in kept.items} == latest | {f"{500:032x}"}
    assert [item.digest for item in kept.items] == sorted(item.digest for item in kept.items), "in the prompt's order"
    assert not traces._items and len(trace.items) == MAX_ITEMS, "the rest is gone"


def test_of_open_requests_no_more_is_shown_and_nothing_lost() -> None:
    traces = Traces()
    trace, keys = begun(traces, "1")
    for key in keys[:-1]:
        traces.arrived(key, 4, 64)
    (shown,) = traces.recent()
    assert (shown.request_id, shown.item_count, len(shown.items)) == ("1", MANY, MAX_ITEMS)
    assert shown.items[-1].stage == "planned" and len(trace.items) == MANY
    traces.arrived(keys[-1], 4, 64)
    traces.end(trace, keys, "done")
    (ended,) = traces.recent()
    assert ended.item_count == MANY and {item.stage for item in ended.items} == {"complete"}


def test_small_requests_are_shown_whole() -> None:
    traces = Traces()
    (_, keys), (open_, _) = begun(traces, "1", 3), begun(traces, "2", MAX_ITEMS)
    traces.end(traces.open["1"], keys, "done")
    assert [(trace.item_count, len(trace.items)) for trace in traces.recent()] == [(3, 3), (MAX_ITEMS, MAX_ITEMS)]
    assert traces.recent()[1].items == open_.items


def test_all_that_is_shown_at_once() -> None:
    traces = Traces()
    for number in range(MAX_FINISHED + 1):
        trace, keys = begun(traces, str(number), 4 * MAX_ITEMS)
        traces.end(trace, keys, "done")
    begun(traces, "9999", 4 * MAX_ITEMS)
    shown = traces.recent()
    assert (len(shown), shown[0].request_id) == (MAX_FINISHED + 1, "1")
    assert len(msgspec.json.encode(shown)) < 8 << 20
