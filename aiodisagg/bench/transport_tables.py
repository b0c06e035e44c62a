"""A transport report as Markdown: what the command prints is what goes into the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from aiodisagg.bench import view
from aiodisagg.bench.exchange import BARE_TCP, BARE_UNIX, HAND_OFF, TCP, UNIX
from aiodisagg.bench.transport import Moved, TransportReport
from aiodisagg.bench.view import size
from aiodisagg.peer.config import MiB


def markdown(report: TransportReport) -> str:
    """Every section that was run, the bars first."""
    parts = [f"{report.machine}; medians of {report.runs} interleaved runs."]
    parts += [_table(("path", "bar", "measured", ""), bars(report))]
    rates = [
        (
            one.path, size(one.size_bytes), str(one.concurrent), f"{one.gib_s:.2f}", f"{one.limit_gib_s:.2f}",
            f"{one.of_limit:.2f}", one.limit,
        )
        for one in report.moved
    ]  # fmt: skip
    parts += [_table(("path", "size", "at once", "GiB/s", "limit", "of limit", "its limit"), rates)]
    latencies = [
        (one.what, size(one.size_bytes) if one.size_bytes else "-", f"{one.p50_us:.0f}", f"{one.p99_us:.0f}")
        for one in report.latencies
    ]
    parts += [_table(("exchange", "size", "p50 us", "p99 us"), latencies)]
    loops = [
        (
            one.path, f"{one.writer.held_ms:.2f}", f"{one.receiver.held_ms:.2f}",
            f"{one.writer.late_ms:.1f}", f"{one.receiver.late_ms:.1f}",
        )
        for one in report.loops
    ]  # fmt: skip
    parts += [_table(("loop", "writer held ms", "receiver held ms", "writer late ms", "receiver late ms"), loops)]
    fair = [
        (
            one.path, f"{one.alone_p50_ms:.2f}", f"{one.alone_p99_ms:.2f}", f"{one.beside_p50_ms:.2f}",
            f"{one.beside_p99_ms:.2f}", f"{one.chunk_ms:.2f}", f"{one.limit_ms:.2f}",
        )
        for one in report.fair
    ]  # fmt: skip
    columns = (
        "1 MiB by", "alone p50 ms", "alone p99", "beside 1 GiB p50", "beside p99", "one chunk", "3 alone + chunk",
    )  # fmt: skip
    parts += [_table(columns, fair)]
    hogged = [
        (one.path, size(one.size_bytes), f"{one.free_gib_s:.2f}", f"{one.hogged_gib_s:.2f}") for one in report.hogged
    ]
    parts += [_table(("path", "size", "GIL free, GiB/s", "receiver's GIL wanted, GiB/s"), hogged)]
    crossed = [
        (one.path, size(one.size_bytes), f"{one.delay_ms} ms, {one.loss_percent} %", f"{one.seconds:.1f} s, exact")
        for one in report.crossed
    ]
    parts += [_table(("two hosts, by", "size", "delay and loss, each way", "took"), crossed)]
    parts += [f"Not here: {name}: {why}" for name, why in report.missing.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return view.markdown(columns, rows) if rows else ""


def bars(report: TransportReport) -> list[tuple[str, str, str, str]]:
    """(path, bar, measured, "met" or "missed") for every bar of which there is a measurement."""
    found: list[tuple[str, str, str, str]] = []

    def judge(path: str, bar: str, measured: str, met: bool) -> None:
        found.append((path, bar, measured, "met" if met else "**missed**"))

    alone = {(one.path, one.size_bytes): one for one in report.moved if one.concurrent == 1}
    for path, at_mib, least in (
        ("ipc", 16, 0.9), ("ipc", 256, 0.9), ("stream", 256, 0.9), ("zmq", 256, 0.9), ("mooncake-tcp", 256, 0.95),
    ):  # fmt: skip
        if one := alone.get((path, at_mib * MiB)):
            bar = f">= {least:g} of {one.limit}"
            judge(f"{path}, {at_mib} MiB", bar, f"{one.of_limit:.2f}", one.of_limit >= least)
    for other, least in (("zmq", 1.3), ("mooncake-tcp", 1.8)):
        pair = alone.get(("stream", 256 * MiB)), alone.get((other, 256 * MiB))
        if pair[0] and pair[1]:
            times = _over(pair[0], pair[1])
            judge("stream, 256 MiB", f">= {least:g} times {other}", f"{times:.2f}", times >= least)
    bare_us = {one.what: one.p50_us for one in report.latencies}
    for what, most, bare in ((UNIX, 40, BARE_UNIX), (TCP, 60, BARE_TCP), (HAND_OFF, 150, "")):
        if times_us := [one.p50_us for one in report.latencies if one.what == what]:
            beside = f", {max(times_us) / bare_us[bare]:.1f} times its bytes bare" if bare in bare_us else ""
            judge(what, f"p50 <= {most} us", f"{max(times_us):.0f} us{beside}", max(times_us) <= most)
    if loops := [one for one in report.loops if one.path != "idle"]:
        worst = max(max(one.writer.held_ms, one.receiver.held_ms) for one in loops)
        judge("event loop", "never held for more than 2 ms", f"{worst:.2f} ms", worst <= 2)
    for fair in report.fair:
        bar = f"1 MiB beside {size(fair.huge_bytes)}: p99 <= 3 times alone + one chunk = {fair.limit_ms:.2f} ms"
        judge(f"fairness, {fair.path}", bar, f"{fair.beside_p99_ms:.2f} ms", fair.beside_p99_ms <= fair.limit_ms)
    return found


def _over(one: Moved, other: Moved) -> float:
    """How much faster, the median of the rounds' ratios."""
    return statistics.median(b / a for a, b in zip(one.runs_s, other.runs_s, strict=True))
