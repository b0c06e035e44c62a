"""The engine as a service sees it: submit a planned prompt, hand rows in as they arrive, read tokens.

The order is reserve first, encode second: ``submit`` needs no rows, ``handle.needs()`` says when pages are reserved and
which items are not in shared pages already; only then, and only for those, is vision work worth asking for. Prefill
runs over the part of the prompt whose rows are here while later rows are on their way and other requests decode.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from aiodisagg.device.vitals import Vitals
from aiodisagg.engine.batch import EngineSequence, Runner
from aiodisagg.engine.config import EngineConfig, EngineStats
from aiodisagg.engine.pace import Pace
from aiodisagg.engine.prefix import PageKeys
from aiodisagg.engine.rows import RequestRows
from aiodisagg.engine.schedule import Scheduler
from aiodisagg.engine.steps import StepWatcher
from aiodisagg.engine.stream import Outbox, RequestHandle
from aiodisagg.engine.types import SamplingParams
from aiodisagg.engine.worker import StepThread
from aiodisagg.errors import AiodisaggError, ConfigError, EngineError, InvalidRequest, Overloaded
from aiodisagg.models.base import PromptPlan
from aiodisagg.protocol.rows import RowLayout

if TYPE_CHECKING:
    import torch

    from aiodisagg.device.copies import DeviceBytes, SideStream


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A planned prompt. ``request_id`` is the caller's and unique among unfinished requests."""

    request_id: str
    plan: PromptPlan
    sampling: SamplingParams
    priority: int = 0
    """Its class: lower goes first."""
    waited_s: float = 0.0
    """How long it has waited already; counts for ``max_wait_s``."""
    keys: PageKeys | None = None
    """Of this plan, from :meth:`Engine.keys`, for one request; None: computed by ``submit``."""


class Engine:
    """Continuous batching over one language model. An async context manager; enter it on the loop that reads.

    Args:
        model: the language half, see :class:`~aiodisagg.engine.batch.Runner`; the engine owns it until it is closed.
        decode: text of token ids, special tokens left out; called on the step thread.
        eos_ids: tokens that end an answer.
        config: sizes and budgets.
        layout: what rows must be; None takes any whole number of DeepStack levels that a request's rows agree on.
        stream: carries delivered bytes to the model's device, beside its computing; for a model on an accelerator.
        watcher: told around every step, on the step thread.
        broke: called on the loop with :attr:`broken` as soon as there is a reason.

    ``submit`` belongs to the loop; ``deliver``, ``deliver_bytes``, ``fail`` and ``stats`` may be called on any thread.
    Raises ConfigError if the model or the pool cannot work as configured.
    """

    def __init__(
        self,
        model: Any,
        decode: Callable[[Sequence[int]], str],
        eos_ids: frozenset[int],
        config: EngineConfig | None = None,
        *,
        layout: RowLayout | None = None,
        stream: SideStream | None = None,
        watcher: StepWatcher | None = None,
        broke: Callable[[str], object] = lambda why: None,
    ) -> None:
        self._stream, self._watcher = stream, watcher
        self._vitals = Vitals(lambda why: self._loop.call_soon_threadsafe(broke, why))
        self._refused = 0
        self.config = config or EngineConfig()
        self._decode, self._eos_ids = decode, eos_ids
        self._row_width = None if layout is None else layout.width
        self._runner = Runner(model, self.config, row_width=self._row_width)
        ours = (self._runner.hidden_size, str(self._runner.dtype).removeprefix("torch."))
        if layout is not None and (layout.hidden_size, layout.dtype) != ours:
            self._runner.release()
            raise ConfigError("layout", f"{layout} does not fit a model of hidden size {ours[0]} in {ours[1]}")
        self._pace = Pace(self.config.itl_budget_ms / 1e3)
        self._scheduler = Scheduler(
            num_pages=self._runner.num_pages,
            page_size=self.config.page_size,
            token_budget=self.config.token_budget,
            max_running=self.config.max_running,
            overlap=self.config.overlap,
            coalesce_tokens=self.config.coalesce_tokens,
            pace=self._pace if self.config.itl_budget_ms else None,
            order=self.config.order,
        )
        self._limit = min(self._scheduler.largest(), self._runner.max_context)
        self._live: dict[str, EngineSequence] = {}
        self._lock = threading.Lock()
        self._steps: StepThread | None = None
        self._stopped = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Engine {len(self._live)} requests, {self._scheduler!r}>"

    async def __aenter__(self) -> Self:
        if self._steps is not None:
            raise RuntimeError("an engine is entered once")
        await self._warm_up()
        if self._runner.device_runner is not None:
            self._pace.reads = self._runner.device_runner.reads
            self._scheduler.replayed = self._runner.device_runner.replayed_tokens
        self._loop = asyncio.get_running_loop()
        self._steps = StepThread(
            self._runner,
            self._scheduler,
            self._eos_ids,
            Outbox(self._loop),
            vitals=self._vitals,
            pace=self._pace,
            ended=self._forget,
            stopped=lambda: self._loop.call_soon_threadsafe(self._stopped.set),
            watcher=self._watcher,
        )
        self._steps.start()
        return self

    async def _warm_up(self) -> None:
        """The model is given back if that fails, or is given up: then when the thread, which nothing stops, is done."""
        warming = asyncio.get_running_loop().create_task(asyncio.to_thread(self._runner.warm_up), name="warm up")
        try:
            await asyncio.shield(warming)
        except BaseException:
            if warming.done():
                self._runner.release()
            else:  # also of somebody who is cancelled again and again
                warming.add_done_callback(lambda _: self._runner.release())
                await asyncio.wait([warming])
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the step thread after the step it is in; unfinished requests raise EngineError. May be repeated."""
        if self._steps is None:
            self._runner.release()
            return
        self._steps.close()
        try:
            await self._stopped.wait()
        finally:  # when cancelled: no longer than the step it is in
            self._steps.join()
            await asyncio.shield(asyncio.to_thread(self._runner.release))  # 0.3 s a GiB of a host's memory

    def keys(self, plan: PromptPlan) -> PageKeys | None:
        """What its pages are known by: milliseconds of work for a long prompt, on any thread. None: pages are not
        shared, or the prompt is too long for them."""
        if not self.config.prefix_cache or plan.tokens >= self._limit:
            return None
        return PageKeys(plan, self.config.page_size)

    def held(self, plan: PromptPlan, keys: PageKeys | None) -> int:
        """How many tokens of such a prompt, from the first, lie in KV pages that it would share. True now; pages may be
        gone when it is admitted. May be called on any thread. ``keys``: of the plan."""
        if keys is None:
            return 0
        known = keys.keys[: (plan.tokens - 1) // self.config.page_size]
        return len(self._scheduler.pages.find(known)) * self.config.page_size

    @property
    def broken(self) -> str:
        """Why no request is to be expected an answer any more, or empty. Any thread."""
        return self._vitals.why

    @property
    def limit(self) -> int:
        """Most tokens of prompt plus ``max_tokens`` of one request."""
        return self._limit

    def name_for(self, request_id: str) -> str:
        """A name that ``submit`` takes: the id, or one with a number while the step in progress still holds a request
        of that id that is over for everybody else."""
        names = itertools.chain([request_id], (f"{request_id}~{n}" for n in itertools.count(2)))
        return next(name for name in names if name not in self._live)

    def submit(self, request: EngineRequest) -> RequestHandle:
        """Takes a request in, without its rows.

        Raises PromptTooLong if it can never fit, Overloaded at ``max_waiting``, InvalidRequest for an empty prompt,
        EngineError if the plan contradicts itself, the id is in use or the engine is closed.
        """
        request_id, plan, sampling = request.request_id, request.plan, request.sampling
        if self._steps is None:
            raise EngineError(request_id, "the engine is not running")
        if plan.tokens < 1:
            raise InvalidRequest("messages", "the prompt has no tokens")
        sampling = sampling.fitted(plan.tokens, self._limit)
        if len(self._live) >= self.config.max_waiting + self.config.max_running:
            raise Overloaded(1.0, f"{len(self._live)} requests are in the engine already")
        if plan.input_ids.shape != (plan.tokens,) or plan.positions.shape != (3, plan.tokens):
            shapes = f"{plan.input_ids.shape}, {plan.positions.shape}"
            raise EngineError(request_id, f"ids and positions of shapes {shapes} are not [T] and [3, T]")
        rows = RequestRows(
            request_id,
            plan,
            hidden_size=self._runner.hidden_size,
            width=self._row_width,
            dtype=self._runner.dtype,
            device=self._runner.device,
            stream=self._stream,
        )
        sequence = EngineSequence(
            RequestHandle(request_id, self._end),
            plan,
            sampling,
            rows,
            self._decode,
            request.keys or self.keys(plan),
            due=monotonic() + self.config.max_wait_s - request.waited_s,
            priority=request.priority,
        )
        with self._lock:
            if request_id in self._live:
                raise EngineError(request_id, "the id is in use")
            self._live[request_id] = sequence
        try:
            self._steps.submit(sequence)
        except EngineError:
            self._refused += 1
            self._forget(request_id)
            raise
        return sequence.handle

    def deliver(self, handle: RequestHandle, item_index: int, start_row: int, rows: torch.Tensor) -> None:
        """Packed rows [n, (1+k)*h] of an item, from its row ``start_row`` on, in any order and more than once.

        They are copied before this returns. Rows that do not fit the item, the model or memory fail that request (its
        reader gets the EngineError); rows for a request that is over are ignored.
        """
        self._write(handle, lambda held: held.write(item_index, start_row, rows))

    def deliver_bytes(
        self,
        handle: RequestHandle,
        item_index: int,
        start_row: int,
        data: bytes | bytearray | memoryview | DeviceBytes,
        *,
        layout: RowLayout,
    ) -> None:
        """As :meth:`deliver`, from the bytes of packed rows as a transport leaves them in a block: one copy.

        With a ``stream`` it waits for the device: call it on a thread.
        """
        self._write(
            handle,
            lambda held: held.write_bytes(item_index, start_row, data, width=layout.width, dtype=layout.dtype),
        )

    def _write(self, handle: RequestHandle, write: Callable[[RequestRows], None]) -> None:
        sequence = self._live.get(handle.request_id)
        if sequence is None or sequence.handle is not handle or self._steps is None:
            return
        try:
            write(sequence.rows)
        except EngineError as error:
            self.fail(handle, error)
        except Exception as error:  # no memory, or a device's: whoever else waits for these rows may have them
            ours = EngineError(handle.request_id, f"its rows could not be taken: {error!r}")
            ours.__cause__ = error
            self.fail(handle, ours)
        else:
            self._steps.rows_arrived(handle.request_id)

    def fail(self, handle: RequestHandle, error: AiodisaggError) -> None:
        """Ends a request with ``error``, which its reader gets; no effect when it is over."""
        self._end(handle, error)

    def _end(self, handle: RequestHandle, error: AiodisaggError | None = None) -> None:
        if self._steps is not None and handle.request_id in self._live:
            self._steps.end(handle, error)

    def stats(self) -> EngineStats:
        """Counters and gauges as of the last step."""
        stats = EngineStats() if self._steps is None else self._steps.stats
        return replace(stats, failed=stats.failed + self._refused)

    def _forget(self, request_id: str) -> None:
        with self._lock:
            self._live.pop(request_id, None)


@asynccontextmanager
async def opened(make: Callable[[], Engine]) -> AsyncIterator[Engine]:
    """An engine that ``make`` makes, on a thread: its pages take more than a second a GiB of a host's memory."""
    making = asyncio.get_running_loop().create_task(asyncio.to_thread(make), name="make the engine")
    try:
        engine = await asyncio.shield(making)
    except BaseException:  # who is cancelled meanwhile has an engine, too, also if cancelled again and again
        making.add_done_callback(_let_go)
        await asyncio.wait([making])
        raise
    async with engine:
        yield engine


def _let_go(making: asyncio.Task[Engine]) -> None:
    """Of what was made for nobody."""
    if not making.cancelled() and making.exception() is None:
        making.result()._runner.release()
