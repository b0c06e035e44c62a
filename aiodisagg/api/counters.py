"""What the HTTP edge counts about itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest


class HttpCounters:
    """Requests by route and status. Each server has its own, so two in one process do not clash.

    Status 499 stands for clients that went away. A stream's time ends with its last byte; one that fails after it began
    counts with the status that it would have had before.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "aiodisagg_http_requests", "Answered HTTP requests.", ("route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "aiodisagg_http_request_seconds",
            "From the request line to the end of the handler.",
            ("route",),
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self._registry,
        )

    def answered(self, route: str, status: int, took_s: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(took_s)

    def text(self) -> str:
        """Prometheus' text format."""
        return generate_latest(self._registry).decode()
