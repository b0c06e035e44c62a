"""Which peers encode the items of a request."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from aiodisagg.scheduler.placement import PeerView, Placement, Wanted, place_together
from aiodisagg.scheduler.trials import Trials
from aiodisagg.simulate.known import size_of
from aiodisagg.simulate.request import Item
from aiodisagg.simulate.times import Costs


class Placing(enum.StrEnum):
    """How encoders are chosen."""

    FIXED = "fixed"
    """All items of a request go to one peer, the next in turn: a split whose halves do not know each other's load."""
    FINISH = "finish"
    """Each item goes where it is predicted to be here first; who holds it need not encode it."""


def first_finish(
    items: Sequence[Item], views: Sequence[PeerView], own: str, costs: Costs, trials: Trials
) -> tuple[Placement, ...]:
    """As :meth:`aiodisagg.language.placing.Placing.plan`; what prefill takes is known exactly."""
    step_s = costs.mixed_s((), 0, 0.0)
    wanted = [Wanted(str(item.identity), size_of(item, costs), costs.prefill_s(item.rows) - step_s) for item in items]
    placed = place_together(wanted, views, own=own, step_s=step_s)
    trial = None if placed[-1].held else trials.place(wanted[-1], views)
    if trial is not None:
        placed = (*placed[:-1], trial)
    for placement in placed:
        trials.asked(placement.peer, trial=placement is trial)
    return placed
