"""``--kill-encoder``: ends an encode peer while items are half here, so that a person sees them move.

What a look at another process shows is over when it is read: the item that was half here may be complete by then, and
a peer killed for it leaves only items that had not begun, of which nothing is kept. So the peer is stopped first. What
it has sent still arrives, nothing else does: when looks no longer differ, they show what the kill will find. If that is
nothing, the peer may run for a moment and is stopped again: it goes in slow motion from the first encoded item on, and
the rows of an item cannot all pass between two looks, however slow a look is.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Protocol

MOMENT_S = 0.001
"""Between two looks at another process, which announces nothing; and how long a stopped one may go on."""
SETTLE_S = 0.01
SAME_LOOKS = 3
"""Equal looks after the stop: what was on its way is here."""

Look = Callable[[], Awaitable[list[dict[str, Any]]]]
"""The language peer's traces, as ``/debug/requests`` has them."""


class Members(Protocol):
    """Of a Cluster, what is needed here."""

    def kill(self, name: str) -> object: ...

    def signal(self, name: str, number: signal.Signals) -> None: ...


def _owed(traces: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Items of open requests that are not complete: a name of their own, the peer that was asked last, the item."""
    for trace in traces:
        for index, item in enumerate(trace["items"]):
            if trace["total_s"] < 0 and item["peers"] and item["rows_arrived"] < item["rows"]:
                yield f"{trace['request_id']}.{index}", item["peers"][-1], item


def partly_here(traces: Iterable[dict[str, Any]]) -> Counter[str]:
    """Encode peers by how many items they owe of which some rows are here."""
    return Counter(peer for _, peer, item in _owed(traces) if item["rows_arrived"])


def on_the_way(traces: Iterable[dict[str, Any]]) -> Counter[str]:
    """Encode peers by how many items they owe whose rows are made."""
    return Counter(peer for _, peer, item in _owed(traces) if item["encoded_s"] >= 0 or item["rows_arrived"])


async def kill_in_mid_transfer(members: Members, look: Look) -> str:
    """Kills the encode peer that owes most items on the way, when at least one is partly here; returns its name."""
    while True:
        moving = on_the_way(await look())
        while moving:
            name = moving.most_common(1)[0][0]
            members.signal(name, signal.SIGSTOP)
            traces = await _settled(name, look)
            if partly_here(traces)[name]:
                members.kill(name)
                return name
            members.signal(name, signal.SIGCONT)
            await asyncio.sleep(MOMENT_S)
            moving = on_the_way(traces)
        await asyncio.sleep(MOMENT_S)


async def _settled(stopped: str, look: Look) -> list[dict[str, Any]]:
    """What a look shows when nothing of a stopped peer is under way any more."""
    before, same = None, 0
    while True:
        traces = await look()
        arrived = {key: item["rows_arrived"] for key, peer, item in _owed(traces) if peer == stopped}
        same = same + 1 if arrived == before else 1
        before = arrived
        if same == SAME_LOOKS:
            return traces
        await asyncio.sleep(SETTLE_S)
