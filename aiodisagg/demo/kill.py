"""``--kill-encoder``: ends an encode peer while items are half here, so that a person sees them move.

What a look at another process shows is over when it is read: the item that was half here may be complete by then, and
a peer killed for it leaves only items that had not begun, of which nothing is kept. So the peer is stopped first. What
it has sent still arrives, nothing else does: when looks no longer differ, they show what the kill will find.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Protocol

LOOK_S = 0.001
"""Between two looks at another process, which announces nothing."""
SETTLE_S = 0.01
SAME_LOOKS = 3
"""Equal looks after the stop: what was on its way is here."""

Look = Callable[[], Awaitable[list[dict[str, Any]]]]
"""The language peer's traces, as ``/debug/requests`` has them."""


class Members(Protocol):
    """Of a Cluster, what is needed here."""

    def kill(self, name: str) -> object: ...

    def signal(self, name: str, number: signal.Signals) -> None: ...


def _items(traces: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Items of open requests that were asked of a peer, by a name of their own."""
    for trace in traces:
        for index, item in enumerate(trace["items"]):
            if trace["total_s"] < 0 and item["peers"]:
                yield f"{trace['request_id']}.{index}", item


def half_here(traces: Iterable[dict[str, Any]]) -> Counter[str]:
    """Encode peers by how many items they owe of which at least half is here."""
    return Counter(
        item["peers"][-1]
        for _, item in _items(traces)
        if item["rows"] <= 2 * item["rows_arrived"] < 2 * item["rows"]
    )  # fmt: skip


async def kill_in_mid_transfer(members: Members, look: Look) -> str:
    """Kills the encode peer that owes most half-arrived items, as soon as there is one; returns its name."""
    while True:
        if owed := half_here(await look()):
            name = owed.most_common(1)[0][0]
            members.signal(name, signal.SIGSTOP)
            if half_here(await _settled(name, look))[name]:
                members.kill(name)
                return name
            members.signal(name, signal.SIGCONT)
        await asyncio.sleep(LOOK_S)


async def _settled(stopped: str, look: Look) -> list[dict[str, Any]]:
    """What a look shows when nothing of a stopped peer is under way any more."""
    before, same = None, 0
    while True:
        traces = await look()
        arrived = {
            key: item["rows_arrived"]
            for key, item in _items(traces)
            if item["peers"][-1] == stopped and item["rows_arrived"]
        }
        before, same = arrived, same + 1 if arrived == before else 1
        if same == SAME_LOOKS:
            return traces
        await asyncio.sleep(SETTLE_S)
