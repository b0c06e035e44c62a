"""A cluster in virtual time: peers of some roles, a router in front, and requests on their way through them."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import msgspec

from aiodisagg.bench.workload import WorkloadRequest
from aiodisagg.engine.pace import Pace
from aiodisagg.errors import AiodisaggError, ConfigError
from aiodisagg.scheduler.order import Order
from aiodisagg.scheduler.slack import SHARE, SHARE_OF_ONE_DEVICE, Slack
from aiodisagg.scheduler.trials import Trials
from aiodisagg.simulate.clock import Clock
from aiodisagg.simulate.device import Device
from aiodisagg.simulate.doors import Door, Doors, open_door
from aiodisagg.simulate.engine import Engine, TokenGaps
from aiodisagg.simulate.known import BEAT_S, Known
from aiodisagg.simulate.machines import MachineWires
from aiodisagg.simulate.placing import Placing, first_finish
from aiodisagg.simulate.request import Item, SimRequest
from aiodisagg.simulate.times import Costs, ServiceTimes
from aiodisagg.simulate.tower import Preparing, Tower
from aiodisagg.simulate.wires import TimedWires

ROUTER_ASKS = 32
"""Peers that the router looks at for a request, chosen by chance where there are more."""


class Routing(enum.StrEnum):
    """Which language peer gets a request."""

    WORK = "work"
    """The one with the least work owed."""
    OUTSTANDING = "outstanding"
    """The one with the fewest requests that have not ended, ties in turn: what a balancer in front knows."""
    TURN = "turn"
    """The next one."""


class System(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many peers of which role, and what they decide by.

    ``replicas``: monoliths that encode inside the engine's loop. ``links``: encode peers that a language peer knows.
    ``overlap``: prefill begins with the rows that are here; else when all are. ``routing``: who chooses the language
    peer of a request, and how. ``tower_share``: of a device whose engine works too; ``priorities``: instead, steps
    with prompts go first there, then the tower, then decodes, and prompts are computed in one piece beside the tower.
    ``turns``: prefills and the tower of one device go by the age of requests; else both at once.
    ``inter_token_ms``: what prefill, and a tower beside the engine, leave to running streams; 0: no bound.
    A replica has none. ``pace_ms``: the same for prefill alone, also of replicas; None: as ``inter_token_ms``.
    ``coalesce_tokens``: as of :class:`~aiodisagg.engine.schedule.Scheduler`.
    ``inline_patches``: of a tower batch in a replica; 0: what the times say.
    """

    name: str
    replicas: int = 0
    encode: int = 0
    language: int = 0
    both: int = 0
    placing: Placing = Placing.FINISH
    overlap: bool = True
    routing: Routing = Routing.WORK
    links: int = 16
    tower_share: float = 0.5
    priorities: bool = False
    inter_token_ms: float = 50.0
    pace_ms: float | None = None
    coalesce_tokens: int = 0
    turns: bool = True
    inline_patches: int = 0
    doors: Doors = Doors()

    @property
    def devices(self) -> int:
        return self.replicas + self.encode + self.language + self.both

    def check(self) -> None:
        """Raises ConfigError for a cluster that cannot serve."""
        if self.replicas + self.language + self.both < 1:
            raise ConfigError("system", f"{self.name}: nobody computes answers")
        if self.language and self.encode + self.both < 1:
            raise ConfigError("system", f"{self.name}: nobody encodes for language peers")
        self.doors.check()
        if not 0 < self.tower_share < 1 or self.links < 1:
            raise ConfigError("system", f"{self.name}: tower_share must lie within 0..1 and links be at least 1")


class Peer:
    """One device and what runs on it. ``owed_s``: seconds of prefill, and of encoding in the loop, ahead of it."""

    def __init__(self, name: str, role: str, device: Device) -> None:
        self.name, self.role, self.device = name, role, device
        self.engine: Engine | None = None
        self.tower: Tower | None = None
        self.preparing: Preparing | None = None
        self.towers: list[Peer] = []
        self.known: dict[str, Known] = {}
        """Of the towers, by name."""
        self.trials = Trials()
        self.door: Door | None = None
        self.owed_s = 0.0
        self.open = 0
        """Requests that came here and have not ended."""


class Cluster:
    """Runs one workload once.

    Args:
        protocol: every item is moved by real protocol machines, instead of times of a link.
        leaps: many decode steps at once where nothing changes; without, the same slower.
    """

    def __init__(
        self, system: System, times: ServiceTimes, *, seed: int = 0, protocol: bool = False, leaps: bool = True
    ) -> None:
        system.check()
        if system.inline_patches:
            times = msgspec.structs.replace(times, inline_patches=system.inline_patches)
        self.system, self.costs = system, Costs(times)
        self.clock = Clock()
        self.gaps = TokenGaps()
        self.requests: list[SimRequest] = []
        self._random = Random(f"{seed}/router")
        self._leaps = leaps
        self.wires = (MachineWires if protocol else TimedWires)(self.clock, self.costs, self._arrived)
        self.peers = [
            self._peer(f"{role}{i}", role)
            for role in ("replica", "encode", "language", "both")
            for i in range(self._count(role))
        ]
        self.fronts = [peer for peer in self.peers if peer.engine is not None]
        self._by_name = {peer.name: peer for peer in self.peers}
        self._beats = self._left = 0
        """Heartbeats that are to come, and requests that have not ended."""
        self._link()
        self._turn = 0
        self._enough: Callable[[SimRequest], bool] = _never
        self._answers = self._answer_tokens = 0

    def _count(self, role: str) -> int:
        return int(getattr(self.system, "replicas" if role == "replica" else role))

    def _peer(self, name: str, role: str) -> Peer:
        priorities = self.system.priorities and role == "both"
        speed = self.costs.times.shared_speed
        device = Device(self.clock, self.system.tower_share, speed, priorities=priorities)
        peer = Peer(name, role, device)
        if role != "encode":
            pace_ms = self._pace_ms(role)
            engine = peer.engine = Engine(
                device, self.costs, self.gaps, inline=role == "replica", ended=self._ended, first=self._first,
                leaps=self._leaps, pace=Pace(pace_ms / 1e3, self.costs.reads) if pace_ms else None,
                overlap=self.system.overlap, coalesce_tokens=self.system.coalesce_tokens, order=self.system.doors.order,
            )  # fmt: skip
            peer.door = open_door(
                self.system.doors, self.clock, self._begin, self._refuse, runs=self.costs.times.max_running
            )
            if role == "replica":
                peer.preparing = Preparing(self.clock, self.costs, engine.prepared, lambda: True)
        if role in ("encode", "both"):
            gated = role == "both" and self.system.inter_token_ms > 0
            share = SHARE_OF_ONE_DEVICE if priorities else SHARE
            slack = Slack(self.system.inter_token_ms / 1e3, share=share) if gated else None
            peer.tower = Tower(self.clock, self.costs, device.tower, slack=slack)
            if peer.engine is not None:
                peer.engine.beside = peer.tower
                if priorities:
                    peer.tower.lends = peer.engine.waited_for
                if self.system.turns:
                    peer.engine.turns = True
                    peer.tower.beside = peer.engine
        return peer

    def _pace_ms(self, role: str) -> float:
        if self.system.pace_ms is not None:
            return self.system.pace_ms
        return 0.0 if role == "replica" else self.system.inter_token_ms

    def _link(self) -> None:
        """Each language peer knows ``links`` encode peers: its own tower, and a window on the ring of all."""
        towers = [peer for peer in self.peers if peer.tower is not None]
        if not towers:
            return
        known = min(self.system.links, len(towers))
        for i, peer in enumerate(p for p in self.fronts if p.role != "replica"):
            first = towers.index(peer) if peer.tower is not None else i * known % len(towers)
            peer.towers = [towers[(first + j) % len(towers)] for j in range(known)]
            if self.system.placing is Placing.FINISH:
                peer.known = {one.name: Known(one.name, self.costs, local=one is peer) for one in peer.towers}
        if self.system.placing is Placing.FINISH:
            for i, tower in enumerate(towers):
                assert tower.tower is not None
                tower.tower.entered = partial(self._entered, tower)
                told = [peer.known[tower.name] for peer in self.fronts if tower.name in peer.known]
                self._beats += 1
                self.clock.at(BEAT_S * (i + 1) / len(towers), self._beat, tower, told)

    def _beat(self, peer: Peer, told: Sequence[Known]) -> None:
        """The peer's heartbeat, as long as anything else happens."""
        assert peer.tower is not None
        patches, identities = peer.tower.waiting_patches, peer.tower.newest()
        for known in told:
            known.heard(patches, identities, self.clock.now)
        self._beats -= 1
        if self._left and self.clock.waiting > self._beats:
            self._beats += 1
            self.clock.at(self.clock.now + BEAT_S, self._beat, peer, told)

    def _entered(self, peer: Peer, item: Item, stage: str, elapsed_s: float) -> None:
        """The peer says so to who asked for the item."""
        assert peer.tower is not None
        known = self._by_name[item.request.peer].known[peer.name]
        known.entered(item, stage, elapsed_s, peer.tower.waiting_patches, self.clock.now)

    # -- a request's way -----------------------------------------------------------------------------------------

    def run(self, workload: Sequence[WorkloadRequest], enough: Callable[[SimRequest], bool] | None = None) -> None:
        """Until every request has ended, or ``enough``, told of each that has, says True. Raises AiodisaggError if
        that never comes."""
        self._enough = enough or _never
        self.requests = self.requests_of(workload)
        self._left = len(self.requests)
        for request in self.requests:
            planned_s = self.costs.planned_s(len(request.items))
            self.clock.at(request.source.arrival_s + planned_s, self._arrive, request)
        self.clock.run()
        for peer in self.peers:
            peer.device.update()
        left = [request.name for request in self.requests if not request.outcome]
        if left and not self.clock.stopped:
            raise AiodisaggError(
                f"{self.system.name}: nothing happens any more, and requests {left[:5]} have not ended"
            )

    def misfits(self, workload: Sequence[WorkloadRequest]) -> list[SimRequest]:
        """Those for which no engine here has pages enough, ever."""
        engines = [peer.engine for peer in self.fronts if peer.engine is not None]
        return [one for one in self.requests_of(workload) if not any(engine.fits(one) for engine in engines)]

    def requests_of(self, workload: Sequence[WorkloadRequest]) -> list[SimRequest]:
        """As they are before they come."""
        return [self._request(number, source) for number, source in enumerate(workload)]

    def _request(self, number: int, source: WorkloadRequest) -> SimRequest:
        images = [self.costs.rows(image.visual_tokens) for image in source.images]
        prompt = self.costs.prompt(images, source.text_tokens)
        unloaded = self.costs.unloaded_s(images, prompt)
        request = SimRequest(number, source, prompt, unloaded, self.costs.decode_s(1, prompt))
        request.due_s = source.arrival_s + self.system.doors.max_wait_s
        request.items = [
            Item(request, i, image.identity, rows)
            for i, (image, rows) in enumerate(zip(source.images, images, strict=True))
        ]
        if self.system.doors.order is Order.SHORT_FIRST:
            request.work = sum(item.patches for item in request.items)
        return request

    def _arrive(self, request: SimRequest) -> None:
        peer = self._route()
        request.peer = peer.name
        assert peer.engine is not None and peer.door is not None
        if not peer.engine.fits(request):
            self._over(request, "refused")
            return
        peer.open += 1
        peer.door.arrive(request)

    def _refuse(self, request: SimRequest) -> None:
        self._by_name[request.peer].open -= 1
        self._over(request, "shed")

    def _route(self) -> Peer:
        fronts = self.fronts
        self._turn += 1
        if self.system.routing is Routing.TURN:
            return fronts[self._turn % len(fronts)]
        if self.system.routing is Routing.OUTSTANDING:
            chosen = min(fronts, key=lambda peer: peer.open)
            fronts.remove(chosen)
            fronts.append(chosen)  # to the end of the line
            return chosen
        if len(fronts) > ROUTER_ASKS:
            fronts = [fronts[int(self._random.random() * len(fronts))] for _ in range(ROUTER_ASKS)]
        half = self._half_answer_s()
        return min(fronts, key=lambda peer: self._load(peer, half))

    def _half_answer_s(self) -> float:
        """Of a device, for half an answer of the mean length seen so far."""
        answer = self._answer_tokens / self._answers if self._answers else 0.0
        return answer / 2 * self.costs.decode_s(16, 0.0) / 16

    def _load(self, peer: Peer, half_answer_s: float) -> float:
        """Seconds of work owed: what is queued, and half an answer for each that is being written."""
        assert peer.engine is not None and peer.door is not None
        tower = peer.tower.queued_s if peer.tower is not None else 0.0
        return peer.owed_s + peer.door.waiting_s + tower + peer.engine.active * half_answer_s

    def _begin(self, request: SimRequest) -> None:
        """Let in: pages are asked for first, then images are encoded."""
        peer = self._by_name[request.peer]
        assert peer.engine is not None
        request.begun_s = self.clock.now
        chosen = self._choose(request, peer) if peer.towers and request.items else []
        peer.owed_s += self._engine_s(request, peer)
        if peer.role == "replica":
            assert peer.preparing is not None
            peer.engine.add(request)
            for item in request.items:
                peer.preparing.add(item)
            return
        if self.system.overlap or not request.items:
            peer.engine.add(request)
        for item, name in zip(request.items, chosen, strict=True):
            tower, item.encoder = self._by_name[name].tower, name
            assert tower is not None
            self.wires.fetch(item, tower, name, peer.name)

    def _engine_s(self, request: SimRequest, peer: Peer) -> float:
        inline = peer.role == "replica" and request.items
        return self.costs.prefill_s(request.prompt) + (
            self.costs.tower_s([item.patches for item in request.items]) if inline else 0.0
        )

    def _choose(self, request: SimRequest, peer: Peer) -> list[str]:
        if self.system.placing is Placing.FIXED:
            return [peer.towers[request.number % len(peer.towers)].name] * len(request.items)
        identities, now = {item.identity for item in request.items}, self.clock.now
        views = [known.view(identities, now) for known in peer.known.values()]
        own = peer.name if peer.tower is not None else ""
        placed = first_finish(request.items, views, own, self.costs, peer.trials)
        for item, placement in zip(request.items, placed, strict=True):
            peer.known[placement.peer].asked(item, placement, now)
        return [placement.peer for placement in placed]

    def _arrived(self, item: Item) -> None:
        request = item.request
        peer = self._by_name[request.peer]
        assert peer.engine is not None
        if item.arrived >= item.rows and peer.known:
            peer.known[item.encoder].arrived(item, self.clock.now)
        if self.system.overlap:
            peer.engine.arrived(request)
        elif request.complete:
            peer.engine.add(request)

    def _first(self, request: SimRequest) -> None:
        peer = self._by_name[request.peer]
        peer.owed_s -= self._engine_s(request, peer)
        assert peer.door is not None
        peer.door.first(request)

    def _ended(self, request: SimRequest) -> None:
        self._answers += 1
        self._answer_tokens += request.output
        peer = self._by_name[request.peer]
        peer.open -= 1
        assert peer.door is not None
        peer.door.left(request)
        self._over(request, "ok")

    def _over(self, request: SimRequest, outcome: str) -> None:
        request.outcome, request.end_s = outcome, self.clock.now
        self._left -= 1
        if self._enough(request):
            self.clock.stop()


def _never(request: SimRequest) -> bool:
    return False
