"""Where items are encoded: wherever they are predicted to be complete first.

A peer is a flow shop: files wait for a preparing thread, prepared items for the tower, rows for the link. The local
tower is a candidate like any other; its rows are not transferred. Before time counts, peers that drain come last, and
suspects before them; and among equals a peer that holds the digest, or is encoding it, wins. Nothing is encoded twice
while anybody has it, unless the way from there alone takes longer than encoding it elsewhere, by more than the time
that this takes from a tower: a link may be slow, or full of other rows.

A request's items are placed together. Prompt order is tried, and the largest first, which balances better; what counts
is when the last of the prompt can be computed, in the steps that suit it (:mod:`~aiodisagg.scheduler.pieces`). The
device that computes the prompt cannot encode meanwhile, so less than its share is tried for its own tower: what others
encode can arrive while it computes. Ties go by name, so that equal inputs give equal answers.

Others place items on the same peers, and know as little of this side's as is known here of theirs. If each took the
first in time, all would take the same one. So to a finish is added what it may be off: the mean error of predictions
of that peer, times a draw from an exponential distribution of mean one, which is a hash of digest and peer. Who is
alone predicts well and chooses the best; the more others there are, the more the choice is one by chance among peers
that are about as good. A picture that several language peers want at once tends to go to one peer, and is encoded once.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple, Protocol

import xxhash

from aiodisagg.scheduler import pieces
from aiodisagg.scheduler.cost import Service, Size

MOST_PAIRS = 1 << 16
"""Of an item and a peer that are looked at for one request, but for the first two orders. Each takes a third of a
microsecond of the loop, and an item as much as sixteen."""


class Standing(enum.IntEnum):
    """How good a candidate is before time counts; lower is better."""

    READY = 0
    SUSPECT = 1
    """Perhaps only slow, perhaps gone."""
    DRAINING = 2
    """Finishes what it has."""


class Backlog(NamedTuple):
    """Seconds until a preparing thread, the tower and the link of a peer are done with what was asked before.

    ``there_s``: until the link is done with the rows that exist. Who holds an item's rows waits for no others.
    """

    prepare_s: float = 0.0
    tower_s: float = 0.0
    transfer_s: float = 0.0
    there_s: float = 0.0


class Costs(Protocol):
    """Of one peer: :class:`~aiodisagg.scheduler.cost.PeerCosts`, or measured curves."""

    prepare_threads: int

    def predict(self, size: Size) -> Service: ...


class PeerView(NamedTuple):
    """A peer that could take items.

    ``holding``: seconds until the rows of digests that it holds (0.0) or is encoding exist; others are not in it.
    ``doubt``: mean relative error of the finishes that were predicted of it.
    """

    peer: str
    costs: Costs
    backlog: Backlog = Backlog()
    standing: Standing = Standing.READY
    holding: Mapping[str, float] = MappingProxyType({})
    doubt: float = 0.0

    def unsure_s(self, digest: str, finish_s: float) -> float:
        """How much later than ``finish_s`` the digest may be there; see the module's text."""
        if not self.doubt:
            return 0.0
        chance = (xxhash.xxh3_64_intdigest((digest + self.peer).encode()) + 1) / 2.0**64
        return self.doubt * finish_s * -math.log(chance)


@dataclass(frozen=True, slots=True)
class Wanted:
    """An item to be placed. ``prefill_s``: what the language half needs for its rows once they are there."""

    digest: str
    size: Size
    prefill_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Placement:
    """``ready_s``, ``finish_s``: from now until the rows exist, and until they are here. ``held``: not encoded anew."""

    peer: str
    ready_s: float
    finish_s: float
    held: bool
    service: Service


def place(wanted: Wanted, peers: Iterable[PeerView]) -> Placement | None:
    """The peer where the item is complete first, as far as is known; None if there is no peer."""
    best: list[PeerView | None] = [None, None]
    least: list[tuple[Standing, float, str] | None] = [None, None]
    digest, size = wanted.digest, wanted.size
    for view in peers:
        held = view.holding.get(digest)
        kind, at_least = held is None, least[held is None]
        if at_least is not None and view.standing > at_least[0]:
            continue
        finish_s = finish(view.costs.predict(size), view.backlog, held)[1]
        rank = (view.standing, finish_s, view.peer)
        if at_least is not None and rank >= at_least:  # and it may only be later
            continue
        rank = (view.standing, finish_s + view.unsure_s(digest, finish_s), view.peer)
        if at_least is None or rank < at_least:
            best[kind], least[kind] = view, rank
    holder, other = (_at(view, digest, size) for view in best)
    if holder is None or other is None:
        return holder or other
    (held_standing, *_), (standing, *_) = filter(None, least)
    if held_standing != standing:
        return holder if held_standing < standing else other
    return holder if _is_worth_it(holder, other) else other


def _at(view: PeerView | None, digest: str, size: Size) -> Placement | None:
    if view is None:
        return None
    service, held = view.costs.predict(size), view.holding.get(digest)
    return Placement(view.peer, *finish(service, view.backlog, held), held is not None, service)


def _is_worth_it(holder: Placement, other: Placement) -> bool:
    """Whether rows that exist, or are about to, are sent from there; see the module's text."""
    return holder.finish_s - holder.ready_s <= other.finish_s + other.service.tower_s


def finish(service: Service, ahead: Backlog, held_s: float | None = None) -> tuple[float, float]:
    """Seconds until an item's rows exist, and until they are here. ``held_s``: as in ``PeerView.holding``."""
    prepare_s, tower_s, transfer_s = service
    prepare_ahead_s, tower_ahead_s, transfer_ahead_s, there_s = ahead
    if held_s is not None:
        return held_s, max(held_s, there_s) + transfer_s
    ready_s = max(prepare_ahead_s + prepare_s, tower_ahead_s) + tower_s
    return ready_s, max(ready_s, transfer_ahead_s) + transfer_s


def place_together(
    wanted: Sequence[Wanted], peers: Sequence[PeerView], *, own: str = "", step_s: float = 0.0
) -> tuple[Placement, ...]:
    """A peer for each item, in the order of ``wanted``, which is the prompt's; empty if there is no peer.

    ``own``, ``step_s``: as ``computed_s`` has them. Of hundreds of items at dozens of peers fewer orders are tried.
    """
    if len(wanted) == 1:
        single = place(wanted[0], peers)
        return () if single is None else (single,)
    if not peers or not wanted:
        return ()
    best = min(view.standing for view in peers)
    peers = sorted((view for view in peers if view.standing == best), key=lambda view: view.peer)
    sizes = {item.size: [view.costs.predict(item.size) for view in peers] for item in wanted}
    services = [sizes[item.size] for item in wanted]
    unsure_s = [  # bounded: of equal peers nobody gets a second item before all have one
        min(view.unsure_s(wanted[0].digest, finish(service, view.backlog)[1]), service.tower_s)
        for view, service in zip(peers, services[0], strict=True)
    ]
    in_order = _assign(range(len(wanted)), wanted, peers, services, unsure_s)
    if len(peers) == 1:
        return _run(in_order, wanted, peers, services)
    by_size = sorted(range(len(wanted)), key=lambda i: (-wanted[i].size.patches, i))
    choices = [in_order]
    if by_size != list(range(len(wanted))):
        choices.append(_assign(by_size, wanted, peers, services, unsure_s))
    at = next((index for index, view in enumerate(peers) if view.peer == own), None)
    if at is not None:
        fewer = in_order.count(at) // 2
        while fewer and (len(choices) + 1) * len(wanted) * (len(peers) + 16) <= MOST_PAIRS:
            choices.append(_assign(range(len(wanted)), wanted, peers, services, unsure_s, at, fewer))
            fewer //= 2
    placed = [_run(choice, wanted, peers, services) for choice in choices]
    return min(placed, key=lambda one: computed_s(wanted, one, own=own, step_s=step_s))


def computed_s(wanted: Sequence[Wanted], placed: Sequence[Placement], *, own: str = "", step_s: float = 0.0) -> float:
    """Seconds until the last item's rows are computed by the language half, which takes items in prompt order.

    ``step_s``: what each of its steps takes besides. ``own``: the peer whose device computes the prompt, once it has
    encoded what it shall of it.
    """
    busy_s = max((one.ready_s for one in placed if one.peer == own), default=0.0)
    needed = list(accumulate((item.prefill_s for item in wanted), initial=0.0))
    there = list(accumulate((one.finish_s for one in placed), max))
    return pieces.plan(there, lambda i, k: step_s + needed[k] - needed[i], busy_s)[1] if placed else busy_s


class _Queues:
    """The peers' queues while items are put into them."""

    def __init__(self, peers: Sequence[PeerView]) -> None:
        self._peers = peers
        self._ahead = [view.backlog for view in peers]
        self._holding: dict[str, dict[int, float]] = {}
        """By digest and peer, as ``PeerView.holding``."""
        for index, view in enumerate(peers):
            for digest, held_s in view.holding.items():
                self._holding.setdefault(digest, {})[index] = held_s

    def best(self, digest: str, services: Sequence[Service], unsure_s: Sequence[float], without: int) -> int:
        """The index of the peer where the item is complete first. ``without``: which is not to encode it."""
        holding, least_s, best = self._holding.get(digest, {}), math.inf, -1
        for index, (prepare_s, tower_s, transfer_s) in enumerate(services):  # ``finish``, written out, as of most items
            prepare_ahead_s, tower_ahead_s, transfer_ahead_s, _ = self._ahead[index]
            end_s = prepare_ahead_s + prepare_s
            end_s = (end_s if end_s > tower_ahead_s else tower_ahead_s) + tower_s
            end_s = (end_s if end_s > transfer_ahead_s else transfer_ahead_s) + transfer_s + unsure_s[index]
            if end_s < least_s and index != without and index not in holding:
                least_s, best = end_s, index
        if not holding:
            return best
        found = {index: self._at(index, digest, services[index]) for index in holding}
        holder = min(holding, key=lambda index: (found[index].finish_s + unsure_s[index], index))
        other = self._at(best, digest, services[best]) if best >= 0 else None
        return holder if other is None or _is_worth_it(found[holder], other) else best

    def _at(self, index: int, digest: str, service: Service) -> Placement:
        held_s = self._holding.get(digest, {}).get(index)
        ready_s, finish_s = finish(service, self._ahead[index], held_s)
        return Placement(self._peers[index].peer, ready_s, finish_s, held_s is not None, service)

    def put(self, index: int, digest: str, service: Service) -> None:
        holding, (prepare_s, tower_s, transfer_s, there_s) = self._holding.setdefault(digest, {}), self._ahead[index]
        held_s = holding.get(index)
        ready_s = finish(service, self._ahead[index], held_s)[0]
        if held_s is None:
            prepare_s += service.prepare_s / self._peers[index].costs.prepare_threads
            tower_s = ready_s
        if service.transfer_s:
            transfer_s = max(ready_s, transfer_s) + service.transfer_s
            there_s += 0.0 if held_s is None else service.transfer_s  # before rows exist the link is free for others
        self._ahead[index] = Backlog(prepare_s, tower_s, transfer_s, there_s)
        holding[index] = ready_s

    def placed(self, index: int, digest: str, service: Service) -> Placement:
        """As ``put``; what is to be told of it."""
        placed = self._at(index, digest, service)
        self.put(index, digest, service)
        return placed


def _assign(
    order: Iterable[int], wanted: Sequence[Wanted], peers: Sequence[PeerView], services: Sequence[Sequence[Service]],
    unsure_s: Sequence[float], bounded: int = -1, most: int = 0,
) -> list[int]:  # fmt: skip
    """For each item the index of its peer, chosen one after the other in ``order``. ``unsure_s``: added to what each
    peer is predicted to take. The one at ``bounded`` encodes nothing once it has ``most``."""
    queues, chosen = _Queues(peers), [-1] * len(wanted)
    for i in order:
        digest = wanted[i].digest
        best = queues.best(digest, services[i], unsure_s, -1 if most > 0 else bounded)
        most -= best == bounded
        queues.put(best, digest, services[i][best])
        chosen[i] = best
    return chosen


def _run(
    chosen: Sequence[int], wanted: Sequence[Wanted], peers: Sequence[PeerView], services: Sequence[Sequence[Service]]
) -> tuple[Placement, ...]:
    """What becomes of a choice when the items are asked for in prompt order."""
    queues = _Queues(peers)
    return tuple(queues.placed(index, wanted[i].digest, services[i][index]) for i, index in enumerate(chosen))
