"""In which steps a prompt is computed whose parts arrive one after another.

Each step costs something besides its tokens (reading the weights of a large model), so neither a step for each part is
best, nor waiting for the last one. Pure.

Theory. A state is how many parts are computed, and the sooner it is reached the better, whatever follows. So it is
enough to know when each is reached soonest (Bellman): from each, the next step begins at once or when one of the later
parts arrives, and takes all that is there by then.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

MOST = 24
"""Parts that are looked at one by one; of more, neighbours count as one, but for the first, which may be there."""


def plan(at: Sequence[float], cost_s: Callable[[int, int], float], since: float = 0.0) -> tuple[float, float]:
    """When the first step should begin, and when the last part is computed then.

    Args:
        at: when each part is there and all before it; ascending, at least one.
        cost_s: ``cost_s(i, k)``: seconds of a step for the parts ``[i, k)``.
        since: from then on steps can be computed.
    """
    count = len(at)
    groups = min(count, MOST)
    edges = [0, *(1 + j * (count - 1) // max(1, groups - 1) for j in range(groups))]
    there = [at[edge - 1] for edge in edges[1:]]
    done, first = [since, *[math.inf] * groups], [math.inf] * (groups + 1)
    for i in range(groups):
        for j in range(i, groups):
            begin = max(done[i], there[j])
            k = bisect_right(there, begin)
            end = begin + cost_s(edges[i], edges[k])
            if end < done[k]:
                done[k], first[k] = end, first[i] if i else begin
    return first[groups], done[groups]
