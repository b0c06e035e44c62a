"""Which peers encode the items of a request: the simulator's view of the peers, handed to a policy."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from aiodisagg.scheduler.placement import Candidate, place
from aiodisagg.simulate.request import Item
from aiodisagg.simulate.times import Costs


class Placing(enum.StrEnum):
    """How encoders are chosen."""

    FIXED = "fixed"
    """All items of a request go to one peer, the next in turn: a split whose halves do not know each other's load."""
    ROWS = "rows"
    """Each item goes to the peer that owes the fewest rows."""
    FINISH = "finish"
    """Each item goes where it is predicted to be here first; who holds it need not encode it."""


@dataclass(slots=True)
class EncoderView:
    """What is known of a peer with a tower. ``wait_s``: until a new item could begin there; ``rows``: asked for and
    not yet there; ``holds``: those of the identities in question that it has or is encoding."""

    name: str
    wait_s: float
    rows: int
    local: bool
    holds: frozenset[int]


def choose(how: Placing, items: Sequence[Item], views: Sequence[EncoderView], costs: Costs, turn: int) -> list[str]:
    """The names of the peers, in the order of ``items``. ``turn`` counts the requests. ``views`` are changed."""
    if how is Placing.FIXED:
        return [views[turn % len(views)].name] * len(items)
    chosen = []
    for item in items:
        if how is Placing.ROWS:
            name = place((Candidate(view.name, view.rows) for view in views), frozenset())
            view = next(view for view in views if view.name == name)
        else:
            view = min(views, key=lambda v: (_finish_s(item, v, costs), v.name))
        view.rows += item.rows
        if item.identity not in view.holds:
            view.wait_s += costs.tower_s((item.patches,))
            view.holds |= {item.identity}
        chosen.append(view.name)
    return chosen


def _finish_s(item: Item, view: EncoderView, costs: Costs) -> float:
    held = item.identity in view.holds
    encoded = 0.0 if held else view.wait_s + costs.prepare_s(item.patches) + costs.tower_s((item.patches,))
    return encoded + (0.0 if view.local else costs.rtt_s + costs.transfer_s(item.rows))
