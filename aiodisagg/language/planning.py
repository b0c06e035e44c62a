"""Prompts are planned on a few threads, tenants in turn.

Theory. A plan costs milliseconds, that of a text of megabytes a second or two, and admission, which shares the service
among tenants, comes after it: so who floods this line would keep all others out of that one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from aiodisagg.models.base import ChatMessage
from aiodisagg.peer.turns import Workers

T = TypeVar("T")

PLANNERS = 2
"""Prompts that are planned at once. Planning is mostly Python: with a thread for each of a burst's prompts all of them
would be planned at its end, and none before; so the first is encoded while the last is planned. Each more of them takes
Python's lock from who prepares and launches the first pictures."""


class Planning(Generic[T]):
    """Methods belong to the loop's thread, but for ``close``, which waits for the threads.

    Args:
        plan: called on the threads.
    """

    def __init__(self, plan: Callable[[Sequence[ChatMessage]], T], threads: int = PLANNERS) -> None:
        self._plan, self._workers = plan, Workers(threads, "aiodisagg-plan")

    def close(self) -> None:
        self._workers.close()

    @property
    def waiting(self) -> int:
        return self._workers.waiting

    async def plan(self, messages: Sequence[ChatMessage], tenant: str) -> T:
        """What ``plan`` returns or raises. Raises Closed."""
        return await self._workers.run(tenant, partial(self._plan, messages))
