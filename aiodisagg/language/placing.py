"""Which encode peer gets which item: the pure policies, fed with what is seen of the peers."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from aiodisagg.bootstrap.registry import Load, PeerEntry, PeerState
from aiodisagg.language.complaints import Complaints
from aiodisagg.language.errands import Errand
from aiodisagg.language.peers import EncodePeer, EncodePeers
from aiodisagg.peer import metrics
from aiodisagg.protocol.counters import PeerLabels
from aiodisagg.protocol.events import ItemSpec
from aiodisagg.protocol.messages import ItemKey, Message, Offer, Progress, Refuse, Want
from aiodisagg.scheduler.advertise import PREFIX, advertised
from aiodisagg.scheduler.cost import PrefillCosts, Size
from aiodisagg.scheduler.health import NO_FAULT, HealthConfig, Hedges, Poison, Standings
from aiodisagg.scheduler.placement import PeerView, Placement, Standing, Wanted, place_together
from aiodisagg.scheduler.trials import Trials

logger = logging.getLogger(__name__)

PREFILL = PrefillCosts(step_s=5e-3, token_s=2e-5)
"""To begin with: modelled for Qwen3-VL-30B-A3B on an H200."""

COMPARED, AGAIN = 16, 8
"""Peers that are compared for an item where there are more, at least; twice as many as a request has items. Of these so
many are the ones that were chosen last."""

STANDINGS = {
    PeerState.JOINING: Standing.SUSPECT,
    PeerState.READY: Standing.READY,
    PeerState.SUSPECT: Standing.SUSPECT,
    PeerState.DRAINING: Standing.DRAINING,
}


class Placing:
    """Methods belong to the loop's thread; ``now`` is the loop's time.

    Args:
        peers: the links; their books are kept here.
        row_bytes: of a packed row.
    """

    def __init__(self, peers: EncodePeers, row_bytes: int, health: HealthConfig) -> None:
        self._peers, self._row_bytes = peers, row_bytes
        self.own = ""
        """Incarnation of this peer's own tower, if it has one: it is always compared."""
        self.hedges: Hedges[ItemKey] = Hedges(health)
        self.poison, self.standings, self.trials = Poison(health), Standings(health), Trials()
        self.labels = PeerLabels()
        """Of the encode peers, for whatever is counted of them."""
        self.moves = 0
        self._complaints = Complaints()
        self.errands: dict[ItemKey, Errand] = {}
        self._loads: dict[str, tuple[Load, float]] = {}
        """By incarnation, linked or not: what membership said last, and when. What is as before is not said again."""
        self._turn = 0
        self._chosen: OrderedDict[str, None] = OrderedDict()
        """The peers that items to be encoded were placed at last, the latest at the end."""
        self.prefill = PREFILL
        """What the engine has learned, set by who owns it."""

    def errand(self, key: ItemKey, spec: ItemSpec, avoid: frozenset[str] = frozenset()) -> None:
        """The item is going to be placed."""
        self.errands[key] = Errand(spec, Size.of(spec.grid_thw, spec.rows * self._row_bytes), avoid)

    def free(self, key: ItemKey) -> None:
        """The item may be asked of whom it was to avoid: nobody else is at it any more."""
        if (errand := self.errands.get(key)) is not None:
            errand.avoid = frozenset()

    def plan(self, keys: Sequence[ItemKey], now: float) -> None:
        """Chooses peers for a request's items together; ``choose`` keeps to it while those peers are there."""
        errands = [self.errands[key] for key in keys]
        free = [errand for errand in errands if not self.poison.suspect(errand.spec.digest, now)]
        half = sum(errand.spec.rows for errand in errands) / 2
        token_s = self.prefill.token_s + self.prefill.pair_s * half
        views = self._candidates(self._peers.linked, [errand.spec.digest for errand in free], now)
        wanted = [Wanted(errand.spec.digest, errand.size, token_s * errand.spec.rows) for errand in free]
        placed = place_together(wanted, views, own=self.own, step_s=self.prefill.step_s)
        for errand, placement in zip(free, placed, strict=False):
            errand.planned, errand.trial = placement, ""
        anew = placed and not placed[-1].held and not free[-1].avoid
        if anew and (trial := self.trials.place(wanted[-1], views)):
            free[-1].planned, free[-1].trial = trial, trial.peer

    def choose(self, key: ItemKey, avoid: frozenset[str], now: float) -> Placement | None:
        """The linked peer for an item's next epoch; None: there is none that it may have now."""
        errand = self.errands[key]
        planned, errand.planned = errand.planned, None
        if planned is None or planned.peer in avoid or self._peers.get(planned.peer) is None:
            return self.best(errand, avoid, now)
        if self._standing(planned.peer, now) is Standing.SUSPECT:  # since an item of the same request, perhaps
            return self.best(errand, avoid, now)
        return planned

    def best(self, errand: Errand, avoid: frozenset[str], now: float) -> Placement | None:
        """As ``choose``, and nothing comes of it."""
        digest, never = errand.spec.digest, errand.avoid | errand.drained
        linked = [peer for peer in self._peers.linked if peer.incarnation not in never]
        shunned = avoid.union(self.standings.doubted) if avoid else avoid
        better = [peer for peer in linked if peer.incarnation not in shunned] or [
            peer for peer in linked if peer.incarnation not in avoid
        ]
        placed = place_together([Wanted(digest, errand.size)], self._candidates(better or linked, [digest], now))
        return placed[0] if placed else None

    def _candidates(self, linked: Sequence[EncodePeer], digests: Sequence[str], now: float) -> list[PeerView]:
        """Which of these peers are compared: all, or of many the next ones in turn, those that were chosen last, the
        own tower, and who may hold an item.

        Of equal peers the best of a few is about as good as the best of all, which would be looked at for every item.
        Where few are fast, or slow ones are next to each other, most few have no fast one among them: so the best are
        remembered (Mitzenmacher, Prabhakar, Shah 2002: load balancing with memory).
        """
        count = max(COMPARED, 2 * len(digests))
        if len(linked) <= count:
            return self._views(linked, digests, now)
        count -= len(self._chosen)
        start = self._turn = self._turn % len(linked)
        self._turn += count
        chosen = [*linked[start : start + count], *linked[: max(0, start + count - len(linked))]]
        names, again = {peer.incarnation for peer in chosen}, {*self._chosen, self.own}
        prefixes = {digest[:PREFIX] for digest in digests}
        for peer in linked:
            if peer.incarnation not in names and (
                peer.incarnation in again or not peer.digests.isdisjoint(prefixes) or peer.book.knows(digests)
            ):
                chosen.append(peer)
        views = self._views(chosen, digests, now)
        return views if any(view.standing is Standing.READY for view in views) else self._views(linked, digests, now)

    def _views(self, peers: Sequence[EncodePeer], digests: Sequence[str], now: float) -> list[PeerView]:
        views = []
        for peer in peers:
            book, who = peer.book, peer.incarnation
            holding, standing = book.holding(digests, now), self._standing(who, now)
            if peer.digests:
                holding |= {d: 0.0 for d in digests if d not in holding and advertised(d, peer.digests)}
            views.append(PeerView(who, book.costs, book.backlog(now), standing, holding, book.doubt))
        return views

    def _standing(self, peer: str, now: float) -> Standing:
        """Who refused as many items as make a suspect is one until it is known whether others deliver them."""
        standing, refused = self.standings.of(peer, now), self._complaints.pending.get(peer, 0)
        return max(standing, Standing.SUSPECT) if refused >= self.standings.config.failures else standing

    def asked(self, key: ItemKey, placement: Placement, now: float) -> EncodePeer:
        """The item is placed."""
        errand, peer = self.errands[key], self._peers.get(placement.peer)
        assert peer is not None
        self.moves += errand.last not in ("", placement.peer)
        errand.peer, errand.book, errand.last = peer, peer.book, placement.peer
        errand.asked, errand.refused = now, False
        trial = errand.trial == placement.peer
        self.trials.asked(placement.peer, trial=trial)
        if not trial and not placement.held:
            self._chosen[placement.peer] = None
            self._chosen.move_to_end(placement.peer)
            if len(self._chosen) > AGAIN:
                self._chosen.popitem(last=False)
        if trial_s := self.standings.asked(placement.peer, now):
            logger.info(
                "encode peer %s (%s) is tried with item %s; a suspect for %g s more if that fails",
                peer.name, placement.peer, key, trial_s,
            )  # fmt: skip
        peer.book.asked(key, errand.spec.digest, errand.size, placement, now)
        self.hedges.asked(key, placement.finish_s, now)
        return peer

    def refused(self, peer: str, refusal: Refuse, now: float) -> None:
        """The peer will not provide the item; to be said before the item is placed anew."""
        errand = self.errands.get(refusal.key)
        if errand is None or errand.peer is None or errand.last != peer:
            return
        errand.refused = True
        self._complaints.refused(peer, errand.peer.name, refusal, now)
        if refusal.code == "draining":
            self.standings.drains(peer)
            errand.drained.add(peer)
            errand.turned_away = now
        elif refusal.code not in NO_FAULT:
            self.standings.refused(peer)

    def failed(self, errand: Errand, why: str, now: float) -> None:
        """The peer of the errand did not do what it was asked for, and another may."""
        self._failed(errand.last, "" if errand.peer is None else errand.peer.name, why, now)

    def _failed(self, peer: str, name: str, why: str, now: float) -> None:
        if seconds := self.standings.failed(peer, now):
            logger.warning("encode peer %s (%s) is a suspect for %g s: %s", name, peer, seconds, why)

    def judged(self, incarnation: str, now: float) -> dict[str, object]:
        """How a peer stands, for people."""
        standing = self.standings.of(incarnation, now).name.lower()
        return {"standing": standing, "last_refusal": self._complaints.last_refusal(incarnation)}

    def absent_s(self, key: ItemKey, now: float) -> float | None:
        """For how long nobody has been there who takes the item, since all that are linked drain; None: somebody may
        take it."""
        errand, linked = self.errands[key], self._peers.linked
        if not linked:
            return self._peers.absent_s
        if any(peer.incarnation not in errand.drained for peer in linked):
            return None
        return min(now - errand.turned_away, self._peers.hoped_s)

    def given_up(self, key: ItemKey, now: float) -> None:
        """The item is to be placed (anew). A peer without a link did not fail: it is asked for nothing meanwhile."""
        errand = self.errands[key]
        if errand.peer is not None and not errand.refused and self._peers.get(errand.last) is not None:
            what = f"does not deliver item {key}: another peer is asked"
            self._complaints.warn(errand.last, errand.peer.name, "silent", what)
            self.failed(errand, f"it did not deliver item {key}", now)
        self.left(key)

    def left(self, key: ItemKey) -> None:
        """The item's peer has nothing more to do with it."""
        errand = self.errands.get(key)
        if errand is not None and errand.book is not None:
            errand.book.left(key)
            errand.peer = errand.book = None
        self.hedges.settled(key)

    def over(self, key: ItemKey, *, complete: bool = False) -> None:
        """The item is fetched, given up or failed."""
        errand = self.errands.get(key)
        if errand is None:
            return
        if complete:
            self.poison.encoded(errand.spec.digest)
            if errand.peer is not None:
                if self.standings.delivered(errand.last):
                    logger.info("encode peer %s (%s) delivers again: no suspect", errand.peer.name, errand.last)
                self._complaints.delivered(errand.last)
        for refusal in self._complaints.over(key, errand.last if complete else ""):
            why = f"it refused item {key} ({refusal.code}), which another delivered"
            self._failed(refusal.peer, refusal.name, why, refusal.when)
        self.left(key)
        self.hedges.over(key)
        del self.errands[key]

    # -- what is seen --------------------------------------------------------------------------------------------

    def heard(self, peer: str, message: Message, now: float) -> None:
        """A sender's word about an item."""
        if (at := self._peers.get(peer)) is None or not isinstance(message, Offer | Progress):
            return
        if isinstance(message, Progress):
            at.book.entered(message.key, message.stage, message.elapsed_s, now)
        errand = self.errands.get(message.key)
        if errand is not None and message.key in at.book.open and message.ready >= errand.spec.rows:
            at.book.ready(message.key, now)
            self.hedges.settled(message.key)
        if isinstance(message, Progress) and message.waiting_patches is not None:
            at.book.told(message.waiting_patches, now)

    def arrived(self, key: ItemKey, rows: int, now: float) -> None:
        errand = self.errands.get(key)
        if errand is not None and errand.book is not None:
            errand.book.arrived(key, rows * self._row_bytes, now)

    def asking(self, peer: str, want: Want, now: float) -> Want:
        """The question as it is to be sent. Not the first epoch: what is timed from here on is not the usual way of an
        item."""
        errand = self.errands.get(want.key)
        if errand is None:
            return want
        if want.epoch > 1 and errand.book is not None:
            errand.book.disturbed(want.key)
        if want.media is None and peer in errand.unsent:
            want = msgspec.structs.replace(want, media=errand.spec.media)
        errand.unsent.discard(peer)
        return msgspec.structs.replace(want, alone=self.poison.suspect(want.digest, now))

    def unsent(self, peer: str, key: ItemKey) -> None:
        """The item's media did not get out to the peer: the next question has to bring them."""
        if (errand := self.errands.get(key)) is not None:
            errand.unsent.add(peer)

    def link_up(self, incarnation: str) -> None:
        peer = self._peers.by_incarnation(incarnation)
        if peer is not None:
            self.labels.linked(incarnation, peer.name)
        self.poison.lives(incarnation)
        self._heed(incarnation)

    def link_lost(self, incarnation: str, now: float, *, gone: bool = False) -> None:
        """``gone``: its process is known to have ended. Who was about to end did not die of an item."""
        self.labels.lost(incarnation, gone=gone)
        peer = self._peers.by_incarnation(incarnation)
        if peer is not None:
            if not peer.parted and self.standings.of(incarnation, now) is not Standing.DRAINING:
                self.poison.cut(incarnation, peer.book.in_tower(), now)
            peer.book.disturbed()
        if gone:
            self.poison.died(incarnation)
            self._complaints.gone(incarnation)

    def told(self, entries: Sequence[PeerEntry], gone: Sequence[str], now: float) -> None:
        """What membership says."""
        for entry in entries:
            incarnation = entry.record.incarnation
            self.standings.told(incarnation, STANDINGS.get(entry.state))
            self._loads[incarnation] = entry.load, now
            self._heed(incarnation)
        for incarnation in gone:
            if self._peers.get(incarnation) is None:  # else its link proves otherwise
                self.poison.died(incarnation)
            self.standings.told(incarnation, None)
            self.trials.gone(incarnation)
            self._chosen.pop(incarnation, None)
            self._loads.pop(incarnation, None)

    def _heed(self, incarnation: str) -> None:
        """What membership said last of a peer counts, if it is one of ours."""
        peer, told = self._peers.by_incarnation(incarnation), self._loads.get(incarnation)
        if peer is not None and told is not None:
            load, when = told
            peer.digests = frozenset(load.digests)
            peer.book.heard(load.patches, when)

    def metrics(self) -> list[Metric]:
        errors = GaugeMetricFamily(
            "aiodisagg_prediction_error",
            "Mean relative error of predicted times, recent ones first: 0 exact, 1 hopeless.",
            labels=("peer", "stage"),
        )
        seen = CounterMetricFamily(
            "aiodisagg_predictions_checked", "Predicted times that were compared.", labels=("peer", "stage")
        )
        for peer in self._peers.linked:
            costs, label = peer.book.costs, self.labels.of(peer.incarnation)
            stages = [("prepare", costs.prepare), ("tower", costs.tower), ("transfer", costs.transfer)]
            for stage, model in stages:
                errors.add_metric((label, stage), model.error)
                seen.add_metric((label, stage), model.observed)
            errors.add_metric((label, "finish"), costs.finish_error)
            seen.add_metric((label, "finish"), costs.finishes)
        errors.add_metric(("", "prefill"), self.prefill.error)
        seen.add_metric(("", "prefill"), self.prefill.observed)
        return [
            errors,
            seen,
            self._complaints.metrics(self.labels),
            metrics.counter("item_moves", "Items that were asked of another peer than before.", self.moves),
            metrics.counter("hedges", "Items that were asked of a second peer.", self.hedges.started),
            metrics.counter("hedges_won", "Hedged items that the second peer delivered first.", self.hedges.won),
            metrics.counter("poison_refusals", "Items refused because encoders died of them.", self.poison.refused),
        ]
