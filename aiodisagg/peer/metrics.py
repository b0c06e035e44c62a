"""What a peer counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from aiodisagg.protocol.counters import ByteCounters


class _Once:
    """A collector over a list made for this one scrape."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"aiodisagg_{name}", text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"aiodisagg_{name}", text, value=value)


def byte_counters(counters: ByteCounters) -> Metric:
    """``aiodisagg_row_bytes_total`` by outcome (sent, resent, received, refused), region and peer ("": past ones)."""
    family = CounterMetricFamily(
        "aiodisagg_row_bytes", "Bytes of rows and their regions.", labels=("outcome", "region", "peer")
    )
    for outcome, region, peer, size in counters.items():
        family.add_metric((outcome, region.name.lower(), peer), size)
    return family


def beside(first: Iterable[Metric], second: Iterable[Metric], prefix: str) -> list[Metric]:
    """Both halves of a peer: what the second calls as the first does gets a prefix."""
    found = list(first)
    taken = {metric.name for metric in found}
    for metric in second:
        if metric.name in taken:
            renamed = metric.name.replace("aiodisagg_", f"aiodisagg_{prefix}_", 1)
            metric.samples = [s._replace(name=s.name.replace(metric.name, renamed, 1)) for s in metric.samples]
            metric.name = renamed
        found.append(metric)
    return found


def render(metrics: Iterable[Metric]) -> str:
    """The text of one scrape."""
    registry = CollectorRegistry()
    registry.register(_Once(metrics))
    return generate_latest(registry).decode()
