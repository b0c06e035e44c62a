"""The queue before the engine, on the event loop: requests wait here for their turn, and are counted."""

from __future__ import annotations

import asyncio
import math
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from aiodisagg.errors import DeadlineExceeded, EngineError, InvalidRequest, Overloaded
from aiodisagg.models.base import PlannedItem, PromptPlan
from aiodisagg.protocol.messages import FOREVER_S, Urgency
from aiodisagg.scheduler.admission import (
    AdmissionConfig,
    AdmissionQueue,
    Arrived,
    Charged,
    Decision,
    Ended,
    Event,
    Expire,
    FirstToken,
    Measured,
    Release,
    Shed,
    TimerFired,
)
from aiodisagg.scheduler.order import Order
from aiodisagg.scheduler.prices import Work
from aiodisagg.scheduler.shares import Tenant

PRIORITIES = range(-8, 9)
"""Classes that a request may ask for."""
DEFAULT_TENANT = Tenant()
MAX_LABELS = 32
"""Tenants with a metric of their own; those that come later are counted together."""
_OTHERS = "(others)"

_WHY = {
    "queue_full": "too many requests wait already",
    "displaced": "too many requests wait; this one had to make room",
    "predicted": "the first token would come too late",
    "late": "the first token cannot come in time any more",
}
_WAITS_S = (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_ERRORS_S = (-30, -10, -3, -1, -0.3, -0.1, -0.03, 0, 0.03, 0.1, 0.3, 1, 3, 10, 30)


def work_of(plan: PromptPlan, held: int, has: Callable[[str], bool]) -> Work:
    """What is to be done for a prompt whose first ``held`` tokens are in KV pages; ``has``: whether the rows of an item
    are here, by its digest."""
    missing = {
        item.digest: item for item in plan.items if any(stop > held for _, stop in item.spans) and not has(item.digest)
    }
    return Work(plan.tokens - held, _patches(missing.values()))


def _patches(items: Iterable[PlannedItem]) -> int:
    return sum(math.prod(item.grid_thw) for item in items)


@dataclass(frozen=True, slots=True)
class Turn:
    """A request that wants its turn."""

    request_id: str
    work: Work
    tenant: Tenant = DEFAULT_TENANT
    priority: int = 0
    timeout_s: float | None = None
    """Its first token must be here when so much has passed since it came in, of which ``spent_s`` have already."""
    spent_s: float = 0.0


class Admission:
    """Turns for requests, as :class:`~aiodisagg.scheduler.admission.AdmissionQueue` gives them.

    Belongs to one loop, and its methods to that loop's thread. At most ``config.max_queue`` requests wait.
    """

    def __init__(self, config: AdmissionConfig, max_running: int) -> None:
        self._config = config
        self._queue = AdmissionQueue(config, max_running)
        self._waiting: dict[str, asyncio.Future[Decision | None]] = {}
        self._known: set[str] = set()
        """Requests that the queue has and that have not ended."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._closed = False
        self._refused: Tally[str] = Tally()
        self._charged: dict[str, float] = defaultdict(float)
        self._registry = CollectorRegistry()
        self._waits = Histogram(
            "aiodisagg_admission_wait_seconds", "From a request's plan to its release to the engine.", buckets=_WAITS_S,
            registry=self._registry,
        )  # fmt: skip
        self._errors = Histogram(
            "aiodisagg_admission_ttft_error_seconds", "Time from the plan to the first token, less its prediction.",
            buckets=_ERRORS_S, registry=self._registry,
        )  # fmt: skip
        self._unpredicted = Counter(
            "aiodisagg_admission_unpredicted", "First tokens that nothing was known of.", registry=self._registry
        )

    def urgency(
        self, items: Iterable[PlannedItem], priority: int, waited_s: float, timeout_s: float | None = None
    ) -> Urgency:  # fmt: skip
        """What towers are told of a request that needs these ``items``: its place there is the one that it has here.

        It is due when it has waited for the aging bound, or for as long as its first token may take.
        """
        config = self._config
        work = _patches(items) if config.order is Order.SHORT_FIRST else 0
        most_s = min(config.max_wait_s, config.max_ttft_s, math.inf if timeout_s is None else timeout_s, FOREVER_S)
        return Urgency(max(0.0, most_s - waited_s), priority, work)

    async def take(self, turn: Turn) -> None:
        """Returns when it is the request's turn; then :meth:`end` must be called, once it is over.

        Raises Overloaded if it is shed, DeadlineExceeded if its time is up, EngineError when the service closes,
        InvalidRequest for an unknown class or an id that is here already.
        """
        request_id, timeout_s = turn.request_id, turn.timeout_s
        if turn.priority not in PRIORITIES:
            raise InvalidRequest("priority", f"must be from {PRIORITIES[0]} to {PRIORITIES[-1]}, not {turn.priority}")
        if request_id in self._known:
            raise InvalidRequest("request_id", f"{request_id!r} is in use")
        if self._closed:
            raise EngineError(request_id, "the service is closed")
        loop = asyncio.get_running_loop()
        deadline = math.inf if timeout_s is None else loop.time() + timeout_s - turn.spent_s
        future = self._waiting[request_id] = loop.create_future()
        self._known.add(request_id)
        try:
            self._handle(Arrived(request_id, turn.work, turn.tenant, turn.priority, deadline))
            match await future:
                case Shed() as shed:
                    raise Overloaded(shed.retry_after_s, _WHY[shed.reason])
                case Expire() as expired:
                    raise DeadlineExceeded(request_id, timeout_s or 0.0, (f"waited {expired.waited_s:.3g} s in line",))
                case None:
                    raise EngineError(request_id, "the service is closed")
        except BaseException:
            self.end(request_id)
            raise
        finally:
            del self._waiting[request_id]

    def first_token(self, request_id: str) -> None:
        """A request that had its turn has its first token."""
        if request_id in self._known:
            self._handle(FirstToken(request_id))

    def end(self, request_id: str, output_tokens: int = 0) -> None:
        """A request is over, in whatever way. No effect on one that is not here."""
        if request_id in self._known:
            self._known.remove(request_id)
            self._handle(Ended(request_id, output_tokens))

    async def aclose(self) -> None:
        """Whoever waits gets an EngineError."""
        self._closed = True
        self._arm(None)
        for future in self._waiting.values():
            if not future.done():
                future.set_result(None)

    # -- the queue --------------------------------------------------------------------------------------------------

    def _handle(self, event: Event, not_before: float = 0.0) -> None:
        now = max(not_before, asyncio.get_running_loop().time())
        for decision in self._queue.handle(event, now):
            match decision:
                case Release():
                    self._waits.observe(decision.waited_s)
                    self._tell(decision.request_id, decision)
                case Shed() | Expire():
                    self._known.discard(decision.request_id)
                    self._refused[decision.reason if isinstance(decision, Shed) else "deadline"] += 1
                    self._tell(decision.request_id, decision)
                case Measured():
                    if decision.predicted_s is None:
                        self._unpredicted.inc()
                    else:
                        self._errors.observe(decision.ttft_s - decision.predicted_s)
                case Charged():
                    few = len(self._charged) < MAX_LABELS or decision.tenant in self._charged
                    self._charged[decision.tenant if few else _OTHERS] += decision.cost_s
        self._arm(None if self._closed else self._queue.next_timer())

    def _tell(self, request_id: str, decision: Decision) -> None:
        future = self._waiting.get(request_id)
        if future is not None and not future.done():
            future.set_result(decision)

    def _arm(self, at: float | None) -> None:
        if at == self._timer_at and self._timer is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at, self._timer = at, None
        if at is not None:
            self._timer = asyncio.get_running_loop().call_at(at, self._fire, at)

    def _fire(self, at: float) -> None:
        self._timer = None
        self._handle(TimerFired(), at)  # loops may call a little early

    # -- what it shows ----------------------------------------------------------------------------------------------

    def metrics(self) -> Iterable[Metric]:
        """Lengths, refusals, waits, errors of prediction, prices, limits, and what each tenant was charged."""
        waiting = GaugeMetricFamily("aiodisagg_admission_waiting", "Requests in line.", labels=("priority",))
        lengths = Tally({0: 0})
        lengths.update(entry.priority for entry in self._queue.waiting)
        for priority, length in sorted(lengths.items()):
            waiting.add_metric((str(priority),), length)
        refused = CounterMetricFamily("aiodisagg_admission_refused", "Requests sent away.", labels=("reason",))
        for reason in (*_WHY, "deadline"):
            refused.add_metric((reason,), self._refused[reason])
        charged = CounterMetricFamily(
            "aiodisagg_tenant_cost_seconds", "Service charged to a tenant.", labels=("tenant",)
        )
        for tenant, cost_s in self._charged.items():
            charged.add_metric((tenant,), cost_s)
        prices = GaugeMetricFamily(
            "aiodisagg_admission_price_seconds", "Learned cost of a request, a token, a patch.", labels=("lane", "of")
        )
        limits = GaugeMetricFamily(
            "aiodisagg_admission_let_through", "Requests that may be on their way to a first token.", labels=("lane",)
        )
        for lane in self._queue.lanes:
            name = "media" if lane.has_media else "text"
            limits.add_metric((name,), lane.breadth.limit)
            if lane.prices.known:
                prices.add_metric((name, "request"), lane.prices.request_s)
                prices.add_metric((name, "token"), lane.prices.token_s)
                prices.add_metric((name, "patch"), lane.prices.patch_s)
        return [waiting, refused, charged, prices, limits, *self._registry.collect()]
