"""LanguageService: a language peer as an async context manager."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
from prometheus_client.core import Metric

from aiodisagg.bootstrap.client import BootstrapClient
from aiodisagg.bootstrap.registry import Load, PeerRecord, PeerState
from aiodisagg.device.copies import open_accelerator
from aiodisagg.engine.config import EngineConfig
from aiodisagg.engine.engine import Engine, EngineRequest, opened
from aiodisagg.engine.prefix import PageKeys
from aiodisagg.engine.steps import StepWatcher
from aiodisagg.engine.stream import RequestHandle
from aiodisagg.engine.types import Delta, FinishReason, SamplingParams
from aiodisagg.errors import AiodisaggError, ConfigError, Draining, EngineError, InvalidRequest, Overloaded, PeerBroken
from aiodisagg.language.admission import DEFAULT_TENANT, Admission, Turn, work_of
from aiodisagg.language.counters import engine_metrics
from aiodisagg.language.items import Item, Items, spec_of
from aiodisagg.language.loading import load_language_half
from aiodisagg.language.membership import LocalEncoder, follow
from aiodisagg.language.memory import kv_bytes
from aiodisagg.language.rows import RowReceiver
from aiodisagg.language.trace import ItemTrace, RequestTrace, Traces
from aiodisagg.link.address import parse
from aiodisagg.link.hello import PeerRole
from aiodisagg.models.base import ChatMessage, Planner, PromptPlan
from aiodisagg.peer import metrics
from aiodisagg.peer.config import LanguageConfig
from aiodisagg.peer.driver import Tasks
from aiodisagg.peer.once import EnteredOnce
from aiodisagg.peer.turns import Closed, Workers
from aiodisagg.protocol.messages import ItemKey
from aiodisagg.protocol.rows import ModelFingerprint, RowLayout
from aiodisagg.scheduler.shares import Tenant

if TYPE_CHECKING:
    from aiodisagg.models.language import LanguageHalf

logger = logging.getLogger(__name__)

PLANNERS = 2
"""Prompts that are planned at once, mostly in Python: a whole burst at once would be done at its end, none before."""


@dataclass(slots=True)
class _Request:
    """What it holds in the engine, and the items that were asked for."""

    priority: int
    """Behind the line."""
    handle: RequestHandle | None = None
    room: int = field(default_factory=lambda: secrets.randbits(62))
    keys: list[ItemKey] = field(default_factory=list)


class LanguageService(EnteredOnce):
    """Answers chats whose images and videos are encoded by other peers.

    ::

        async with LanguageService(LanguageConfig(model=folder, bootstrap=("http://127.0.0.1:8500",))) as peer:
            async for delta in peer.generate(messages, SamplingParams(max_tokens=64)):
                print(delta.text, end="")

    Args:
        loaded: planner, language half and row fingerprint, instead of the folder's.
        local: for a peer that encodes as well. watcher: told of engine steps.
    """

    def __init__(
        self,
        config: LanguageConfig,
        *,
        loaded: tuple[Planner, LanguageHalf, ModelFingerprint] | None = None,
        local: LocalEncoder | None = None,
        watcher: StepWatcher | None = None,
    ) -> None:
        super().__init__()
        self.config, self._loaded, self.local, self._watcher = config, loaded, local, watcher
        self.name = config.name or f"language-{config.incarnation[:6]}"
        self.model_names = config.model_names
        self.model_name = self.model_names[0]
        self.created = int(time.time())
        self.traces = Traces()
        self._served = asyncio.Event()
        self._broken = ""
        self._client: BootstrapClient | None = None
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def _open(self) -> None:
        config = self.config
        loaded = self._loaded
        if loaded is None:
            logger.info("%s: loading the language half of %s on %s", self.name, config.model, config.device)
            loaded = await asyncio.to_thread(load_language_half, config)
        self._planner, half, model = loaded
        self._text_only = half.text_only
        layout = half.layout
        engine_layout = RowLayout(layout.hidden_size, layout.deepstack_levels, str(half.dtype).removeprefix("torch."))
        engine_config = EngineConfig(
            pool_bytes=await asyncio.to_thread(kv_bytes, config, half),
            token_budget=config.step_tokens,
            max_running=config.max_running,
            itl_budget_ms=config.pace_ms,
            overlap=config.overlap,
            prefix_cache=config.prefix_cache,
            order=config.admission.order,
            max_wait_s=config.admission.max_wait_s,
        )
        logger.info("%s: warming the engine", self.name)
        planner = self._planner
        accelerator = await asyncio.to_thread(open_accelerator, config.device)
        if accelerator is not None:
            self._stack.callback(accelerator.close)
        stream = None if accelerator is None else accelerator.inward
        try:
            self.engine = await self._stack.enter_async_context(
                opened(
                    lambda: Engine(
                        half.causal,
                        planner.decode,
                        planner.eos_ids,
                        engine_config,
                        layout=engine_layout,
                        stream=stream,
                        watcher=self._watcher,
                        broke=self._broke,
                    )
                )
            )
        except ConfigError as error:
            if error.key != "pool_bytes":  # as the engine calls it; here that is what rows come to
                raise
            raise error.under("kv_bytes") from error
        logger.info("%s: the engine is warm; opening the pool that rows come to, and transports", self.name)
        self._items = Items(self.engine, layout)
        self.rows = await self._stack.enter_async_context(
            RowReceiver(
                config,
                model,
                name=self.name,
                deliver=self._items.deliver,
                ended=self._items.ended,
                traces=self.traces,
                accelerator=accelerator,
            )
        )
        self.pool, self.receiver, self.peers = self.rows.pool, self.rows.receiver, self.rows.peers
        self.admission = Admission(config.admission, config.max_running)
        self._stack.push_async_callback(self.admission.aclose)
        self._tasks = Tasks(self.name)
        self._stack.push_async_callback(self._tasks.aclose)
        self._planning = Workers(PLANNERS, "aiodisagg-plan")
        self._stack.push_async_callback(asyncio.to_thread, self._planning.close)
        if self.local is not None:
            self.add_tower(self.local.record.addresses[0], self.local.record.incarnation)
        if config.bootstrap:
            await self._join(model)

    def _leave(self) -> None:
        self._served.set()
        self._idle.set()

    # -- membership ----------------------------------------------------------------------------------------------

    async def _join(self, model: ModelFingerprint) -> None:
        record = PeerRecord(
            name=self.name,
            incarnation=self.config.incarnation,
            role=PeerRole.LANGUAGE,
            addresses=(),
            transports=tuple(self.rows.planes.open_transports),
            model=model,
        )
        if self.local is not None:
            record = msgspec.structs.replace(self.local.record, name=self.name, role=PeerRole.BOTH)
        self._client = client = BootstrapClient(
            self.config.bootstrap, record, load=self.load, token=self.config.bootstrap_token
        )  # fmt: skip
        await self._stack.enter_async_context(client)
        self._tasks.start(follow(client, self.rows), "membership")

    def add_peer(self, address: str) -> None:
        """Keeps a link to the encode peer at ``address``; what the bootstrap server's membership does by itself.

        Raises ConfigError if that is no address. Whether somebody is there is told by the log and ``ready``.
        """
        parse(address)
        self.peers.add(address)

    def add_tower(self, address: str, incarnation: str) -> None:
        """As ``add_peer``, for a tower that belongs to this peer, in its process or beside it: it is compared for every
        item, however many others there are."""
        self.rows.placing.own = incarnation
        self.add_peer(address)

    def load(self) -> Load:
        """How busy this peer is, for the bootstrap server."""
        local = Load() if self.local is None else self.local.load()
        queued, active = len(self.rows.unplaced) + local.queued, len(self.traces.open) + local.active
        return Load(queued=queued, active=active, patches=local.patches, digests=local.digests)

    async def drain(self) -> None:
        """Takes no new request and returns when those that are open have ended. Leave the context next."""
        logger.info("%s drains: %d requests are open", self.name, len(self.traces.open))
        self._draining = True
        if self._client is not None:
            self._client.announce(PeerState.DRAINING)
        await self._idle.wait()

    # -- requests ------------------------------------------------------------------------------------------------

    async def generate(
        self,
        messages: Sequence[ChatMessage],
        sampling: SamplingParams,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
        tenant: Tenant = DEFAULT_TENANT,
        priority: int = 0,
    ) -> AsyncGenerator[Delta, None]:
        """Streams the answer to a chat. Closing the generator stops the work everywhere.

        Args:
            request_id: for logs and traces; must not be in use. timeout_s: until the request's last row is here.
            tenant: who asks; tenants share the service by their weights. priority: among the tenant's requests, from
                -8 to 8; lower goes first. Behind the line, in the engine and at towers, that of named tenants is 0.

        Raises:
            InvalidRequest: also MediaError and PromptTooLong: the request cannot be served as written.
            Overloaded: too much is waiting, or the first token could not be here in time; Draining: this peer ends.
            NoEncodePeer: no encode peer could be linked in time.
            DeadlineExceeded, EncodeFailed: an item did not arrive. EngineError: the engine failed this request.
        """
        request_id, why = request_id or secrets.token_hex(8), self._why_not
        if request_id in self.traces.open:
            raise InvalidRequest("request_id", f"{request_id!r} is in use")
        if self._draining:
            raise Draining
        if why:
            raise EngineError(request_id, f"the service is {why}")
        trace = self.traces.begin(request_id)
        self._idle.clear()
        request = _Request(priority if tenant.name == DEFAULT_TENANT.name else 0)
        try:
            try:
                plan, page_keys = await self._planning.run(tenant.name, lambda: self._plan(messages))
            except Closed:
                raise EngineError(request_id, "the service is closed") from None
            trace.planned_s, trace.prompt_tokens, trace.state = trace.since(), plan.tokens, "waiting"
            sampling.fitted(plan.tokens, self.engine.limit)  # who does not fit is not worth a place in the line
            work = work_of(plan, self.engine.held(plan, page_keys), self.rows.sharing.has)
            if work.patches and not self.peers.linked:
                await self.peers.wait_any(self.config.peer_wait_s)
            spent_s = trace.since()
            await self.admission.take(Turn(request_id, work, tenant, priority, timeout_s, spent_s=spent_s))
            name, waited_s = self.engine.name_for(request_id), trace.since() - spent_s
            handle = request.handle = self.engine.submit(
                EngineRequest(name, plan, sampling, request.priority, waited_s, page_keys)
            )
            fetching = self._tasks.start(self._fetch(handle, plan, request, trace, timeout_s), f"fetch {request_id}")
            try:
                async with aclosing(aiter(handle)) as deltas:
                    async for delta in deltas:
                        if trace.first_token_s < 0 and delta.token_ids:
                            trace.first_token_s, trace.state = trace.since(), "decoding"
                            self.admission.first_token(request_id)
                            if handle.prefill is not None:
                                self.rows.placing.prefill = handle.prefill
                        trace.output_tokens += len(delta.token_ids)
                        # Before the last delta is out: its reader rarely comes back, but closes the generator.
                        if delta.finish_reason is FinishReason.CANCELLED:
                            self._end(trace, request, "cancelled")
                        elif delta.finish_reason is not None:
                            self._end(trace, request, "done")
                        yield delta
            finally:
                fetching.cancel()
        except AiodisaggError as error:
            # Refusals are many under overload, and the API logs each of them.
            level = logging.DEBUG if isinstance(error, Overloaded) else logging.WARNING
            logger.log(level, "request %s failed: %s", request_id, error)
            self._end(trace, request, "failed", str(error))
            raise
        except BaseException as error:
            stopped = isinstance(error, asyncio.CancelledError | GeneratorExit)
            self._end(trace, request, "cancelled" if stopped else "failed", "" if stopped else repr(error))
            raise

    def _plan(self, messages: Sequence[ChatMessage]) -> tuple[PromptPlan, PageKeys | None]:
        plan = self._planner.plan(messages, limit=self.engine.limit)
        return plan, self.engine.keys(plan)

    async def _fetch(
        self, handle: RequestHandle, plan: PromptPlan, request: _Request, trace: RequestTrace, timeout_s: float | None
    ) -> None:
        """Asks for items as soon as pages are reserved and the engine has not found them there. When the engine is done
        with the request, others get their turn: its reader may be slow to take the rest of the answer."""
        async for needed in handle.needs():
            try:
                self._ask(handle, plan, request, trace, timeout_s, needed)
            except Exception as error:  # a bug; but nobody may wait for ever for rows that were never asked for
                logger.exception("request %s: its items could not be asked for", trace.request_id)
                self.engine.fail(handle, EngineError(trace.request_id, f"its items were not asked for: {error!r}"))
        self._release(trace, request)

    def _ask(
        self, handle: RequestHandle, plan: PromptPlan, request: _Request, trace: RequestTrace, timeout_s: float | None,
        needed: Sequence[int],
    ) -> None:  # fmt: skip
        if first := trace.admitted_s < 0:
            trace.admitted_s = trace.since()
        # ``timeout_s`` is the whole request's, until its last row is here; who lost them in mid-answer has had them.
        left_s = self.config.request_timeout_s
        if timeout_s is not None and trace.first_token_s < 0:
            left_s = max(0.001, timeout_s - trace.since())
        asked, has = [], self.rows.sharing.has
        wanted = {item.digest: item for item in map(plan.items.__getitem__, needed) if not has(item.digest)}
        place = self.admission.urgency(wanted.values(), request.priority, trace.since(), timeout_s)
        for index, item in enumerate(plan.items):
            if index in needed:
                key = ItemKey(request.room, index)
                asked.append((key, spec_of(item, place)))
                request.keys.append(key)
                self._items.add(key, Item(handle, index, left_s, item.param))
                self.traces.item(trace, key, item)
            elif first:
                trace.items.append(ItemTrace(item.kind.value, item.rows, item.digest, stage="reused"))
        self.rows.request(asked, left_s)

    def _end(self, trace: RequestTrace, request: _Request, state: str, error: str = "") -> None:
        """The first call says how the request ended; later ones do nothing."""
        if trace.ended:
            return
        self._release(trace, request)
        self.traces.end(trace, request.keys, state, error)
        if not self.traces.open:
            self._idle.set()

    def _release(self, trace: RequestTrace, request: _Request) -> None:
        """Gives up its turn and its items; once more does no harm."""
        self.admission.end(trace.request_id, 0 if request.handle is None else request.handle.tokens)
        for key in request.keys:
            self.rows.cancel(key)
            self._items.drop(key)

    def _broke(self, why: str) -> None:
        self._broken = why
        self._served.set()

    @property
    def broken(self) -> str:
        """Why no request will be served any more, or empty."""
        return f"the engine is broken: {self.engine.broken}" if self._opened and self.engine.broken else ""

    def ready(self) -> tuple[bool, str]:
        """Can all requests be served now, and if not, why."""
        if not self._is_open or self._draining:
            return False, "draining" if self._draining else "not open"
        if self.broken:
            return False, self.broken
        if self._text_only or self.peers.linked:
            return True, "ok"
        return False, self.peers.why_none

    def metrics(self) -> str:
        """Everything this peer counts, in Prometheus' text format."""
        return metrics.render(self.families())

    def families(self) -> list[Metric]:
        """The same, before it is text."""
        if not self._opened:
            return []
        planning = metrics.gauge("planning_waiting", "Requests that wait to be planned.", self._planning.waiting)
        return [planning, *self.rows.metrics(), *self.admission.metrics(), *engine_metrics(self.engine.stats())]

    def debug(self) -> dict[str, Callable[[], object]]:
        """What a person looks at: recent requests with the stages of their items, and the peers."""
        return {"requests": self.traces.recent, "peers": self.peers.described}

    async def serve(self) -> None:
        """Returns when the context is left. Raises PeerBroken when the engine will not answer any more."""
        await self._served.wait()
        if self._broken:
            raise PeerBroken("engine", self._broken)
