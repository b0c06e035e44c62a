"""Settings of the engine, frozen and checked; no torch needed to read them."""

from __future__ import annotations

from dataclasses import dataclass

from aiodisagg.errors import ConfigError
from aiodisagg.scheduler.order import Order


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How much the engine holds and how much it does at once.

    The KV pool takes ``num_pages * page_size`` tokens of ``2 * layers * kv_heads * head_dim`` elements. Beside it the
    engine keeps each unfinished request's rows, ``(1+k) * h`` elements a visual token, so that a preempted request can
    be computed again.
    """

    num_pages: int | None = None
    """Pages of the KV pool; None: as many as fit ``pool_bytes``."""
    pool_bytes: int | None = None
    """Size of the KV pool when ``num_pages`` is None; None: what a GPU has left (``pool_bytes_on``), else 256 MiB."""
    page_size: int = 16
    """Tokens of a page."""
    token_budget: int = 512
    """Tokens of a step, decodes included; see :func:`~aiodisagg.engine.schedule.most_tokens`."""
    itl_budget_ms: float = 0.0
    """What prefill may make a running stream wait between two of its tokens, or one and a half times what the decodes
    of the step take alone if that is more; 0: as long as ``token_budget`` tokens take."""
    coalesce_tokens: int = 64
    """Fewer prompt tokens than that wait for the rows that follow them, while there is other work; 0: they never do."""
    overlap: bool = True
    """Prefill what has arrived of a prompt; else a prefill begins when the last row is here."""
    prefix_cache: bool = True
    """Keep what finished requests leave in the pool for prompts that begin alike."""
    order: Order = Order.SHORT_FIRST
    """Of requests of one class: who gets pages, and prompt tokens, before whom."""
    max_wait_s: float = 10.0
    """A request that has waited so long for its first token goes before all that have not, in order of arrival."""
    max_running: int = 64
    """Requests that hold pages at once; never more than ``token_budget``, so that each decode fits into every step."""
    max_waiting: int = 1024
    """Requests without pages; one more is refused with Overloaded."""
    max_context: int | None = None
    """Most tokens of prompt and answer; None: the model's ``max_position_embeddings``."""

    def __post_init__(self) -> None:
        for key in ("page_size", "token_budget", "max_running", "max_waiting"):
            if getattr(self, key) < 1:
                raise ConfigError(key, f"must be at least 1, not {getattr(self, key)}")
        for key in ("itl_budget_ms", "coalesce_tokens", "max_wait_s"):
            if not getattr(self, key) >= 0:
                raise ConfigError(key, f"must be at least 0, not {getattr(self, key)}")
        for key in ("num_pages", "pool_bytes", "max_context"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(key, f"must be at least 1, not {value}")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A consistent view of the engine after its last step. Counters only grow; gauges say how it is now."""

    waiting: int = 0
    """Gauge: requests without pages, preempted ones included."""
    running: int = 0
    """Gauge: requests with pages."""
    pages_free: int = 0
    """Gauge: pages that can be taken, those with something to reuse included."""
    pages_used: int = 0
    """Gauge: pages of running requests."""
    pages_idle: int = 0
    """Gauge: free pages that a prompt may still reuse."""
    prefix_hits: int = 0
    """Admissions that found at least one page, those after a preemption included."""
    tokens_reused: int = 0
    """Tokens in the pages found: neither computed nor, for visual ones, encoded."""
    evictions: int = 0
    """Pages with something to reuse that were taken for something else."""
    rows_bytes: int = 0
    """Gauge: bytes of item rows held."""
    steps: int = 0
    """Forward passes over a batch."""
    tokens_prefilled: int = 0
    """Prompt tokens computed, those computed again after a preemption included."""
    tokens_decoded: int = 0
    """Tokens sampled."""
    rows_used: int = 0
    """Rows that were fed to the model in place of token embeddings."""
    preemptions: int = 0
    retries: int = 0
    """Steps that were done again one request at a time because the batch raised."""
    failed: int = 0
    """Requests that ended with an error."""
    batch_sizes: tuple[tuple[int, int], ...] = ()
    """(requests in a step, number of such steps), ascending."""
