"""Whose turn it is on a device that an engine and a tower share: the older request's. Pure.

Theory
------
Two kinds of work that share a device at equal speed both end late: a tower beside a prefill halves both. One after the
other, the first ends twice as early and the second no later. In which order? By age of the request, as a monolith
does: then nobody overtakes, and the last is as late as on a monolith. Decodes are no party to this, they have
:class:`~aiodisagg.scheduler.slack.Slack`: a step costs them nothing by waiting for nobody.

And rows of a request for which, or for an older one, this device's tower is still at work are better not computed yet:
the chunk would take the device from the tower that the request waits for, and each chunk pays once for reading all
weights. They wait, and are computed in one piece. Rows from elsewhere for a device whose tower has nothing as old go
in at once: that is the overlap that gains.

One thing goes before age. A prompt whose rows are all here, as those of text alone are, is in nobody's way for long,
but would be for several times as long beside the tower. Where it goes before the tower's request in
:mod:`~aiodisagg.scheduler.order`, the tower waits for it. It does not starve: what it works for is due in the end.

Ages are any numbers that grow with the time at which a request was let in.
"""

from __future__ import annotations

from aiodisagg.scheduler.order import Claim, Order


def tower_may_begin(oldest_item: float, oldest_prefill: float | None) -> bool:
    """Whether the tower's next batch goes before the engine's prefill.

    Args:
        oldest_item: age of the request whose item is next. oldest_prefill: of the request that has waited longest
            among those with prompt tokens that can be computed; None: there is none.
    """
    return oldest_prefill is None or oldest_item <= oldest_prefill


def prefill_goes_first(order: Order, item: Claim, prefill: Claim | None, now: float) -> bool:
    """Whether the tower's next batch waits for a prompt that came later.

    Args:
        item: of the request whose item is next. prefill: of the first in order whose prompt could be computed to its
            end now; None: there is none.
    """
    return prefill is not None and order.rank(prefill, now) < order.rank(item, now)


def rows_may_go(request: float, oldest_encoding: float | None) -> bool:
    """Whether rows of a request that was let in at ``request`` are given to the engine now.

    Args:
        oldest_encoding: age of the oldest request with an item in the tower or ready for it; None: there is none.
    """
    return oldest_encoding is None or request < oldest_encoding
