"""What a language peer's engine counts, as metrics."""

from __future__ import annotations

from prometheus_client.core import Metric

from aiodisagg.engine.config import EngineStats
from aiodisagg.peer import metrics


def engine_metrics(stats: EngineStats) -> list[Metric]:
    """One metric for each number that says how busy the engine is, or what it has done."""
    return [
        metrics.gauge("requests_waiting", "Requests without KV pages.", stats.waiting),
        metrics.gauge("requests_running", "Requests with KV pages.", stats.running),
        metrics.gauge("kv_pages_free", "Free KV pages.", stats.pages_free),
        metrics.gauge("kv_pages_used", "Used KV pages.", stats.pages_used),
        metrics.gauge("kv_pages_idle", "Free KV pages that a prompt may still reuse.", stats.pages_idle),
        metrics.counter("prefix_hits", "Admissions that found pages to reuse.", stats.prefix_hits),
        metrics.counter("prefix_tokens", "Tokens in pages that were reused.", stats.tokens_reused),
        metrics.counter("prefix_evictions", "Reusable pages that were taken.", stats.evictions),
        metrics.counter("prefill_tokens", "Prompt tokens computed.", stats.tokens_prefilled),
        metrics.counter("decode_tokens", "Tokens sampled.", stats.tokens_decoded),
        metrics.counter("rows_used", "Rows fed to the model.", stats.rows_used),
        metrics.counter("preemptions", "Requests that lost their pages.", stats.preemptions),
        metrics.counter("requests_failed", "Requests that the engine failed, or refused as broken.", stats.failed),
    ]
