"""Which peers encode the items of a request: the simulator's view of the peers, handed to a policy."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from aiodisagg.scheduler.cost import Service, Size
from aiodisagg.scheduler.placement import Backlog, PeerView, Wanted, place_together
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


class _Curves:
    """The costs that placement asks for. ``size_bytes`` of a size is taken for its rows."""

    def __init__(self, costs: Costs, local: bool) -> None:
        self._costs, self._local, self.prepare_threads = costs, local, costs.times.prepare_threads

    def predict(self, size: Size) -> Service:
        costs = self._costs
        rows = size.size_bytes
        moved_s = costs.local_s(rows) if self._local else costs.rtt_s + costs.transfer_s(rows)
        return Service(costs.prepare_s(size.patches), costs.tower_s((size.patches,)), moved_s)


def choose(how: Placing, items: Sequence[Item], views: Sequence[EncoderView], costs: Costs, turn: int) -> list[str]:
    """The names of the peers, in the order of ``items``. ``turn`` counts the requests. ``views`` are changed."""
    if how is Placing.FIXED:
        return [views[turn % len(views)].name] * len(items)
    if how is Placing.ROWS:
        chosen = []
        for item in items:
            view = min(views, key=lambda one: (one.rows, one.name))
            view.rows += item.rows
            chosen.append(view.name)
        return chosen
    step_s = costs.mixed_s((), 0, 0.0)
    wanted = [
        Wanted(str(item.identity), Size(item.patches, 0, item.rows), costs.prefill_s(item.rows) - step_s)
        for item in items
    ]
    near, far = _Curves(costs, True), _Curves(costs, False)
    peers = [
        PeerView(
            view.name,
            near if view.local else far,
            Backlog(tower_s=view.wait_s),
            holding={str(identity): 0.0 for identity in view.holds},
        )
        for view in views
    ]
    own = next((view.name for view in views if view.local), "")
    return [placement.peer for placement in place_together(wanted, peers, own=own, step_s=step_s)]
