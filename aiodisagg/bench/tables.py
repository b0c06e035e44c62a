"""What the measurements show, as tables for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from aiodisagg.bench.control import STEADY_PER_S, ControlReport
from aiodisagg.bench.faults import FaultReport, Round
from aiodisagg.bench.resume import ResumeReport
from aiodisagg.bench.reuse import ReuseReport
from aiodisagg.bench.view import size, table


def resume_tables(report: ResumeReport) -> Group:
    title = f"Transfers over {report.transport}, rows of {report.row_bytes // 1024} KiB, medians of {report.repeats}"
    columns = ("rows", "bytes", "cuts", "cut", "not cut", "overhead", "", "resent", "bare copy", "rate")
    times = [
        (
            f"{one.rows:,}", size(one.size_bytes), str(one.interruptions), f"{one.seconds:.3f} s",
            f"{one.undisturbed_s:.3f} s", f"{one.overhead_s * 1000:+.0f} ms", f"{one.overhead_percent:+.1f} %",
            size(one.resent_bytes), f"{one.bare_copy_s:.3f} s", f"{one.size_bytes / one.undisturbed_s / 1e9:.2f} GB/s",
        )
        for one in report.resumed
    ]  # fmt: skip
    kinds = ("", "requests", "rows of each", "registered", "resident", "lent at most", "time")
    memory = [
        (
            kind.kind, str(kind.requests), f"{kind.rows:,}", size(kind.pool_bytes), size(kind.resident_bytes),
            size(kind.peak_bytes), "computed" if kind.seconds is None else f"{kind.seconds:.3f} s",
        )
        for kind in report.memory
    ]  # fmt: skip
    return Group(table(title, columns, times), table("Memory for rows on their way", kinds, memory))


def fault_table(report: FaultReport) -> Table:
    title = (
        f"{report.scenario}, {report.transports}: {report.requests} requests with {report.images} images at once; "
        f"undisturbed p50 {report.calm_p50_ms:.0f} ms, p99 {report.calm_p99_ms:.0f} ms"
    )
    columns = ("", "requests", "failed", "wrong", "items there", "moved", "rows kept", "twice", "resent")

    def row(name: str, requests: int, items: str, one: Round | FaultReport) -> tuple[str, ...]:
        return (
            name, str(requests), str(one.failed), str(one.wrong), items, str(one.moved), str(one.rows_kept),
            size(one.received_twice_bytes), size(one.resent_bytes),
            f"{one.added_p50_ms:.0f} ms", f"{one.added_p99_ms:.0f} ms",
        )  # fmt: skip

    rows = [
        row(str(one.number + 1), one.requests, f"{one.items_of_victim}/{one.items_open}", one) for one in report.rounds
    ]
    rows.append(row("all", sum(one.requests for one in report.rounds), "", report))
    return table(title, (*columns, "added p50", "added p99"), rows)


def control_table(report: ControlReport) -> Table:
    title = f"Items of {report.rows} rows over {report.transport}, {report.concurrency} at a time, by a null model"
    columns = (
        "encode peers", "requests/s", "p50", "p99", f"at {STEADY_PER_S:,.0f}/s: p50", "p99", "at half of it", "p50",
        "p99", "CPU, receiver", "encoders",
    )  # fmt: skip
    rows = []
    for one in report.measured:
        full, steady, half = one.latency_ms, one.steady_latency_ms, one.half_latency_ms
        rows.append((
            str(one.peers), f"{one.requests_per_s:,.0f}", f"{full.p50:.1f} ms", f"{full.p99:.1f} ms",
            f"{steady.p50:.2f} ms", f"{steady.p99:.2f} ms",
            f"{one.half_per_s:,.0f}/s", f"{half.p50:.2f} ms", f"{half.p99:.2f} ms",
            f"{one.receiver_cpu_us:.0f} us", f"{one.encoders_cpu_us:.0f} us",
        ))  # fmt: skip
    return table(title, columns, rows)


def reuse_table(report: ReuseReport) -> Table:
    on = report.found[0]
    title = (
        f"{report.model}, {report.concurrency} requests at a time, {report.reuse:.0%} of the pictures from a pool of "
        f"{report.pool}; {on.all.requests} requests each"
    )
    columns = (
        "caches", "failed", "requests/s", "TTFT mean", "p50", "p99", "E2E mean", "pictures", "different", "encoded",
        "again", "cached", "shared", "not sent", "evicted",
    )  # fmt: skip
    rows = []
    for one in report.found:
        ttft, e2e = one.all.ttft_ms, one.all.e2e_ms
        times = [ttft.mean, ttft.p50, ttft.p99, e2e.mean] if ttft is not None and e2e is not None else []
        rows.append((
            "on" if one.caches else "off", str(one.all.requests - one.all.completed), f"{one.all.requests_per_s:.2f}",
            *(f"{ms:,.0f} ms" for ms in times), *([] if times else ["-"] * 4), str(one.items), str(one.unique),
            str(one.encoded), str(one.twice), str(one.cached), str(one.shared),
            size(one.saved_bytes), str(one.evicted),
        ))  # fmt: skip
    return table(title, columns, rows)
